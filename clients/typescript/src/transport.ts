// Requests to a server. A mutating request has an idempotency key, and a retry sends the same key, so that the server
// executes it once.

import { RockError } from "./error.js";
import { ClientError, ERRORS, InvalidConfig, ROUTES, ServerError, Unavailable, type Operation } from "./generated.js";

declare const process: { env: Record<string, string | undefined> } | undefined;

/** baseUrl, apiKey: by default ROCK_BASE_URL and ROCK_API_KEY. reconnectTimeout: seconds for which a request is retried
 * while the server is unavailable; 0 disables retries. headers: of every request. */
export interface ConnectionOptions {
  baseUrl?: string;
  apiKey?: string;
  reconnectTimeout?: number;
  headers?: Record<string, string>;
}

/** query: undefined values are left out. timeout: seconds for the whole request. repeats: whether it is sent again after
 * its connection broke. */
export interface Request {
  path?: Record<string, string>;
  query?: Record<string, string | number | boolean | undefined | null>;
  json?: unknown;
  body?: Uint8Array<ArrayBuffer> | ReadableStream<Uint8Array>;
  contentType?: string;
  timeout?: number;
  repeats?: boolean;
  signal?: AbortSignal;
}

/** Seconds after which fetch of Node ends a silent response; a call that may be silent for longer is rejected. */
export const LONGEST = 280;
export const SLACK = 15;
const ANSWER_TIMEOUT = 60;
const RECONNECT = 60;
const FIRST_CONTACT = 2;
const UNSENT_CODES = new Set(["ECONNREFUSED", "ENOTFOUND", "EAI_AGAIN", "EHOSTUNREACH", "ENETUNREACH",
  "UND_ERR_CONNECT_TIMEOUT"]);

function variable(name: string): string | undefined {
  return typeof process === "undefined" ? undefined : process.env[name] || undefined;
}

