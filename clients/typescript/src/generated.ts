// `python tools/typescript_types.py` writes this file from the OpenAPI page of a server and from its errors.

/* eslint-disable */
import { RockError } from "./error.js";

/** Access rights that routes require. A key has those it was given; the server's own key has all. open: no key. read: view, including files and logs. run: act inside sandboxes. create: create, stop, restart, archive and delete them. images: change resources that all tenants share: images and registered environments. admin: keys, workers, and sandboxes without isolation or on the server's own network. worker: join as a worker; cannot be given to a key. */
export type Access = "open" | "read" | "run" | "create" | "images" | "admin" | "worker";

/** Register an environment under a name. source: an id of GEM or Gymnasium, hf://ORG/REPO@COMMIT or image://NAME. packages: those beyond its family's, from wheels; imports: modules that register it. */
export interface AddEnv {
  name: string;
  source: string;
  packages?: string[];
  imports?: string[];
  description?: string;
}

/** Pull mode: the answer of a call: one of `response`, `text` and `error`. response: a response body in `dialect` (default: the dialect of the call); converted for the agent, and sent as a stream when the agent requested one. text: an assistant message that ends the turn. token ids and log probabilities: recorded with the call; log probabilities belong to token_ids. A stream of parts is sent instead with content type application/x-ndjson: each line is one stream event of `dialect` (query ?dialect=) as its SSE data would be, and the end of the body is the end of the response. */
export interface AnswerCall {
  response?: Record<string, unknown> | null;
  dialect?: "openai-chat" | "openai-responses" | "anthropic" | "gemini" | null;
  text?: string | null;
  error?: AnswerError | null;
  prompt_token_ids?: number[] | null;
  token_ids?: number[] | null;
  logprobs?: number[] | null;
  weight_version?: string | null;
}

/** An error as the answer of a call. kind: the kind of the dialect's error; status: replaces its HTTP status. */
export interface AnswerError {
  kind?: "bad_request" | "upstream" | "overloaded" | "timeout";
  message?: string;
  status?: number | null;
}

/** The files that a sandbox wrote, as one layer in the server's archive: `size` in bytes, `digest` "sha256:..." of the tar. image_digest: of the image below it, which a restore requires. */
export interface ArchivedFiles {
  size: number;
  digest: string;
  image_digest: string;
}

/** One call. number: grows with each entry. at: seconds since the epoch. tenant, key_id: of the key; both "" for the server's owner. action: the name of the route in protocol/rows.py, `rock:CALL` and `e2b:CALL` for calls of dialects, or login and logout of the web page. target: the id or name of the changed resource; "" where the call failed before it had one. status: of the HTTP response; 0 where the connection ended first. address: of the client. */
export interface AuditEntry {
  number?: number;
  at: number;
  tenant?: string;
  key_id?: string;
  action: string;
  target?: string;
  status?: number;
  request_id?: string;
  address?: string;
}

/** `next`: the `before` of the next page; None at the end. */
export interface AuditList {
  items: AuditEntry[];
  next?: number | null;
}

/** A command for a session. timeout: seconds, after which the processes of the command are killed and the session stays; None is no limit. check: "raise" makes an exit status other than 0 an error; "silent" and "ignore" only report it. separate: separate stdout and stderr in the observation (pipes only). */
export interface BashAction {
  command: string;
  session?: string;
  timeout?: number | null;
  check?: "raise" | "silent" | "ignore";
  separate?: boolean;
  max_output_bytes?: number;
  action_type?: "bash";
  is_interactive_command?: boolean;
  is_interactive_quit?: boolean;
  error_msg?: string;
  expect?: string[];
}

/** Result of a command in a session. output: stdout and stderr in the order of arrival, or stdout alone when `separate` was set; `stderr` then has the rest. exit_code: the exit status; None is unknown. failure_reason: a sentence when the command did not end normally. dropped_bytes: bytes that the limit removed from the middle. session_closed: the shell has ended. */
export interface BashObservation {
  output?: string;
  exit_code?: number | null;
  failure_reason?: string;
  expect_string?: string;
  stderr?: string;
  timed_out?: boolean;
  interrupted?: boolean;
  session_closed?: boolean;
  session_restarted?: boolean;
  dropped_bytes?: number;
  output_b64?: string | null;
  stderr_b64?: string | null;
  duration?: number;
  session_type?: "bash";
}

/** A heartbeat: the worker's epoch and its resources. */
export interface Beat {
  holder: string;
  epoch: number;
  status: NodeStatus;
}

/** Renew leases. trials: the token by number. */
export interface BeatTrials {
  holder: string;
  trials: Record<string, number>;
  lease?: number;
}

/** lost: trials that the runner no longer has: it must stop to run them. */
export interface BeatenTrials {
  lost: number[];
  cancelling?: boolean;
}

/** Limits of a run; None is no limit. Each call is checked before it begins, so the last call may exceed a limit. calls: answered and running calls; retries are not counted again. tokens: prompt and completion. seconds: since the creation of the run; running calls are cancelled then. cost: in the currency of the prices. */
export interface Budget {
  calls?: number | null;
  tokens?: number | null;
  seconds?: number | null;
  cost?: number | null;
}

/** Install the packages of an environment in advance. packages: in addition to its registered ones. */
export interface BuildEnv {
  env_id: string;
  packages?: string[];
}

/** Call another method of an environment: `what`, and its arguments. */
export interface CallEnv {
  what: string;
  arguments?: unknown[];
}

/** A recorded call. number: from 1 in the order of arrival. parent: the call whose messages this one continues. request, response: bodies in `dialect`, the dialect of the agent; left out of lists unless bodies=1. model: as the agent requested it. upstream_model: as it was sent. retries: requests that joined this call; retry_of: the broken call that this one repeats. first_byte: of the response. token ids and log probabilities: where the upstream sends them, one log probability for each entry of token_ids. */
export interface CallInfo {
  number: number;
  parent?: number | null;
  dialect: "openai-chat" | "openai-responses" | "anthropic" | "gemini";
  state: "running" | "waiting" | "done" | "failed" | "cancelled";
  stream?: boolean;
  model?: string;
  upstream_model?: string | null;
  finish_reason?: string | null;
  usage?: CallUsage;
  cost?: number;
  started: number;
  first_byte?: number | null;
  ended?: number | null;
  weight_version?: string | null;
  error?: string | null;
  error_kind?: string | null;
  attempts?: number;
  retries?: number;
  retry_of?: number | null;
  request?: Record<string, unknown> | null;
  response?: Record<string, unknown> | null;
  prompt_token_ids?: number[] | null;
  token_ids?: number[] | null;
  logprobs?: number[] | null;
}

/** after: argument for the next page; None on the last one. */
export interface CallList {
  items: CallInfo[];
  after?: number | null;
}

export interface CallResult {
  result?: unknown;
}

/** Tokens of one call. prompt includes cached; completion includes reasoning. */
export interface CallUsage {
  prompt?: number;
  completion?: number;
  cached?: number;
  reasoning?: number;
}

/** Why a sandbox no longer runs; its record stores it. */
export type Cause = "stopped_by_user" | "idle" | "deadline" | "out_of_memory" | "disk_full" | "start_failed" | "exited" | "lost" | "drained";

/** A request for a snapshot of a running sandbox. memory: what is taken beside the files; a named level is refused where it is not possible, "auto" is the best level that is possible, which the response states. files: how files are taken; "auto" is "switch" where that is possible, else "copy". name: unique among the tenant's snapshots. wait: seconds to wait for running commands; then it is a Conflict. ttl_seconds: retention after the last use; None is the server's default. */
export interface CheckpointRequest {
  memory?: "auto" | "files" | "session" | "processes";
  files?: "auto" | "switch" | "copy";
  name?: string | null;
  wait?: number;
  ttl_seconds?: number | null;
}

/** New mode of paths inside, in octal. */
export interface ChmodRequest {
  paths: string[];
  mode?: string;
  recursive?: boolean;
}

export interface ChmodResponse {
  success?: boolean;
  message?: string;
}

/** New owner of paths inside. */
export interface ChownRequest {
  remote_user: string;
  paths: string[];
  recursive?: boolean;
}

export interface ChownResponse {
  success?: boolean;
  message?: string;
}

/** Lease trials to a runner. holder: its random name. lease: seconds until a heartbeat is due. take_over: also trials whose lease of another runner has not ended. */
export interface ClaimTrials {
  holder: string;
  count?: number;
  lease?: number;
  take_over?: boolean;
}

