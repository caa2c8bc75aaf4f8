import type { CallResult, EnvInfo, MakeEnv, OpenEnv, ResetResult, SandboxInfo, StepResult } from "./generated.js";
import { launched } from "./sandbox.js";
import { SLACK, Transport, type ConnectionOptions } from "./transport.js";

const POLL = 20;

/** protocol: "gem" (the default), "gym" or "task". startTimeout: seconds for the first start, which installs packages.
 * stepTimeout: seconds for one reset, step or call, at most 240. idle: seconds without a request after which the
 * environment is closed. */
export interface EnvironmentOptions extends Partial<Omit<OpenEnv, "env_id">> {
  kwargs?: Record<string, unknown>;
  startTimeout?: number;
  stepTimeout?: number;
  idle?: number;
}

/** An environment that the server hosts. */
export class Environment {
  private index = 0;

  private constructor(private readonly transport: Transport, readonly sandboxId: string, readonly number: number,
    private readonly timeout: number) {}

  static async make(envId: string, options: EnvironmentOptions = {}, connection: ConnectionOptions | Transport = {},
  ): Promise<Environment> {
    const transport = connection instanceof Transport ? connection : new Transport(connection);
    const { kwargs, startTimeout = 600, stepTimeout = 120, idle = 1800, ...opened } = options;
    const deadline = Date.now() + startTimeout * 1000;
    const host = await launched(transport, await transport.json<SandboxInfo>("open_env", {
      query: { wait: Math.min(POLL, startTimeout) }, json: { ...opened, env_id: envId }, timeout: POLL + 60 }), deadline);
    const spec: Partial<MakeEnv> = { env_id: envId, protocol: opened.protocol ?? "gem", kwargs: kwargs ?? {}, idle,
      timeout: stepTimeout };
    const made = await transport.json<EnvInfo>("make_env", { path: { sandbox_id: host.sandbox_id }, json: spec,
      timeout: Math.min(240, startTimeout) });
    return new Environment(transport, host.sandbox_id, made.env, stepTimeout + SLACK);
  }

  private at(json?: unknown) {
    return { path: { sandbox_id: this.sandboxId, env: String(this.number) }, json, timeout: this.timeout };
  }

  async reset(options: { seed?: number; options?: Record<string, unknown> } = {}): Promise<ResetResult> {
    const result = await this.transport.json<ResetResult>("reset_env", this.at(options));
    this.index = 0;
    return result;
  }

  /** One step. A retry has the number of the step, so that the environment is stepped once. */
  async step(action: unknown): Promise<StepResult> {
    const result = await this.transport.json<StepResult>("step_env", this.at({ action, index: this.index }));
    this.index += 1;
    return result;
  }

  /** Call another method of the environment. */
  async call(what: string, ...args: unknown[]): Promise<unknown> {
    return (await this.transport.json<CallResult>("call_env", this.at({ what, arguments: args }))).result;
  }

  async close(): Promise<void> {
    await this.transport.json("close_env", this.at());
  }
}
