export * from "./generated.js";
export { RockError, type ErrorFields } from "./error.js";
export { Client } from "./client.js";
export { Environment, type EnvironmentOptions } from "./environments.js";
export { Files } from "./files.js";
export { Process, Processes, Sessions, type ProgramOptions } from "./processes.js";
export { Ports, Sandbox } from "./sandbox.js";
export { FrameParser, OutputStream, type Chunk } from "./stream.js";
export { Transport, type ConnectionOptions } from "./transport.js";