/** items: leased trials. left: trials of the job without a final state, counted up to 2,000. wait: seconds until another trial may be leased; None when there is none. */
export interface ClaimedTrials {
  items: TrialInfo[];
  left: number;
  wait?: number | null;
  cancelling?: boolean;
}

export interface CloseBashSessionResponse {
  session_type?: "bash";
}

/** A one-shot program, independent of sessions. command: a list is an argv without a shell; a string is run by the image's shell. timeout: seconds, after which the whole process tree is killed; None is no limit. env: added to the sandbox's environment. cwd, user: None is the image's. stdin: text for its standard input; without it /dev/null. stdin_base64: the same for bytes, in base64. max_output_bytes: limit of stdout and of stderr each; the head and the tail are retained and the rest is counted. entrypoint: prefix the words of `command`, a list, with the image's ENTRYPOINT; an empty list runs the image's CMD. */
export interface Command {
  command: string | string[];
  entrypoint?: boolean;
  timeout?: number | null;
  env?: Record<string, string> | null;
  cwd?: string | null;
  user?: string | null;
  stdin?: string | null;
  stdin_base64?: string | null;
  max_output_bytes?: number;
  session_type?: "bash";
  shell?: boolean | null;
  check?: boolean;
  error_msg?: string;
}

/** Result of a one-shot command. exit_code None: unknown. `stdout_b64`: the exact bytes when they are not UTF-8. */
export interface CommandResponse {
  stdout?: string;
  stderr?: string;
  exit_code?: number | null;
  signal?: number | null;
  timed_out?: boolean;
  failure_reason?: string;
  stdout_dropped?: number;
  stderr_dropped?: number;
  stdout_b64?: string | null;
  stderr_b64?: string | null;
  duration?: number;
}

/** Why a commit failed, in ROCK's terms. */
export type CommitError = "SANDBOX_NOT_FOUND" | "WORKER_NOT_FOUND" | "WORKER_UNREACHABLE" | "SANDBOX_CONTAINER_NOT_FOUND" | "COMMIT_CONFLICT" | "DISPATCH_FAILED" | "LOGIN_FAILED" | "COMMIT_FAILED" | "PUSH_FAILED" | "PROCESS_LOST" | "STATUS_NOT_FOUND";

/** The progress of a commit. */
export type CommitPhase = "RUNNING" | "SUCCEEDED" | "FAILED";

/** Make an image of a sandbox: `image_tag` is its name. `push`: to the registry in that name, with this login, which is not stored. public_registries: see SandboxConfig. */
export interface CommitRequest {
  image_tag: string;
  registry_username?: string | null;
  registry_password?: string | null;
  push?: boolean;
  public_registries?: boolean;
}

/** The commit of a sandbox to an image, in progress or ended. Times are seconds since the epoch. image_digest: of the image here; pushed_digest: of its manifest in the registry. failed_stage: login, commit, push, or dispatch, before a worker had it; error: the exception, in wire format. */
export interface CommitStatus {
  sandbox_id: string;
  image_tag: string;
  push?: boolean;
  phase: CommitPhase;
  started_at: number;
  completed_at?: number | null;
  image_digest?: string | null;
  pushed_digest?: string | null;
  failed_stage?: string | null;
  error_code?: CommitError | null;
  error?: Record<string, unknown> | null;
}

/** A whole live configuration; an omitted part has its default. features: False rejects new operations of it. */
export interface Configuration {
  quotas?: QuotaRules;
  images?: ImageRules;
  pools?: PoolRules;
  templates?: TemplateRules;
  networks?: NetworkRules;
  log?: LogRules;
  metrics?: MetricRules;
  features?: Record<string, boolean>;
}

/** Versions, newest first. */
export interface ConfigurationHistory {
  items: ConfigurationVersion[];
}

/** The configuration that a server applies. source: where it is changed. error: why the source's newest content is not applied. workers: as the responding server knows them. */
export interface ConfigurationStatus {
  version?: number;
  at?: number | null;
  source?: string;
  writable?: boolean;
  error?: string;
  configuration?: Configuration;
  workers?: WorkerConfiguration[];
}

/** A version in the history. at: seconds since the epoch. source: the file, the Nacos entry, or "api". author: the tenant and the id of the key, of a change over the API. */
export interface ConfigurationVersion {
  version: number;
  at: number;
  source: string;
  author?: string;
  configuration: Configuration;
}

/** One connection, or one rejected DNS query. Times are seconds since the epoch. number: counts up from 1. protocol: "tls" or "http" where a name was detected, "dns", else "tcp". host: the name, as sent by the client or as last resolved by DNS. address, port: the requested destination. allowed: whether the policy allowed it; reason: why it was rejected, or why it failed or broke. sent, received: bytes, as seen by the sandbox. ended_at: None while it is open. */
export interface Connection {
  number: number;
  at: number;
  ended_at?: number | null;
  protocol?: string;
  host?: string | null;
  address?: string;
  port?: number;
  allowed?: boolean;
  reason?: string | null;
  sent?: number;
  received?: number;
}

/** The last connections of a sandbox, oldest first. total: number of all; dropped: number of those no longer stored. */
export interface ConnectionList {
  items?: Connection[];
  total?: number;
  dropped?: number;
}

/** Calls of a run by state, and their usage. retried: requests that joined a recorded call. refused: by the budget or after the end. */
export interface Counts {
  calls?: number;
  running?: number;
  waiting?: number;
  done?: number;
  failed?: number;
  cancelled?: number;
  retried?: number;
  refused?: number;
  prompt_tokens?: number;
  cached_tokens?: number;
  completion_tokens?: number;
  cost?: number;
}

/** A session to open. bash reads its user's ~/.bashrc first, as in a terminal, except in the default session, which exists without being created. startup_source: files that the shell sources first, as in `. FILE`; a missing one is an error. env_enable: ROCK's switch for `env`; a given `env` is used in any case. remote_user: user inside. pty: (rows, columns) of a real terminal; None is pipes. shell: "bash", "sh" or a path; None is bash, or sh where there is no bash. */
export interface CreateBashSessionRequest {
  session?: string;
  startup_source?: string[];
  env_enable?: boolean;
  env?: Record<string, string> | null;
  cwd?: string | null;
  remote_user?: string | null;
  pty?: [number, number] | null;
  shell?: string | null;
  session_type?: "bash";
  startup_timeout?: number;
  max_read_size?: number;
}

/** `output`: the output of the start-up files. */
export interface CreateBashSessionResponse {
  output?: string;
  session_type?: "bash";
}

/** A request for a key. tenant: the tenant of the key; a new tenant when omitted. Several keys of a tenant see the same sandboxes. */
export interface CreateKey {
  name: string;
  tenant?: string | null;
  scopes?: Access[];
  quota?: Quota;
}

/** A request for a volume. name: unique among the volumes of the tenant. size: limit of its files, like 10g; it is measured every few seconds. worker: the worker that has it; None lets the server choose. */
export interface CreateVolume {
  name: string;
  size?: string;
  worker?: string | null;
}

/** Where a client sends requests of the data plane of one sandbox. url: of its worker; "" for one on the machine of the server: path is its Unix socket, for clients of the same user on that machine, and port its port, 0 for none. token: sent as `Authorization: Bearer TOKEN`. proof: the header X-ROCK-Direct of each response, by which a client recognizes the worker. seconds: for which the token is valid. */
export interface DirectAccess {
  url?: string;
  path?: string;
  port?: number;
  token: string;
  proof: string;
  seconds: number;
}

/** The address at which a client on the server's own machine may borrow the pipes of an environment (rocklet/environments/local_socket.py). */
export interface Door {
  path: string;
  token: string;
}

/** The end of a run. Running calls are cancelled, and later calls are refused. reward, rewards: one number, or several by name. valid: False when an infrastructure error prevented a reward, which is then None, never 0. reason: why it ended, for people. */
export interface EndRun {
  reward?: number | null;
  rewards?: Record<string, number>;
  valid?: boolean;
  reason?: string | null;
}

/** Description of an environment. version: of a registered one, else None; it changes with the source, package set or digest. requirements: pip requirements; asked: those of them that were registered with it; packages: the installed packages, as "name version". digest: of the image, or of the layer with the packages; None until it exists (is_ready). */
export interface EnvAbout {
  id: string;
  source: string;
  protocol: "gem" | "gym" | "task";
  image: string;
  requirements?: string[];
  asked?: string[];
  imports?: string[];
  is_ready?: boolean;
  digest?: string | null;
  packages?: string[];
  aliases?: string[];
  note?: string;
  version?: number | null;
  versions?: (Record<string, unknown>)[];
}

