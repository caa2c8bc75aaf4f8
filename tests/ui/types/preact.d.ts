export function h(...args: any[]): any;
export function render(node: any, root: Element): void;
export const Fragment: any;
export class Component { props: any; state: any; constructor(props?: any); }
