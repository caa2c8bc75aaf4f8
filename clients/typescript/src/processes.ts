import { InvalidConfig, type BashObservation, type Command, type CommandResponse, type CreateBashSessionRequest,
  type CreateBashSessionResponse, type Operation, type ProcessInfo, type ProcessList, type SessionInfo,
  type SessionList } from "./generated.js";
import { OutputStream } from "./stream.js";
import { LONGEST, SLACK, type Request, type Transport } from "./transport.js";

const POLL = 20;
const DEFAULT_TIMEOUT = 120;

/** Options of a program, as of `Command`. timeout: seconds, 120 by default. */
export type ProgramOptions = Partial<Omit<Command, "command">>;

function limited(timeout: number | null | undefined): number {
  const seconds = timeout === undefined ? DEFAULT_TIMEOUT : timeout;
  if (seconds === null || !(seconds > 0 && seconds <= LONGEST - SLACK)) {
    throw new InvalidConfig(`timeout ${seconds} is not a number of seconds from 0 to ${LONGEST - SLACK}`,
      { hint: "start a longer program with processes.start, and use wait or follow" });
  }
  return seconds;
}

/** One-shot programs and background processes. A list of words is an argv; a string is run by the image's shell. */
export class Processes {
  constructor(private readonly transport: Transport, private readonly sandboxId: string) {}

  /** Run a program to its end. An exit code other than 0 is a result, not an error. */
  async run(command: string | string[], options: ProgramOptions = {}): Promise<CommandResponse> {
    const timeout = limited(options.timeout);
    return this.transport.json("execute", { path: { sandbox_id: this.sandboxId }, timeout: timeout + SLACK,
      json: { ...options, command, timeout } });
  }

  /** The output of a program while it runs. */
  stream(command: string | string[], options: ProgramOptions = {}): OutputStream {
    const timeout = limited(options.timeout);
    return new OutputStream((signal) => this.transport.open("execute", { path: { sandbox_id: this.sandboxId },
      query: { stream: true }, timeout: timeout + SLACK, json: { ...options, command, timeout }, signal }));
  }

  /** Start a background process. Without `stdin`, its standard input stays open for `Process.write`. */
  async start(command: string | string[], options: Omit<ProgramOptions, "timeout"> = {}): Promise<Process> {
    const info = await this.transport.json<ProcessInfo>("start_process", { path: { sandbox_id: this.sandboxId },
      json: { ...options, command, timeout: null } });
    return new Process(this.transport, this.sandboxId, info);
  }

  async get(id: string): Promise<Process> {
    const path = { sandbox_id: this.sandboxId, process_id: id };
    return new Process(this.transport, this.sandboxId, await this.transport.json("get_process", { path }));
  }

  async list(): Promise<Process[]> {
    const found = await this.transport.json<ProcessList>("list_processes", { path: { sandbox_id: this.sandboxId } });
    return found.items.map((info) => new Process(this.transport, this.sandboxId, info));
  }
}

/** A background process. info: its state at the last request. */
export class Process {
  constructor(private readonly transport: Transport, private readonly sandboxId: string, public info: ProcessInfo) {}

  get id(): string {
    return this.info.process_id;
  }

  private async call(name: Operation, request: Request = {}): Promise<ProcessInfo> {
    const path = { sandbox_id: this.sandboxId, process_id: this.id };
    this.info = await this.transport.json<ProcessInfo>(name, { ...request, path });
    return this.info;
  }

  /** Wait for its end, at most `timeout` seconds; `running` of the result is then true. */
  async wait(timeout = Infinity): Promise<ProcessInfo> {
    const end = Date.now() + timeout * 1000;
    for (;;) {
      const wait = Math.min(POLL, Math.max(0, (end - Date.now()) / 1000));
      const info = await this.call("get_process", { query: { wait: wait.toFixed(3) } });
      if (!info.running || Date.now() >= end) return info;
    }
  }

  /** Bytes of its output from an offset. wait: seconds to wait for the first byte. */
  async logs(stream: "stdout" | "stderr" = "stdout", options: { offset?: number; limit?: number; wait?: number } = {},
  ): Promise<{ data: Uint8Array; next: number; running: boolean }> {
    const path = { sandbox_id: this.sandboxId, process_id: this.id };
    const response = await this.transport.open("process_logs", { path, query: { stream, ...options },
      timeout: (options.wait ?? 0) + 60 });
    const data = new Uint8Array(await response.arrayBuffer());
    const next = Number(response.headers.get("x-rock-next") ?? (options.offset ?? 0) + data.length);
    return { data, next, running: !["0", "false", "", null].includes(response.headers.get("x-rock-running")) };
  }

  /** Its output until its end. */
  async *follow(stream: "stdout" | "stderr" = "stdout", offset = 0): AsyncGenerator<Uint8Array> {
    for (;;) {
      const part = await this.logs(stream, { offset, wait: POLL });
      if (part.data.length) yield part.data;
      else if (!part.running) return;
      offset = part.next;
    }
  }

  async write(data: string | Uint8Array, close = false): Promise<ProcessInfo> {
    const body = typeof data === "string" ? new TextEncoder().encode(data) : new Uint8Array(data);
    return this.call("process_stdin", { body, query: { close: close || undefined } });
  }

  /** Send a signal (15 is SIGTERM); tree: also to all processes that it started. */
  async signal(signal: number, tree = true): Promise<ProcessInfo> {
    return this.call("signal_process", { json: { signal, tree } });
  }

  async kill(): Promise<ProcessInfo> {
    return this.signal(9);
  }

  /** Kill it if it runs, and delete its logs. */
  async forget(): Promise<ProcessInfo> {
    return this.call("forget_process");
  }
}

/** Shells that keep their directory and variables. The session "default" exists without `create`. */
export class Sessions {
  constructor(private readonly transport: Transport, private readonly sandboxId: string) {}

  async create(session: string, options: Partial<CreateBashSessionRequest> = {}): Promise<CreateBashSessionResponse> {
    return this.transport.json("create_session", { path: { sandbox_id: this.sandboxId }, json: { ...options, session } });
  }

  /** Run a command line. An exit code other than 0 is a result, not an error. */
  async run(command: string, options: { session?: string; timeout?: number; separate?: boolean } = {},
  ): Promise<BashObservation> {
    const timeout = limited(options.timeout);
    const session = options.session ?? "default";
    return this.transport.json("run", { path: { sandbox_id: this.sandboxId, session }, timeout: timeout + SLACK,
      json: { command, session, timeout, check: "silent", separate: options.separate ?? false } });
  }

  async list(): Promise<SessionInfo[]> {
    return (await this.transport.json<SessionList>("list_sessions", { path: { sandbox_id: this.sandboxId } })).items;
  }

  async interrupt(session = "default"): Promise<SessionInfo> {
    return this.transport.json("interrupt", { path: { sandbox_id: this.sandboxId, session } });
  }

  async close(session: string): Promise<void> {
    await this.transport.json("close_session", { path: { sandbox_id: this.sandboxId, session } });
  }
}