/** An environment that was made: `env` is its number in the sandbox. With `begin`, also the response of its reset. lease: with an owner, seconds within which the owner has to renew its lease. */
export interface EnvInfo {
  env: number;
  env_id?: string;
  sandbox_id?: string;
  door?: Door | null;
  lease?: number | null;
  observation?: unknown;
  info?: Record<string, unknown>;
}

export interface EnvList {
  items: (Record<string, unknown>)[];
}

/** Number of environments of a sandbox that a client process owns; after a renewal with 0 there is nothing to renew. */
export interface EnvOwner {
  owner: string;
  environments: number;
}

/** One file inside. */
export interface FileInfo {
  name: string;
  path: string;
  kind: "file" | "directory" | "symlink" | "fifo" | "socket" | "device";
  size: number;
  mode: number;
  uid: number;
  gid: number;
  mtime: number;
  target?: string | null;
}

/** `next`: the offset of the next page; None at the end. */
export interface FileList {
  items: FileInfo[];
  next?: number | null;
}

/** The end of a try. outcome "retry": the trial becomes pending again, not before `delay` seconds; "release": the same without counting a try. rewards: finite numbers by name, only with "completed". */
export interface FinishTrial {
  token: number;
  outcome: "completed" | "failed" | "cancelled" | "retry" | "release";
  rewards?: Record<string, number> | null;
  error?: TrialError | null;
  result?: Record<string, unknown>;
  delay?: number;
}

/** Fork an environment: `count` copies of its process, which continue as it would. reseed: draw new seeds in each. names, idle, owner: of the children, as in MakeEnv; as many names as children. */
export interface ForkEnv {
  count?: number;
  reseed?: boolean;
  names?: string[] | null;
  idle?: number | null;
  owner?: string | null;
}

/** A checkpoint, and `count` sandboxes that start from it with the config of the original. start: seconds to wait for the starts. changes: fields of SandboxConfig that differ in the children, such as env, labels, auto_clear_seconds; image, runtime and volumes cannot differ. best_effort: start as many as fit, as in a group. */
export interface ForkRequest {
  memory?: "auto" | "files" | "session" | "processes";
  files?: "auto" | "switch" | "copy";
  name?: string | null;
  wait?: number;
  ttl_seconds?: number | null;
  count?: number;
  start?: number;
  changes?: Record<string, unknown>;
  best_effort?: boolean;
}

/** The snapshot of a fork, and its children. */
export interface ForkResult {
  snapshot: SnapshotInfo;
  group: GroupInfo;
}

/** What a checkpoint with memory="auto" would take at this moment. memory: the level. reasons: against a better one, each with the process, the descriptor and what it is. */
export interface Forkable {
  memory?: "files" | "session" | "processes";
  reasons?: string[];
}

/** A child of a fork, or `error`: why this one could not be started; `env` is 0 then. */
export interface ForkedEnv {
  env: number;
  env_id?: string;
  sandbox_id?: string;
  door?: Door | null;
  lease?: number | null;
  observation?: unknown;
  info?: Record<string, unknown>;
  error?: Record<string, unknown> | null;
}

/** The children of a fork, in the order of the names. At least one was started. */
export interface ForkedEnvs {
  items?: ForkedEnv[];
}

/** The loopback port of a sandbox. port: None lets the worker choose. */
export interface GatewayPort {
  port?: number | null;
}

export interface GatewayPortInfo {
  port: number;
  connections?: number;
}

/** A group, its sandboxes in order, without their histories. missing: number of sandboxes that best effort did not start; error: the reason, in wire format, only in the response to the request. */
export interface GroupInfo {
  group_id: string;
  sandboxes: SandboxInfo[];
  missing?: number;
  error?: Record<string, unknown> | null;
}

/** `size` sandboxes of one config. Its `sandbox_id`, if set, is the group's id, else the server chooses one; the sandboxes are named after it: ID-0, ID-1, ... mode: "gang" is all or none: the started ones are stopped when one cannot start. "best_effort" starts as many as capacity and quota allow. placement: "spread" places few on each worker, "pack" uses few workers. */
export interface GroupRequest {
  config: SandboxConfig;
  size: number;
  mode?: "gang" | "best_effort";
  placement?: "spread" | "pack";
}

export interface HTTPValidationError {
  detail?: ValidationError[];
}

/** A folder of the worker in a sandbox, always read-only. source: an absolute path in a folder of ROCK_HOST_MOUNTS, without symbolic links. target: as of VolumeMount. */
export interface HostMount {
  source: string;
  target: string;
}

/** rewrite: the first rule that matches applies. mirrors: by registry, tried first. insecure_registries: contacted without TLS. private_registries: on private addresses, for tenants. All are added to the settings of a server. */
export interface ImageRules {
  rewrite?: RewriteRule[];
  mirrors?: Record<string, string[]>;
  insecure_registries?: string[];
  private_registries?: string[];
}

/** Isolation level of a sandbox, weakest first. All but the last two share the host's kernel. */
export type Isolation = "none" | "landlock" | "userns-shared-proc" | "userns" | "namespaces" | "container" | "gvisor" | "microvm";

/** Number of trials by state. */
export interface JobCounts {
  pending?: number;
  running?: number;
  completed?: number;
  failed?: number;
  cancelled?: number;
}

/** A job with its configuration and its tasks. A trial refers to a task by its index in `task_list`. */
export interface JobDetail {
  job_id: string;
  name: string;
  state: JobState;
  tenant?: string;
  labels?: Record<string, string>;
  tasks: number;
  attempts: number;
  trials: number;
  counts: JobCounts;
  valid?: number;
  mean_reward?: number | null;
  cancelling?: boolean;
  created_at: number;
  started_at?: number | null;
  finished_at?: number | null;
  config?: Record<string, unknown>;
  task_list?: JobTask[];
}

/** A job. mean_reward: over trials with a valid reward; None without one. valid: number of those trials. cancelling: a cancellation was requested, and trials still run. */
export interface JobInfo {
  job_id: string;
  name: string;
  state: JobState;
  tenant?: string;
  labels?: Record<string, string>;
  tasks: number;
  attempts: number;
  trials: number;
  counts: JobCounts;
  valid?: number;
  mean_reward?: number | null;
  cancelling?: boolean;
  created_at: number;
  started_at?: number | null;
  finished_at?: number | null;
}

export interface JobList {
  items: JobInfo[];
}

/** pending: no trial was claimed. failed: final, and at least one trial has failed. */
export type JobState = "pending" | "running" | "completed" | "failed" | "cancelled";

/** A task of a job. name: unique in the job. spec: what the runner needs to run it. */
export interface JobTask {
  name: string;
  spec?: Record<string, unknown>;
}

/** A request of a rocklet to become a worker. url: where servers reach it; tunnel://NAME for one that opens tunnels to them; process://SECRET for a process that the server has started. holder: a random text that it stores in its home: the identity of the machine, independent of its name. epoch: the last that it had; 0 for none. fresh: it has given up that epoch, and has no sandboxes of it. */
export interface JoinWorker {
  name: string;
  url: string;
  holder: string;
  epoch?: number;
  fresh?: boolean;
  version?: string;
  status: NodeStatus;
}

/** A key as the server stores it. Times are seconds since the epoch. */
export interface KeyInfo {
  id: string;
  name: string;
  tenant: string;
  scopes: Access[];
  quota: Quota;
  created_at: number;
  revoked_at?: number | null;
}

export interface KeyList {
  items: KeyInfo[];
}

/** level: of every process of the server; None is its ROCK_LOG_LEVEL. */
export interface LogRules {
  level?: "debug" | "info" | "warning" | "error" | null;
}

/** kwargs: arguments of the environment's constructor. timeout: seconds for one reset, step or call, after which it is killed. imports: modules that are imported before, and may register it. For Gymnasium: num_envs makes a vector of them in one process, vectorization_mode and vector_kwargs are those of gymnasium.make_vec. folder: a folder inside with an env.py whose make_env makes the environment, "." for the image's working directory or /app; root: a folder inside from which that may import; task: "suite" or "suite/task". agents: the interface of an environment of several agents (PettingZoo), whose env_id is a module or a make_env. name: an alternative identifier, "name:NAME" instead of the number; a name in use is a Conflict. idle: seconds without a request after which it is closed. begin: reset it too, and include the response of the reset. owner: id of the client process that makes it. The environment is released when that process has not renewed its lease for `EnvInfo.lease` seconds; without an owner it lives as long as its sandbox, or until its idle timeout. */
export interface MakeEnv {
  env_id: string;
  protocol?: "gem" | "gym" | "task";
  kwargs?: Record<string, unknown>;
  imports?: string[];
  num_envs?: number | null;
  vectorization_mode?: string | null;
  vector_kwargs?: Record<string, unknown> | null;
  agents?: "parallel" | "aec" | null;
  folder?: string | null;
  root?: string | null;
  timeout?: number | null;
  task?: string | null;
  name?: string | null;
  idle?: number | null;
  begin?: boolean;
  owner?: string | null;
}

