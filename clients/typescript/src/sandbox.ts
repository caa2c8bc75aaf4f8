import { Files } from "./files.js";
import { InvalidConfig, NotFound, StartFailed, type BashObservation, type CommandResponse, type SandboxConfig,
  type SandboxInfo } from "./generated.js";
import { Processes, Sessions, type ProgramOptions } from "./processes.js";
import type { OutputStream } from "./stream.js";
import { fromWire, newKey, SLACK, Transport, type ConnectionOptions } from "./transport.js";

const POLL = 20;
const CLEAN_UP = 60;

/** Poll a pending sandbox until it runs. Throws the error of a failed start. */
export async function launched(transport: Transport, info: SandboxInfo, deadline: number): Promise<SandboxInfo> {
  while (info.state === "pending") {
    const left = (deadline - Date.now()) / 1000;
    if (left <= 0) throw new StartFailed("the sandbox did not start in time", { sandboxId: info.sandbox_id,
      hint: "increase startup_timeout" });
    info = await transport.json<SandboxInfo>("get_sandbox", { path: { sandbox_id: info.sandbox_id },
      query: { wait: Math.min(left, POLL).toFixed(3) } });
  }
  if (info.state !== "running") {
    throw info.error ? fromWire({ error: info.error }) : new StartFailed(info.reason ?? `the sandbox is ${info.state}`,
      { sandboxId: info.sandbox_id });
  }
  return info;
}

/** A sandbox that runs. */
export class Sandbox {
  readonly files: Files;
  readonly processes: Processes;
  readonly sessions: Sessions;
  readonly ports: Ports;

  private constructor(readonly transport: Transport, readonly id: string) {
    this.files = new Files(transport, id);
    this.processes = new Processes(transport, id);
    this.sessions = new Sessions(transport, id);
    this.ports = new Ports(transport, id);
  }

  /** Create a sandbox and wait until it runs. A failed start leaves no sandbox behind. */
  static async create(config: Partial<SandboxConfig> = {}, connection: ConnectionOptions | Transport = {},
  ): Promise<Sandbox> {
    const transport = connection instanceof Transport ? connection : new Transport(connection);
    const timeout = config.startup_timeout ?? 180;
    const deadline = Date.now() + timeout * 1000;
    const wait = Math.min(timeout, POLL);
    const info = await transport.json<SandboxInfo>("create_sandbox", { query: { wait }, json: config,
      timeout: wait + 60 });
    const sandbox = new Sandbox(transport, info.sandbox_id);
    try {
      await launched(transport, info, deadline);
    } catch (error) {
      await sandbox.stop().catch(() => undefined);
      throw error;
    }
    return sandbox;
  }

  /** An existing sandbox by its id or name. */
  static async connect(idOrName: string, connection: ConnectionOptions | Transport = {}): Promise<Sandbox> {
    const transport = connection instanceof Transport ? connection : new Transport(connection);
    try {
      const info = await transport.json<SandboxInfo>("get_sandbox", { path: { sandbox_id: idOrName } });
      return new Sandbox(transport, info.sandbox_id);
    } catch (error) {
      if (!(error instanceof NotFound)) throw error;
      const query = { name: idOrName, state: "pending,running,stopping", limit: 1 };
      const found = await transport.json<{ items: SandboxInfo[] }>("list_sandboxes", { query });
      const info = found.items[0];
      if (info === undefined) throw error;
      return new Sandbox(transport, info.sandbox_id);
    }
  }

  private at(timeout = CLEAN_UP) {
    return { path: { sandbox_id: this.id }, timeout: timeout + SLACK };
  }

  async info(): Promise<SandboxInfo> {
    return this.transport.json("get_sandbox", this.at());
  }

  /** Run a command line in a session that keeps its directory and variables. */
  async run(command: string, options: { session?: string; timeout?: number; separate?: boolean } = {},
  ): Promise<BashObservation> {
    return this.sessions.run(command, options);
  }

  /** Run a program of its own to its end. */
  async exec(command: string | string[], options: ProgramOptions = {}): Promise<CommandResponse> {
    return this.processes.run(command, options);
  }

  /** The output of a program while it runs. */
  stream(command: string | string[], options: ProgramOptions = {}): OutputStream {
    return this.processes.stream(command, options);
  }

  async pause(): Promise<SandboxInfo> {
    return this.transport.json("pause_sandbox", this.at());
  }

  async resume(): Promise<SandboxInfo> {
    return this.transport.json("resume_sandbox", this.at());
  }

  /** Stop it; its record stays. */
  async stop(): Promise<SandboxInfo> {
    return this.transport.json("stop_sandbox", this.at());
  }

  /** Stop it, and delete its record and its retained files. */
  async delete(): Promise<void> {
    await this.transport.json("delete_sandbox", { ...this.at(), query: { force: true } });
  }
}

/** HTTP servers on ports of a sandbox. */
export class Ports {
  constructor(private readonly transport: Transport, private readonly sandboxId: string) {}

  /** URL of a port. Requests need the API key of the server. */
  url(port: number, path = "/"): string {
    if (!Number.isInteger(port) || port < 1 || port > 65535) throw new InvalidConfig(`${port} is not a port`);
    const base = `${this.transport.url}/v1/sandboxes/${encodeURIComponent(this.sandboxId)}/ports/${port}/`;
    return base + path.replace(/^\/+/, "");
  }

  /** A request to a port. The API key is in a header of its own, so `authorization` is for the program inside. */
  async fetch(port: number, path = "/", init: RequestInit = {}): Promise<Response> {
    const headers = new Headers(init.headers);
    for (const [name, value] of Object.entries(this.transport.headers)) {
      if (name === "authorization") headers.set("x-rock-api-key", value.replace(/^Bearer /, ""));
      else headers.set(name, value);
    }
    if (init.method !== undefined && init.method !== "GET") headers.set("idempotency-key", newKey());
    return fetch(this.url(port, path), { ...init, headers });
  }
}
