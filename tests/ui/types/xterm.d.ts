export const Terminal: any;