/** tags: what the metrics rock_tagged_* are counted by: tenant, experiment, user, image, worker, or label.NAME. */
export interface MetricRules {
  tags?: string[];
}

/** allowed: networks that keys without the scope admin may request; None is both. */
export interface NetworkRules {
  allowed?: ("none" | "nat")[] | null;
}

/** `key` is returned only once. */
export interface NewKey {
  id: string;
  name: string;
  tenant: string;
  scopes: Access[];
  quota: Quota;
  created_at: number;
  revoked_at?: number | null;
  key: string;
}

/** Pull mode: the next call without an answer. call: None when none arrived within `wait`, or the run has ended. */
export interface NextCall {
  state: "active" | "ended";
  call?: CallInfo | null;
  waiting?: number;
}

/** Resources of a worker: cores, total and free bytes of memory, current and maximum number of sandboxes. load: programs that run or wait for a core, averaged over the last minute. images: names of some images on its disk, the last used first. memory_pressure: percent of the last ten seconds in which a process waited for memory; None where the kernel does not report it. accelerators: kinds of its `gpus`. fetching: progress of the images that sandboxes wait for, by name. evacuate: this machine will end, and its sandboxes are to be archived. direct_port: of a process of the server's machine, for direct requests. */
export interface NodeStatus {
  host_name: string;
  host_ip: string;
  runtime: string;
  isolation: Isolation;
  enforced?: Record<string, string>;
  cpus: number;
  memory_total: number;
  memory_free: number;
  sandboxes: number;
  sandbox_limit: number;
  boot?: string;
  load?: number;
  images?: string[];
  fetching?: Record<string, string>;
  memory_pressure?: number | null;
  gpus?: number;
  gpus_free?: number;
  accelerators?: string[];
  evacuate?: boolean;
  direct_port?: number;
}

/** A request for a sandbox that can host `env_id`. Environments of one package set share a sandbox, with one process each; `exclusive` requests a sandbox of its own. `config`: limits and image, when the defaults do not fit. protocol: the family of the environment: GEM, Gymnasium, or a task of the training set `env_id`. packages: additional packages, as pip names them; wheels only. image: host it with the Python of this image, which has gymnasium; no packages are installed then. */
export interface OpenEnv {
  env_id: string;
  protocol?: "gem" | "gym" | "task";
  packages?: string[];
  image?: string | null;
  exclusive?: boolean;
  config?: SandboxConfig | null;
}

/** A phase of a start: `status` is waiting, running, success, failed or timeout. */
export interface Phase {
  status?: "waiting" | "running" | "success" | "failed" | "timeout";
  message?: string;
  started_at?: number | null;
  completed_at?: number | null;
}

/** Warm pods of a template, where each sandbox is a pod. size: of those that no sandbox has claimed. A sandbox of the same template, image and GPUs with at most these cpus and memory, and without a disk limit, claims one. */
export interface PodPool {
  template?: string;
  image: string;
  cpus?: number;
  memory?: string;
  num_gpus?: number | null;
  accelerator_type?: string | null;
  size: number;
}

/** A pool, and its state on all workers together. ready: unclaimed sandboxes. target: the number that there should be. hits, misses: creates that got one, and that did not, since the pool was defined or its worker started. hit_rate: None without a claim. errors: why sandboxes were not made, by worker. snapshot: its id. */
export interface PoolInfo {
  name: string;
  tenant?: string;
  image?: string;
  snapshot?: string | null;
  memory?: string;
  network?: string;
  minimum?: number;
  maximum?: number;
  created_at?: number;
  ready?: number;
  target?: number;
  hits?: number;
  misses?: number;
  hit_rate?: number | null;
  errors?: Record<string, string>;
}

export interface PoolList {
  items: PoolInfo[];
}

/** size: warm sandboxes for each recently used image, on each worker; None is the worker's ROCK_POOL_SIZE. budget: most unclaimed sandboxes of all defined pools together, on each worker. pods: of servers whose sandboxes are pods. */
export interface PoolRules {
  size?: number | null;
  budget?: number;
  pods?: PodPool[];
}

/** Prices in any currency for a million tokens. cached: for cached prompt tokens; None is the price of `prompt`. */
export interface Price {
  prompt?: number;
  completion?: number;
  cached?: number | null;
}

/** A background process. exit_code: None while `running`, or when its end was not observed. stdout_size, stderr_size: bytes written so far: the offset at which its logs end. */
export interface ProcessInfo {
  process_id: string;
  pid?: number;
  command?: string | string[];
  running?: boolean;
  exit_code?: number | null;
  signal?: number | null;
  started_at?: number;
  ended_at?: number | null;
  stdout_size?: number;
  stderr_size?: number;
}

export interface ProcessList {
  items: ProcessInfo[];
}

/** Limits of a tenant for all its sandboxes that start, run or stop at the same time; None: no limit. creates_per_minute: starts, including restarts, within any 60 seconds. */
export interface Quota {
  sandboxes?: number | null;
  cpus?: number | null;
  memory?: string | null;
  creates_per_minute?: number | null;
}

/** default: of tenants whose keys have no quota. tenants: replaces the quota of all keys of a tenant. */
export interface QuotaRules {
  default?: Quota | null;
  tenants?: Record<string, unknown>;
}

/** Entries in order. next: pass it as `after`; None at the end. */
export interface RecordedEntries {
  items: RecordedEntry[];
  next?: number | null;
}

/** A request and its response. number: from 1, in the order in which the requests began. route: name in the route table. target: path and query. finished_at: None if the response is unknown. request, response: base64; None if they were larger than the limit. request_bytes, response_bytes: their sizes. snapshot: of a checkpoint or a rollback. exact: of a checkpoint, whether no request was in progress, so that the snapshot has the effects of all entries before it and of no later one. memory: the level of the snapshot. */
export interface RecordedEntry {
  number: number;
  at: number;
  finished_at?: number | null;
  route: string;
  method?: string;
  target?: string;
  request?: string | null;
  request_type?: string;
  request_bytes?: number;
  status?: number | null;
  response?: string | null;
  response_type?: string;
  response_bytes?: number;
  snapshot?: string | null;
  exact?: boolean;
  memory?: string;
}

/** The recording of a sandbox. full: it reached its limit, and later requests are not in it. source: the sandbox of the snapshot from which this one started. repeats, repeated: the recording that answers its clients, and how many entries have. diverged_at: entry of `repeats` that a client did not repeat; the requests from there on are executed. */
export interface RecordingInfo {
  sandbox_id: string;
  config: SandboxConfig;
  state?: string;
  entries?: number;
  bytes?: number;
  full?: boolean;
  source?: string | null;
  repeats?: string | null;
  repeated?: number;
  diverged_at?: number | null;
}

/** Answer the clients of a sandbox with the entries of a recording, as long as they repeat its requests in order. */
export interface RepeatRecording {
  source: string;
}

/** Recorded responses as the source. Exactly one of `run` and `records`. run: id of a recorded run of the same tenant. records: objects {"request": ..., "response": ...} of bodies in `dialect`, as ROCK's trajectory files have them. by: "order" gives the n-th call the n-th recorded response; "prefix" gives the response of the recorded call with the same messages, also for parallel calls. A call without a recorded response fails. */
export interface Replay {
  run?: string | null;
  records?: (Record<string, unknown>)[] | null;
  dialect?: "openai-chat" | "openai-responses" | "anthropic" | "gemini";
  by?: "order" | "prefix";
}

export interface ResetEnv {
  seed?: number | null;
  options?: Record<string, unknown> | null;
}

export interface ResetResult {
  observation?: unknown;
  info?: Record<string, unknown>;
}

/** Images whose full name begins with `match` get `replace` in its place. The full name of "python:3.11" is "docker.io/library/python:3.11". */
export interface RewriteRule {
  match: string;
  replace: string;
}

