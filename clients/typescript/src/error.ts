/** Fields of an error on the wire. */
export interface ErrorFields {
  code?: string;
  sandboxId?: string | null;
  retryable?: boolean;
  hint?: string | null;
  details?: Record<string, unknown>;
}

/** Every error of this client. message: what happened. hint: what to do. Its subclasses are those of Python's client. */
export class RockError extends Error {
  readonly code: string;
  readonly sandboxId: string | null;
  readonly retryable: boolean;
  readonly hint: string | null;
  readonly details: Record<string, unknown>;

  constructor(message: string, fields: ErrorFields = {}, cause?: unknown) {
    super(message, cause === undefined ? undefined : { cause });
    this.name = new.target.name;
    this.code = fields.code ?? "error";
    this.sandboxId = fields.sandboxId ?? null;
    this.retryable = fields.retryable ?? false;
    this.hint = fields.hint ?? null;
    this.details = fields.details ?? {};
  }
}