export function newKey(): string {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return [...bytes].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** The error of a response body. */
export function fromWire(body: unknown, status = 500): RockError {
  const error = isRecord(body) ? body["error"] : undefined;
  if (!isRecord(error)) {
    const text = isRecord(body) && typeof body["detail"] === "string" ? body["detail"] : String(body);
    const kind = status === 502 || status === 503 || status === 504 ? Unavailable
      : status >= 500 ? ServerError : ClientError;
    return new kind(`HTTP ${status}: ${text.slice(0, 500)}`, { details: { http_status: status } });
  }
  const code = String(error["code"] ?? "");
  const kind = Object.hasOwn(ERRORS, code) ? ERRORS[code]! : ServerError;
  return new kind(String(error["message"] ?? ""), {
    code,
    sandboxId: typeof error["sandbox_id"] === "string" ? error["sandbox_id"] : null,
    retryable: error["retryable"] === true,
    hint: typeof error["hint"] === "string" ? error["hint"] : null,
    details: isRecord(error["details"]) ? error["details"] : {},
  });
}

function isRecord(value: unknown): value is Record<string, unknown> {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

export class Transport {
  readonly url: string;
  readonly headers: Record<string, string>;
  private readonly reconnect: number;
  private reached = false;

  constructor(options: ConnectionOptions = {}) {
    const given = (options.baseUrl ?? variable("ROCK_BASE_URL") ?? "http://127.0.0.1:8080").trim().replace(/\/+$/, "");
    if (!/^https?:\/\/[^/]+/.test(given)) {
      throw new InvalidConfig(`baseUrl ${JSON.stringify(given)} is not a URL like http://host:8080`);
    }
    const seconds = options.reconnectTimeout ?? Number(variable("ROCK_RECONNECT_TIMEOUT") ?? RECONNECT);
    if (!(seconds >= 0 && seconds <= 3600)) {
      throw new InvalidConfig(`reconnectTimeout ${seconds} is not a number from 0 to 3600`);
    }
    const key = options.apiKey ?? variable("ROCK_API_KEY");
    this.url = given;
    this.reconnect = seconds;
    this.headers = { ...(key ? { authorization: `Bearer ${key}` } : {}), ...options.headers };
  }

  /** The path of an operation, with its variables and query. */
  target(name: Operation, request: Request = {}): string {
    const path = ROUTES[name][1].replace(/\{(\w+)\}/g, (_, word: string) => encodeURIComponent(request.path?.[word] ?? ""));
    const query = new URLSearchParams();
    for (const [word, value] of Object.entries(request.query ?? {})) {
      if (value !== undefined && value !== null) query.set(word, value === true ? "1" : String(value));
    }
    return query.size ? `${path}?${query}` : path;
  }

  /** The JSON response of an operation. */
  async json<T>(name: Operation, request: Request = {}): Promise<T> {
    const text = new TextDecoder().decode(await this.bytes(name, request));
    try {
      return (text ? JSON.parse(text) : null) as T;
    } catch (error) {
      throw new ServerError(`malformed response of ${name}: ${text.slice(0, 200)}`, {}, error);
    }
  }

  /** The bytes of the response of an operation. */
  async bytes(name: Operation, request: Request = {}): Promise<Uint8Array<ArrayBuffer>> {
    return this.retried(name, request, async (response) => new Uint8Array(await response.arrayBuffer()));
  }

  /** The response of an operation, whose body the caller reads. Only a GET is sent again after its connection broke. */
  async open(name: Operation, request: Request = {}): Promise<Response> {
    const repeats = request.repeats ?? ROUTES[name][0] === "GET";
    return this.retried(name, { ...request, repeats }, async (response) => response);
  }

  private async retried<T>(name: Operation, request: Request, read: (response: Response) => Promise<T>): Promise<T> {
    const key = newKey();
    const timeout = request.timeout ?? ANSWER_TIMEOUT;
    const began = Date.now();
    const whole = request.body instanceof ReadableStream;
    let pause = 0.05;
    let first: RockError | undefined;
    for (;;) {
      const left = Math.max(1, timeout - (Date.now() - began) / 1000);
      try {
        return await this.once(name, request, key, left, read);
      } catch (error) {
        if (!(error instanceof Unavailable) || !lostContact(error, !whole && (request.repeats ?? true))) {
          throw first && error instanceof Unavailable ? first : error;
        }
        first ??= error;
        const limit = Math.min(this.reached ? this.reconnect : Math.min(this.reconnect, FIRST_CONTACT), timeout);
        const delay = pause * (0.5 + Math.random());
        if ((Date.now() - began) / 1000 + delay > limit || request.signal?.aborted) throw first;
        await new Promise((resolve) => setTimeout(resolve, delay * 1000));
        pause = Math.min(pause * 1.5, 1);
      }
    }
  }

  private async once<T>(name: Operation, request: Request, key: string, seconds: number,
    read: (response: Response) => Promise<T>): Promise<T> {
    const method = ROUTES[name][0];
    const headers: Record<string, string> = { ...this.headers };
    let body: BodyInit | undefined;
    if (method !== "GET") headers["idempotency-key"] = key;
    if (request.json !== undefined) {
      body = JSON.stringify(request.json);
      headers["content-type"] = "application/json";
    } else if (request.body !== undefined) {
      body = request.body as BodyInit;
      headers["content-type"] = request.contentType ?? "application/octet-stream";
    }
    const control = new AbortController();
    const abort = () => control.abort(request.signal?.reason);
    request.signal?.addEventListener("abort", abort, { once: true });
    const timer = setTimeout(() => control.abort(TIMED_OUT), seconds * 1000);
    let answered = false;
    try {
      const init: RequestInit & { duplex?: "half" } = { method, headers, body, signal: control.signal, redirect: "manual" };
      if (request.body instanceof ReadableStream) init.duplex = "half";
      const response = await fetch(this.url + this.target(name, request), init);
      answered = this.reached = true;
      if (response.status >= 300 || response.type === "opaqueredirect") throw await failure(response);
      return await read(response);
    } catch (error) {
      if (error instanceof RockError) throw error;
      if (request.signal?.aborted) throw error;
      if ((error as { cause?: { message?: string } }).cause?.message === "bad port") {
        throw new InvalidConfig(`fetch sends no request to the port of ${this.url}`, { hint: "use another port" }, error);
      }
      throw this.away(error, control.signal.reason === TIMED_OUT, answered, seconds);
    } finally {
      clearTimeout(timer);
      request.signal?.removeEventListener("abort", abort);
    }
  }

  private away(error: unknown, late: boolean, answered: boolean, seconds: number): Unavailable {
    if (late) return new Unavailable(`no response of ${this.url} within ${seconds.toFixed(0)} s`, {}, error);
    const cause = (error as { cause?: { code?: string; message?: string } }).cause;
    const unsent = !answered && UNSENT_CODES.has(cause?.code ?? "");
    const why = cause?.code ?? cause?.message ?? String(error);
    return unsent
      ? new Unavailable(`no ROCK server at ${this.url}: ${why}`,
          { hint: "start it with: rock admin start", details: { unsent: true } }, error)
      : new Unavailable(`the connection to ${this.url} broke: ${why}`, { details: { sent: true } }, error);
  }
}

const TIMED_OUT = new Error("timed out");

async function failure(response: Response): Promise<RockError> {
  if (response.status < 400) return new ServerError(`a redirection (${response.status}) is not followed`);
  const text = await response.text();
  try {
    return fromWire(JSON.parse(text), response.status);
  } catch {
    return fromWire(text, response.status);
  }
}

/** Whether the same request may succeed a moment later. repeats: also where it may have begun. */
function lostContact(error: RockError, repeats: boolean): boolean {
  const { details } = error;
  if (details["unsent"] === true || details["outage"] === true) return true;
  return repeats && (details["sent"] === true || details["resumes"] === true ||
    details["http_status"] === 502 || details["http_status"] === 503);
}