/** snapshot: id or name of a snapshot of the tenant, on the worker of the sandbox. */
export interface RollbackRequest {
  snapshot: string;
}

/** A run. base_url: the address for the agent, without "/v1". api_key and environ: in the response of the creation only; environ has the variables of common agents. reward: None without one. reward_valid: False when an infrastructure error prevented a reward. incomplete: a call was interrupted or could not be recorded; do not train on the run. */
export interface RunInfo {
  id: string;
  state: "active" | "ended";
  source: "upstream" | "pull" | "replay";
  sandbox?: string | null;
  base_url: string;
  api_key?: string | null;
  environ?: Record<string, string>;
  upstream?: string | null;
  model?: string | null;
  counts?: Counts;
  budget?: Budget;
  left?: Budget;
  reward?: number | null;
  rewards?: Record<string, number>;
  reward_valid?: boolean | null;
  reason?: string | null;
  incomplete?: boolean;
  tags?: Record<string, string>;
  name?: string | null;
  tenant?: string;
  weight_version?: string | null;
  created_at?: number;
  ended_at?: number | null;
  last_call_at?: number | null;
}

/** after: argument for the next page; None on the last one. */
export interface RunList {
  items: RunInfo[];
  after?: string | null;
}

/** A new run. Exactly one of `upstream`, `pull` and `replay` is the source of responses. sandbox: id of the sandbox of the agent: a loopback port inside is opened, and closed with the run. Without it the agent uses the address of the server. port: the loopback port inside; None lets the server choose, and runs of one sandbox share a port. upstream: name of an upstream of the tenant, or of the server's owner. pull: the client that created the run answers the calls. pull_timeout: seconds that a call waits for its answer. model: replaces the model of every call. models: replacements by name; "*" is all others. sampling: fields that replace those of each request, in the names of the internal form: temperature, top_p, top_k, max_tokens, stop, seed, presence_penalty, frequency_penalty; None removes the field of the agent. prices: instead of those of the upstream. tags: for queries. name: for people. weight_version: recorded with each call. */
export interface RunSpec {
  sandbox?: string | null;
  port?: number | null;
  upstream?: string | null;
  pull?: boolean;
  pull_timeout?: number;
  replay?: Replay | null;
  model?: string | null;
  models?: Record<string, string>;
  sampling?: Record<string, unknown>;
  budget?: Budget;
  prices?: Record<string, Price> | null;
  tags?: Record<string, string>;
  name?: string | null;
  weight_version?: string | null;
}

/** The configuration of a new sandbox; the wire format has the same fields. image: "host" (this machine's own system, read-only) or the name of an image in the server's store. memory, cpus: limits; they may be overcommitted. limit_cpus: a hard limit, when cpus is only the usual share. pids: maximum number of processes and threads. disk: size limit of written files; None is no limit. inodes: maximum number of files, with a disk limit; None is one per 16 KiB of it. nofile: maximum number of open files of a process. shm_size: size of /dev/shm, at most half of the memory; None is up to a quarter. auto_clear_seconds: idle timeout after which it is stopped; 0 is never. A sandbox is idle when no request is in progress: a background process alone does not keep it alive. timeout: seconds from its start after which it is stopped in any case; None is never. on_timeout: None stops it at that time, "pause" pauses it, as soon as no request is in progress, and a paused sandbox has no timeout. auto_pause: seconds without a request after which its processes are stopped, until the next request. Its idle timeout continues meanwhile. auto_delete_seconds: retention of the files of a stopped sandbox, for a restart or archiving: seconds from its stop. With None and 0 the files are deleted when it stops. auto_archive_seconds: retain the files too, and move them to the server's archive so many seconds after the stop. Excludes auto_delete_seconds. startup_timeout: seconds that a start may take. network: "none" (its own, with loopback), "nat" (public addresses, by TCP), "host" or, for runtime "docker" alone, "bridge" (the engine's own network, which reaches all destinations of that machine). egress: the only allowed destinations, as in protocol/egress.py: "example.com", "*.example.org:443", "203.0.113.0/24:22", "*". None is every public address. It requires network "nat", which it implies. runtime: name of the runtime; None is the server's default. oci_runtime: the OCI runtime of a container, for runtime "docker" alone; use_kata_runtime is "kata". isolation: exactly this level; where no runtime is named, it selects the one that provides it. minimum_isolation: reject a start with a weaker level. env: environment of all programs inside. labels: the user's own key-value pairs, for filtering lists. public_registries: pull only from public addresses, and from registries that the owner of the server has listed; set for each tenant. volumes, mounts: see VolumeMount and HostMount. They are not retained, archived or committed with the sandbox. snapshot: id or name of a snapshot from which it starts; its image is the snapshot's. The server replaces a name by the id. snapshot_worker: set by the server. record: record all requests that change it, with their results. agents: names of recipes whose programs are mounted read-only at /opt/rock/agents/NAME; the worker installs missing ones (docs/guides/agents.md). name: a name for people, of up to 63 letters, digits and "_.-". It is unique among the tenant's sandboxes that are pending, running or stopping (else Conflict), and free again afterwards. sandbox_id: an id of your own choice; an id in use is a Conflict, also after the end of its sandbox. */
export interface SandboxConfig {
  base_url?: string;
  api_key?: string | null;
  xrl_authorization?: string | null;
  extra_headers?: Record<string, string>;
  reconnect_timeout?: number | null;
  image?: string;
  image_os?: string;
  memory?: string;
  cpus?: number;
  limit_cpus?: number | null;
  pids?: number;
  disk?: string | null;
  inodes?: number | null;
  nofile?: number | null;
  shm_size?: string | null;
  auto_clear_seconds?: number;
  auto_archive_seconds?: number | null;
  auto_delete_seconds?: number | null;
  timeout?: number | null;
  on_timeout?: "pause" | null;
  auto_pause?: number | null;
  startup_timeout?: number;
  network?: "none" | "nat" | "bridge" | "host";
  egress?: string[] | null;
  volumes?: VolumeMount[] | null;
  mounts?: HostMount[] | null;
  agents?: string[] | null;
  snapshot?: string | null;
  snapshot_worker?: string | null;
  record?: boolean | null;
  runtime?: string | null;
  isolation?: Isolation | null;
  minimum_isolation?: Isolation;
  env?: Record<string, string>;
  labels?: Record<string, string>;
  user_id?: string | null;
  experiment_id?: string | null;
  namespace?: string | null;
  cluster?: string;
  route_key?: string | null;
  pull?: "missing" | "always" | "never";
  registry_username?: string | null;
  registry_password?: string | null;
  public_registries?: boolean;
  use_kata_runtime?: boolean;
  oci_runtime?: "runc" | "runsc" | "kata" | null;
  num_gpus?: number | null;
  accelerator_type?: string | null;
  sandbox_id?: string | null;
  name?: string | null;
}

/** A sandbox as the server sees it. Times are seconds since the epoch, UTC. enforced: how each limit is enforced on this host ("cgroup-v1", "cgroup-v2", "watched", "affinity", "rlimit", "none"). cause, reason: why it no longer runs, as an enum value and as a sentence. paused_at: time of the pause, while it is paused. kept: it is stopped, and its files are on its worker: it can be restarted. archive: the files are in the archive. commit: the last commit of it to an image. deadline: the time of its stop, where an update has replaced the timeout of its config; 0 is never. auto_stop_at, auto_archive_at, auto_delete_at: times of the automatic actions, as of now. tenant: of the key that made it; "" is the server's owner. group: the group that it was created with; gang: all of that group start, or none. state_history: the last 100 state changes, oldest first; lists omit it by default. */
export interface SandboxInfo {
  sandbox_id: string;
  name?: string | null;
  state: State;
  image: string;
  version?: number;
  is_alive?: boolean;
  cause?: Cause | null;
  reason?: string | null;
  exit_code?: number | null;
  isolation?: Isolation | null;
  enforced?: Record<string, string>;
  runtime?: string | null;
  worker?: string | null;
  host_name?: string | null;
  host_ip?: string | null;
  memory?: string;
  cpus?: number;
  network?: string;
  egress?: string[] | null;
  phases?: Record<string, Phase>;
  user_id?: string | null;
  experiment_id?: string | null;
  namespace?: string | null;
  cluster?: string | null;
  labels?: Record<string, string>;
  created_at?: number;
  started_at?: number | null;
  paused_at?: number | null;
  stopped_at?: number | null;
  last_activity_at?: number | null;
  deadline?: number | null;
  auto_stop_at?: number | null;
  auto_archive_at?: number | null;
  auto_delete_at?: number | null;
  archived_at?: number | null;
  deleted_at?: number | null;
  kept?: boolean;
  archive?: ArchivedFiles | null;
  commit?: CommitStatus | null;
  state_history?: StateChange[];
  usage?: Usage | null;
  error?: Record<string, unknown> | null;
  tenant?: string;
  group?: string | null;
  gang?: boolean;
}

