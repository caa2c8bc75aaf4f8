export const FitAddon: any;
