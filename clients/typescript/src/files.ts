import { NotFound, type FileInfo, type FileList } from "./generated.js";
import type { Operation } from "./generated.js";
import type { Request, Transport } from "./transport.js";

const TRANSFER_TIMEOUT = 3600;

/** Files of a sandbox, by absolute paths. */
export class Files {
  constructor(private readonly transport: Transport, private readonly sandboxId: string) {}

  private at(query: Request["query"], more: Request = {}): Request {
    return { ...more, path: { sandbox_id: this.sandboxId }, query, timeout: TRANSFER_TIMEOUT };
  }

  private call<T>(name: Operation, query: Request["query"], more: Request = {}): Promise<T> {
    return this.transport.json<T>(name, this.at(query, more));
  }

  /** Bytes of a file, from an offset on, at most `length`. */
  async read(path: string, range: { offset?: number; length?: number } = {}): Promise<Uint8Array> {
    return this.transport.bytes("read_file", this.at({ path, ...range }));
  }

  async readText(path: string): Promise<string> {
    return new TextDecoder("utf-8", { fatal: true }).decode(await this.read(path));
  }

  /** The bytes of a file as a stream. */
  async stream(path: string): Promise<ReadableStream<Uint8Array>> {
    return (await this.transport.open("read_file", this.at({ path }))).body!;
  }

  /** Write a file: missing folders are created, and an old file is replaced at once. mode: like 0o755. */
  async write(path: string, data: string | Uint8Array | ReadableStream<Uint8Array>,
    options: { append?: boolean; mode?: number; user?: string } = {}): Promise<FileInfo> {
    const body = typeof data === "string" ? new TextEncoder().encode(data)
      : data instanceof Uint8Array ? new Uint8Array(data) : data;
    const mode = options.mode?.toString(8);
    return this.call("write_file", { path, append: options.append || undefined, mode, user: options.user }, { body });
  }

  async stat(path: string, follow = true): Promise<FileInfo> {
    return this.call("stat_file", { path, follow: follow ? 1 : 0 });
  }

  async exists(path: string): Promise<boolean> {
    try {
      await this.stat(path, false);
      return true;
    } catch (error) {
      if (error instanceof NotFound) return false;
      throw error;
    }
  }

  /** The content of a folder, by name. */
  async list(path: string): Promise<FileInfo[]> {
    const found: FileInfo[] = [];
    let offset: number | null | undefined;
    do {
      const page: FileList = await this.call("list_files", { path, offset });
      found.push(...page.items);
      offset = page.next;
    } while (offset !== null && offset !== undefined);
    return found;
  }

  async remove(path: string, recursive = false): Promise<void> {
    await this.call("remove_file", { path, recursive: recursive || undefined });
  }

  async mkdir(path: string, mode = 0o755): Promise<FileInfo> {
    return this.call("make_dir", {}, { json: { path, parents: true, mode: mode.toString(8) } });
  }

  async move(source: string, target: string): Promise<FileInfo> {
    return this.call("move_file", {}, { json: { source, target } });
  }

  /** A folder as a tar. */
  async pack(path: string): Promise<ReadableStream<Uint8Array>> {
    return (await this.transport.open("download_dir", this.at({ path }))).body!;
  }

  /** Unpack a tar into a folder. */
  async unpack(tar: Uint8Array | ReadableStream<Uint8Array>, path: string): Promise<FileInfo> {
    const body = tar instanceof Uint8Array ? new Uint8Array(tar) : tar;
    return this.call("upload_dir", { path }, { body, contentType: "application/x-tar" });
  }
}
