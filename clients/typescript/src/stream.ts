// The output of a command while it runs: frames of kind (1 byte), length (4 bytes), payload.

import { ServerError, type CommandResponse } from "./generated.js";
import { fromWire } from "./transport.js";

const STDOUT = 1, STDERR = 2, RESULT = 3;
const HEAD = 5;
const LIMIT = 64 * 1024 * 1024;

/** A piece of output. data: the exact bytes. text: the same as UTF-8; a split character is whole in the later chunk. */
export interface Chunk {
  kind: "stdout" | "stderr";
  data: Uint8Array;
  text: string;
}

/** Complete frames of bytes in any portions. */
export class FrameParser {
  private buffer = new Uint8Array(0);

  *feed(data: Uint8Array): Generator<[number, Uint8Array]> {
    const joined = new Uint8Array(this.buffer.length + data.length);
    joined.set(this.buffer);
    joined.set(data, this.buffer.length);
    let start = 0;
    while (joined.length - start >= HEAD) {
      const length = new DataView(joined.buffer, start + 1, 4).getUint32(0);
      if (length > LIMIT) throw new ServerError(`malformed stream: a frame of ${length} bytes`);
      if (joined.length - start - HEAD < length) break;
      yield [joined[start]!, joined.slice(start + HEAD, start + HEAD + length)];
      start += HEAD + length;
    }
    this.buffer = joined.slice(start);
  }
}

/** The output of one command, which starts with the first step of the iteration. result: after its end. The end of the
 * iteration before the end of the output kills the command. */
export class OutputStream implements AsyncIterable<Chunk> {
  result: CommandResponse | null = null;
  private readonly start: (signal: AbortSignal) => Promise<Response>;

  constructor(start: (signal: AbortSignal) => Promise<Response>) {
    this.start = start;
  }

  async *[Symbol.asyncIterator](): AsyncGenerator<Chunk> {
    if (this.result !== null) return;
    const control = new AbortController();
    const response = await this.start(control.signal);
    const reader = response.body!.getReader();
    const parser = new FrameParser();
    const decoders = { stdout: new TextDecoder(), stderr: new TextDecoder() };
    try {
      for (;;) {
        const { done, value } = await reader.read();
        if (done) break;
        for (const [kind, payload] of parser.feed(value)) {
          if (kind === STDOUT || kind === STDERR) {
            const name = kind === STDOUT ? "stdout" : "stderr";
            yield { kind: name, data: payload, text: decoders[name].decode(payload, { stream: true }) };
          } else if (kind === RESULT) {
            this.result = JSON.parse(new TextDecoder().decode(payload)) as CommandResponse;
          } else {
            throw fromWire(JSON.parse(new TextDecoder().decode(payload)));
          }
        }
      }
    } finally {
      if (this.result === null) control.abort();
      await reader.cancel().catch(() => undefined);
    }
    if (this.result === null) throw new ServerError("the stream ended without a result");
  }

  /** Skip the rest of the output and return the result. */
  async wait(): Promise<CommandResponse> {
    for await (const _ of this);
    return this.result!;
  }
}