export interface SandboxList {
  items: SandboxInfo[];
  next?: string | null;
}

export interface ServerInfo {
  version: string;
  home: string;
  roles: string[];
  workers?: NodeStatus[];
  sandboxes?: Record<string, number>;
  started_at?: number;
  pid?: number;
}

/** An open session: `busy` while a command runs in it. */
export interface SessionInfo {
  session: string;
  shell?: string;
  pid?: number;
  busy?: boolean;
  pty?: boolean;
  user?: string | null;
  created_at?: number;
}

export interface SessionList {
  items: SessionInfo[];
}

/** Replace the whole configuration. expected: the version that it is based on; Conflict when there is a newer one. None replaces any. check: only validate. */
export interface SetConfiguration {
  configuration: Configuration;
  expected?: number | null;
  check?: boolean;
}

/** Define a pool, or replace its definition. image, snapshot: one of them. memory, network: of the sandboxes that will use it: a sandbox comes from the pool if its network is the same, and its /dev/shm has the same size. minimum, maximum: number of unclaimed sandboxes on each worker, or on the worker of the snapshot; between them it follows the recent demand. */
export interface SetPool {
  image?: string | null;
  snapshot?: string | null;
  memory?: string;
  network?: "none" | "nat";
  minimum?: number;
  maximum?: number;
}

/** A snapshot. sandbox_id: of which it was taken. parent: the snapshot on which that sandbox ran at the time. image: its image. memory, files: the level and the mechanism. bytes: size of its own layer; None while it is not measured. layers: number of its layers above the image. paused_ms: how long processes were stopped. left_out: what existed and is not in it, one sentence each. created_at, used_at: seconds since the epoch. ttl_seconds: retention after `used_at`. users: sandboxes that run on it. state: "creating" and "deleting" until its worker has done it. */
export interface SnapshotInfo {
  snapshot_id: string;
  name?: string | null;
  tenant?: string;
  worker?: string;
  sandbox_id?: string;
  parent?: string | null;
  image?: string;
  state?: "creating" | "ready" | "deleting";
  memory?: "files" | "session" | "processes";
  files?: "switch" | "copy" | "import";
  bytes?: number | null;
  layers?: number;
  paused_ms?: number;
  left_out?: string[];
  created_at?: number;
  used_at?: number;
  ttl_seconds?: number;
  users?: string[];
}

export interface SnapshotList {
  items: SnapshotInfo[];
}

/** The state of a sandbox; admin/sandboxes/lifecycle.py shows the transitions. */
export type State = "pending" | "running" | "stopping" | "stopped" | "archiving" | "archived" | "deleted";

/** One state change of a sandbox. `key`: the idempotency key of the request that caused it, if it had one. */
export interface StateChange {
  from_state: State;
  to_state: State;
  event: string;
  timestamp: number;
  key?: string | null;
}

/** `index`: number of this step in the episode, from 0; the same index again gets the same response. */
export interface StepEnv {
  action: unknown;
  index?: number | null;
}

export interface StepResult {
  observation?: unknown;
  reward?: number;
  terminated?: boolean;
  truncated?: boolean;
  info?: Record<string, unknown>;
}

/** The largest sandbox of a pod template; None is no limit. */
export interface TemplateLimit {
  cpus?: number | null;
  memory?: string | null;
  num_gpus?: number | null;
}

/** image: a pattern of full image names, as "docker.io/library/python:*". min_gpus, max_gpus: of the requested GPUs. accelerator_types: one of them is requested; None is any, also none. */
export interface TemplateRule {
  image?: string;
  min_gpus?: number | null;
  max_gpus?: number | null;
  accelerator_types?: string[] | null;
  template: string;
}

/** Pod templates, where each sandbox is a pod. rules: the first one that matches selects the template of a sandbox that names none. allowed: templates that keys without the scope admin may name; None is all. limits: by template. */
export interface TemplateRules {
  rules?: TemplateRule[];
  allowed?: string[] | null;
  limits?: Record<string, TemplateLimit>;
}

/** Why a try gave no reward. kind: the class by which retries are decided. type: name of the exception. */
export interface TrialError {
  kind: "infrastructure" | "timeout" | "environment" | "request" | "agent" | "verifier" | "cancelled";
  type: string;
  message?: string;
  traceback?: string;
  at?: number;
}

/** A trial. number: from 1; attempt: from 1. tries: number of tries that were begun and ended without a result. token: the fencing token, incremented by each claim. not_before: a retry waits until then. rewards: by name; None without a valid reward. history: errors of earlier tries, oldest first. */
export interface TrialInfo {
  number: number;
  task: string;
  task_index: number;
  attempt: number;
  state: TrialState;
  tries?: number;
  token?: number;
  holder?: string;
  not_before?: number;
  started_at?: number | null;
  finished_at?: number | null;
  rewards?: Record<string, number> | null;
  error?: TrialError | null;
  result?: Record<string, unknown>;
  history?: TrialError[];
}

/** Trials by number. next: pass it as `after` to get the following ones. */
export interface TrialList {
  items: TrialInfo[];
  next?: number | null;
}

export type TrialState = "pending" | "running" | "completed" | "failed" | "cancelled";

/** Fields of an active run that can be changed. tags: merged; weight_version: of the calls from now on. */
export interface UpdateRun {
  tags?: Record<string, string> | null;
  weight_version?: string | null;
}

/** Changes of a sandbox's record, in any state. Only the given fields change: a name of None removes the name, and labels replace all labels. Conflict when another sandbox that runs has the name. timeout: seconds from now, instead of the `timeout` of its config, until a restart; None is never. Conflict when it neither starts nor runs. */
export interface UpdateSandbox {
  name?: string | null;
  labels?: Record<string, string>;
  timeout?: number | null;
}

/** An upstream without its key. headers: names only. tenant: "" is the server's owner. shared: one of the server's owner, that all tenants can use. */
export interface UpstreamInfo {
  name: string;
  urls: string[];
  dialect: "openai-chat" | "openai-responses" | "anthropic" | "gemini";
  has_key: boolean;
  headers?: string[];
  models?: Record<string, string>;
  token_fields?: string;
  retries?: number;
  backoff?: number;
  timeout?: number;
  connections?: number;
  prices?: Record<string, Price>;
  weight_version?: string | null;
  created_at?: number;
  tenant?: string;
}

export interface UpstreamList {
  items: UpstreamInfo[];
}

/** A model server. The key is stored on the server (mode 0600) and is in no response. urls: base addresses without the path of the dialect, as "http://127.0.0.1:8000"; a path such as "/v1" at the end is allowed. Calls of one run use one address while it works. dialect: the dialect that the server speaks. Calls of agents in another dialect are converted. key: sent in the header of the dialect; None keeps the key of an existing upstream of this name; "" removes it. headers: additional request headers. Their values are treated as the key is. models: model names of agents and the names at the upstream; "*" is the name for all others. token_fields: request token ids and log probabilities ("vllm", "sglang"). The agent does not see these fields. retries: attempts after the first one, before the first byte of a response, after connection errors and the statuses 408, 425, 429, 500, 502, 503, 504 and 529. backoff: seconds before the first retry; doubled for each one after. timeout: seconds without a byte of the response. connections: the largest number of concurrent calls. prices: by model name at the upstream; "*" is the price of all others. weight_version: recorded with each call, unless the response or the run names one. */
export interface UpstreamSpec {
  urls: string[];
  dialect?: "openai-chat" | "openai-responses" | "anthropic" | "gemini";
  key?: string | null;
  headers?: Record<string, string>;
  models?: Record<string, string>;
  token_fields?: "none" | "vllm" | "sglang";
  retries?: number;
  backoff?: number;
  timeout?: number;
  connections?: number;
  prices?: Record<string, Price>;
  weight_version?: string | null;
}

/** Measured usage of one sandbox: bytes, CPU seconds since its start, and processes. auto_paused: whether it is paused by `auto_pause` now; swapped_bytes: memory that was swapped out then; not_swapped: the reason against it. */
export interface Usage {
  memory_bytes?: number | null;
  memory_peak_bytes?: number | null;
  cpu_seconds?: number | null;
  pids?: number | null;
  oom_kills?: number | null;
  disk_bytes?: number | null;
  auto_paused?: boolean | null;
  swapped_bytes?: number | null;
  not_swapped?: string | null;
}

