import { Environment, type EnvironmentOptions } from "./environments.js";
import type { EnvAbout, EnvList, SandboxConfig, SandboxInfo, SandboxList, ServerInfo, State } from "./generated.js";
import { Sandbox } from "./sandbox.js";
import { Transport, type ConnectionOptions } from "./transport.js";

/** A server, by its URL and key. */
export class Client {
  readonly transport: Transport;

  constructor(options: ConnectionOptions = {}) {
    this.transport = new Transport(options);
  }

  async serverInfo(): Promise<ServerInfo> {
    return this.transport.json("server_info");
  }

  async createSandbox(config: Partial<SandboxConfig> = {}): Promise<Sandbox> {
    return Sandbox.create(config, this.transport);
  }

  async connect(idOrName: string): Promise<Sandbox> {
    return Sandbox.connect(idOrName, this.transport);
  }

  /** Sandboxes, newest first. states: all of them without it. label: "key=value" or "key". */
  async *listSandboxes(filter: { states?: State[]; label?: string; image?: string; name?: string } = {},
  ): AsyncGenerator<SandboxInfo> {
    const { states, ...query } = filter;
    let after: string | null | undefined;
    do {
      const page: SandboxList = await this.transport.json<SandboxList>("list_sandboxes", { query: { ...query,
        state: states?.join(","), limit: 200, after } });
      yield* page.items;
      after = page.next;
    } while (after);
  }

  async makeEnvironment(envId: string, options: EnvironmentOptions = {}): Promise<Environment> {
    return Environment.make(envId, options, this.transport);
  }

  async listEnvironments(): Promise<Record<string, unknown>[]> {
    return (await this.transport.json<EnvList>("list_envs")).items as Record<string, unknown>[];
  }

  async aboutEnvironment(id: string): Promise<EnvAbout> {
    return this.transport.json("about_env", { query: { id } });
  }
}