export interface ValidationError {
  loc: (string | number)[];
  msg: string;
  type: string;
  input?: unknown;
  ctx?: Record<string, unknown>;
}

/** A volume. size: limit of its files in bytes. state: "creating" and "deleting" until its worker has done it. created_at: seconds since the epoch. tenant: of the key that created it; "" is the server's owner. */
export interface VolumeInfo {
  name: string;
  volume_id: string;
  worker: string;
  size: number;
  state?: "creating" | "ready" | "deleting";
  created_at?: number;
  tenant?: string;
}

export interface VolumeList {
  items: VolumeInfo[];
}

/** A volume in a sandbox. name: of a volume of the tenant. target: the absolute path at which it is mounted; a missing folder is created. read_only: rejects writes. volume_id, worker: set by the server; values of a client are replaced. */
export interface VolumeMount {
  name: string;
  target: string;
  read_only?: boolean;
  volume_id?: string | null;
  worker?: string | null;
}

/** The version that a worker applied; None while it has not confirmed one. error: why not. */
export interface WorkerConfiguration {
  worker: string;
  version?: number | null;
  error?: string;
}

/** A worker as stored. beat: grows with each heartbeat. age: seconds since the last one, for display only. url: "" for the server's own. evacuating: it is drained, and its sandboxes are stopped and archived. */
export interface WorkerInfo {
  name: string;
  url?: string;
  state?: WorkerState;
  epoch?: number;
  beat?: number;
  draining?: boolean;
  evacuating?: boolean;
  version?: string;
  age?: number;
  status?: NodeStatus | null;
}

/** The response to a worker. seconds: how long after it sent the request the worker may accept new sandboxes. stop: how long after that moment a worker with the policy "stop" ends its sandboxes; 0 from an older server: the same as seconds. beat: seconds from one heartbeat to the next. */
export interface WorkerLease {
  name: string;
  epoch: number;
  seconds: number;
  stop?: number;
  beat: number;
  draining?: boolean;
}

export interface WorkerList {
  items: WorkerInfo[];
}

/** ready: accepts sandboxes. draining: retains its current ones. unreachable: no heartbeat for longer than its lease; it gets no sandboxes, and its current ones are expected back. lost: no heartbeat for longer than the grace period. */
export type WorkerState = "ready" | "draining" | "unreachable" | "lost";

/** Method and path of each operation. */
export const ROUTES = {
  about_env: ["GET", "/v1/envs/about"],
  add_env: ["POST", "/v1/envs/add"],
  answer_call: ["POST", "/v1/runs/{run}/calls/{number}/answer"],
  archive_sandbox: ["POST", "/v1/sandboxes/{sandbox_id}/archive"],
  beat_trials: ["POST", "/v1/jobs/{job_id}/heartbeat"],
  beat_worker: ["POST", "/v1/workers/{worker}/beat"],
  build_env: ["POST", "/v1/envs/build"],
  build_image: ["POST", "/v1/images/build"],
  call_env: ["POST", "/v1/sandboxes/{sandbox_id}/envs/{env}/call"],
  cancel_job: ["POST", "/v1/jobs/{job_id}/cancel"],
  checkpoint_sandbox: ["POST", "/v1/sandboxes/{sandbox_id}/checkpoint"],
  chmod: ["POST", "/v1/sandboxes/{sandbox_id}/files/chmod"],
  chown: ["POST", "/v1/sandboxes/{sandbox_id}/files/chown"],
  claim_trials: ["POST", "/v1/jobs/{job_id}/claim"],
  close_env: ["DELETE", "/v1/sandboxes/{sandbox_id}/envs/{env}"],
  close_gateway_port: ["DELETE", "/v1/sandboxes/{sandbox_id}/gateway"],
  close_session: ["DELETE", "/v1/sandboxes/{sandbox_id}/sessions/{session}"],
  commit_sandbox: ["POST", "/v1/sandboxes/{sandbox_id}/commit"],
  create_group: ["POST", "/v1/groups"],
  create_job: ["POST", "/v1/jobs"],
  create_key: ["POST", "/v1/keys"],
  create_run: ["POST", "/v1/runs"],
  create_sandbox: ["POST", "/v1/sandboxes"],
  create_session: ["POST", "/v1/sandboxes/{sandbox_id}/sessions"],
  create_volume: ["POST", "/v1/volumes"],
  delete_job: ["DELETE", "/v1/jobs/{job_id}"],
  delete_pool: ["DELETE", "/v1/pools/{pool}"],
  delete_run: ["DELETE", "/v1/runs/{run}"],
  delete_sandbox: ["DELETE", "/v1/sandboxes/{sandbox_id}"],
  delete_snapshot: ["DELETE", "/v1/snapshots/{snapshot}"],
  delete_upstream: ["DELETE", "/v1/gateway/upstreams/{upstream}"],
  delete_volume: ["DELETE", "/v1/volumes/{volume}"],
  direct_access: ["GET", "/v1/sandboxes/{sandbox_id}/direct"],
  download_dir: ["GET", "/v1/sandboxes/{sandbox_id}/files/archive"],
  drain_worker: ["POST", "/v1/workers/{worker}/drain"],
  end_run: ["POST", "/v1/runs/{run}/end"],
  env_frames: ["POST", "/v1/sandboxes/{sandbox_id}/envs/frames"],
  execute: ["POST", "/v1/sandboxes/{sandbox_id}/execute"],
  export_snapshot: ["GET", "/v1/snapshots/{snapshot}/export"],
  finish_trial: ["POST", "/v1/jobs/{job_id}/trials/{number}/finish"],
  forget_process: ["DELETE", "/v1/sandboxes/{sandbox_id}/processes/{process_id}"],
  fork_env: ["POST", "/v1/sandboxes/{sandbox_id}/envs/{env}/fork"],
  fork_sandbox: ["POST", "/v1/sandboxes/{sandbox_id}/fork"],
  forkable_sandbox: ["GET", "/v1/sandboxes/{sandbox_id}/forkable"],
  get_call: ["GET", "/v1/runs/{run}/calls/{number}"],
  get_commit: ["GET", "/v1/sandboxes/{sandbox_id}/commit"],
  get_configuration: ["GET", "/v1/configuration"],
  get_group: ["GET", "/v1/groups/{group_id}"],
  get_job: ["GET", "/v1/jobs/{job_id}"],
  get_process: ["GET", "/v1/sandboxes/{sandbox_id}/processes/{process_id}"],
  get_recording: ["GET", "/v1/recordings/{sandbox_id}"],
  get_run: ["GET", "/v1/runs/{run}"],
  get_sandbox: ["GET", "/v1/sandboxes/{sandbox_id}"],
  get_snapshot: ["GET", "/v1/snapshots/{snapshot}"],
  get_trajectory: ["GET", "/v1/runs/{run}/trajectory"],
  get_volume: ["GET", "/v1/volumes/{volume}"],
  import_snapshot: ["POST", "/v1/snapshots/import"],
  interrupt: ["POST", "/v1/sandboxes/{sandbox_id}/sessions/{session}/interrupt"],
  join_worker: ["POST", "/v1/workers"],
  list_audit: ["GET", "/v1/audit"],
  list_calls: ["GET", "/v1/runs/{run}/calls"],
  list_configurations: ["GET", "/v1/configuration/history"],
  list_connections: ["GET", "/v1/sandboxes/{sandbox_id}/connections"],
  list_envs: ["GET", "/v1/envs"],
  list_files: ["GET", "/v1/sandboxes/{sandbox_id}/files/list"],
  list_jobs: ["GET", "/v1/jobs"],
  list_keys: ["GET", "/v1/keys"],
  list_pools: ["GET", "/v1/pools"],
  list_processes: ["GET", "/v1/sandboxes/{sandbox_id}/processes"],
  list_recorded: ["GET", "/v1/recordings/{sandbox_id}/entries"],
  list_runs: ["GET", "/v1/runs"],
  list_sandboxes: ["GET", "/v1/sandboxes"],
  list_sessions: ["GET", "/v1/sandboxes/{sandbox_id}/sessions"],
  list_snapshots: ["GET", "/v1/snapshots"],
  list_trials: ["GET", "/v1/jobs/{job_id}/trials"],
  list_upstreams: ["GET", "/v1/gateway/upstreams"],
  list_volumes: ["GET", "/v1/volumes"],
  list_workers: ["GET", "/v1/workers"],
  make_dir: ["POST", "/v1/sandboxes/{sandbox_id}/files/dir"],
  make_env: ["POST", "/v1/sandboxes/{sandbox_id}/envs"],
  move_file: ["POST", "/v1/sandboxes/{sandbox_id}/files/move"],
  next_call: ["GET", "/v1/runs/{run}/next"],
  open_env: ["POST", "/v1/envs"],
  open_gateway_port: ["PUT", "/v1/sandboxes/{sandbox_id}/gateway"],
  pause_sandbox: ["POST", "/v1/sandboxes/{sandbox_id}/pause"],
  port: ["OPTIONS", "/v1/sandboxes/{sandbox_id}/ports/{port}/{rest}"],
  process_logs: ["GET", "/v1/sandboxes/{sandbox_id}/processes/{process_id}/logs"],
  process_stdin: ["POST", "/v1/sandboxes/{sandbox_id}/processes/{process_id}/stdin"],
  put_upstream: ["PUT", "/v1/gateway/upstreams/{upstream}"],
  read_file: ["GET", "/v1/sandboxes/{sandbox_id}/files/content"],
  release_envs: ["DELETE", "/v1/sandboxes/{sandbox_id}/envs/owners/{owner}"],
  remove_file: ["DELETE", "/v1/sandboxes/{sandbox_id}/files"],
  remove_worker: ["DELETE", "/v1/workers/{worker}"],
  renew_envs: ["POST", "/v1/sandboxes/{sandbox_id}/envs/owners/{owner}"],
  repeat_recording: ["PUT", "/v1/recordings/{sandbox_id}/repeat"],
  reset_env: ["POST", "/v1/sandboxes/{sandbox_id}/envs/{env}/reset"],
  resize: ["POST", "/v1/sandboxes/{sandbox_id}/sessions/{session}/resize"],
  restart_sandbox: ["POST", "/v1/sandboxes/{sandbox_id}/restart"],
  resume_sandbox: ["POST", "/v1/sandboxes/{sandbox_id}/resume"],
  revoke_key: ["DELETE", "/v1/keys/{key_id}"],
  rollback_sandbox: ["POST", "/v1/sandboxes/{sandbox_id}/rollback"],
  run: ["POST", "/v1/sandboxes/{sandbox_id}/sessions/{session}/run"],
  server_info: ["GET", "/v1/server"],
  session_input: ["POST", "/v1/sandboxes/{sandbox_id}/sessions/{session}/input"],
  set_configuration: ["PUT", "/v1/configuration"],
  set_pool: ["PUT", "/v1/pools/{pool}"],
  signal_process: ["POST", "/v1/sandboxes/{sandbox_id}/processes/{process_id}/signal"],
  start_process: ["POST", "/v1/sandboxes/{sandbox_id}/processes"],
  stat_file: ["GET", "/v1/sandboxes/{sandbox_id}/files/stat"],
  step_env: ["POST", "/v1/sandboxes/{sandbox_id}/envs/{env}/step"],
  stop_group: ["POST", "/v1/groups/{group_id}/stop"],
  stop_sandbox: ["POST", "/v1/sandboxes/{sandbox_id}/stop"],
  undrain_worker: ["POST", "/v1/workers/{worker}/undrain"],
  update_run: ["PATCH", "/v1/runs/{run}"],
  update_sandbox: ["PATCH", "/v1/sandboxes/{sandbox_id}"],
  upload_dir: ["PUT", "/v1/sandboxes/{sandbox_id}/files/archive"],
  write_file: ["PUT", "/v1/sandboxes/{sandbox_id}/files/content"],
} as const;

export type Operation = keyof typeof ROUTES;

/** The original ROCK's name for errors that the caller did not cause. */
export class InternalServerRockError extends RockError {}

/** The sandbox failed or ended. */
export class SandboxError extends InternalServerRockError {}

/** The sandbox never ran; the message has the cause. */
export class StartFailed extends SandboxError {}

/** The image is missing or unusable. */
export class ImageError extends StartFailed {}

/** The sandbox was ended because it exceeded its memory limit. */
export class OutOfMemory extends SandboxError {}

/** The sandbox was ended because its files exceeded the disk limit. */
export class DiskFull extends SandboxError {}

/** The sandbox was stopped: by its user, its idle timeout or its maximum lifetime. */
export class SandboxStopped extends SandboxError {}

/** The sandbox's pid 1 exited while its server was running. Code inside may have caused that, so a trainer that replays lost work must not replay this. */
export class Exited extends SandboxError {}

/** The sandbox's machine failed, or its pid 1 ended while no server was running. */
export class Lost extends SandboxError {}

/** The server is at fault. */
export class ServerError extends InternalServerRockError {}

/** No capacity is free now. */
export class NoCapacity extends ServerError {}

/** The server's disk is full; nothing was changed. */
export class StorageFull extends ServerError {}

/** The server cannot be reached, or is stopping. */
export class Unavailable extends ServerError {}

/** The request cannot be served as given. */
export class ClientError extends RockError {}

/** A value, a combination or a name in the request is wrong. */
export class InvalidConfig extends ClientError {}

/** This host or runtime cannot provide what the request needs; rejected before anything was started. */
export class Unsupported extends ClientError {}

/** No such sandbox, session, process, image or path. */
export class NotFound extends ClientError {}

/** A worker does not hold the requested sandbox; the forwarding server knows its location or end. */
export class NotHere extends NotFound {}

/** Another role serves the request: `details["role"]` is write or read. */
export class WrongRole extends ClientError {}

/** It exists already, or its state does not allow the operation. */
export class Conflict extends ClientError {}

/** The key is missing or wrong. */
export class Unauthorized extends ClientError {}

/** The key is valid, but does not permit the operation. */
export class Forbidden extends ClientError {}

/** The permissions of a file in the sandbox, or a read-only file system, do not permit the operation. */
export class PermissionDenied extends ClientError {}

/** A limit of this caller is exceeded; retry after `details["retry_after"]` seconds. */
export class QuotaExceeded extends ClientError {}

/** A call to the registry of environments failed; `__cause__` is the original error. */
export class EnvHubError extends RockError {}

/** The original ROCK's name for errors of a command. */
export class CommandRockError extends RockError {}

/** Code in the sandbox is at fault. */
export class ActionError extends CommandRockError {}

/** The exit status was not 0 with check="raise"; `observation` holds the output. */
export class CommandFailed extends ActionError {}

/** The command exceeded its timeout and was killed; the session stays usable. It is a TimeoutError too. */
export class CommandTimeout extends ActionError {}

/** The environment raised an exception; it stays usable. `type`: the exception's class name; `traceback`: as text. */
export class EnvironmentRaised extends ActionError {}

/** The environment's process is gone; `details` has its last lines ("stderr") and its exit ("exit"). */
export class EnvironmentEnded extends ActionError {}

/** The session's shell ended; create a new session. */
export class SessionClosed extends ActionError {}

/** A program inside accepted a connection to its port, and closed it or sent an invalid HTTP response. */
export class PortFailed extends ActionError {}

/** A program inside accepted a connection to its port, and did not respond in time. */
export class PortTimeout extends PortFailed {}

/** The class of each code on the wire. */
export const ERRORS: Record<string, typeof RockError> = {
  "internal": InternalServerRockError,
  "sandbox_error": SandboxError,
  "start_failed": StartFailed,
  "image_error": ImageError,
  "out_of_memory": OutOfMemory,
  "disk_full": DiskFull,
  "expired": SandboxStopped,
  "exited": Exited,
  "lost": Lost,
  "server_error": ServerError,
  "no_capacity": NoCapacity,
  "storage_full": StorageFull,
  "unavailable": Unavailable,
  "bad_request": ClientError,
  "invalid_config": InvalidConfig,
  "unsupported": Unsupported,
  "not_found": NotFound,
  "not_here": NotHere,
  "wrong_role": WrongRole,
  "conflict": Conflict,
  "unauthorized": Unauthorized,
  "forbidden": Forbidden,
  "permission_denied": PermissionDenied,
  "quota_exceeded": QuotaExceeded,
  "envhub_error": EnvHubError,
  "command_error": CommandRockError,
  "action_error": ActionError,
  "command_failed": CommandFailed,
  "command_timeout": CommandTimeout,
  "environment_raised": EnvironmentRaised,
  "environment_ended": EnvironmentEnded,
  "session_closed": SessionClosed,
  "port_failed": PortFailed,
  "port_timeout": PortTimeout,
};
