// Pure functions for jobs: pass@k, mean rewards, and the comparison of two jobs, as src/rock/jobs/statistics.py has them.
// Intervals are of 95 %; those of a bootstrap differ in the third digit from the command line, which samples otherwise.

/** @typedef {Record<string, any>} Row */
/** @typedef {{value: number, low: number, high: number, tasks: number}} Estimate */

const PASSING = 1; // a reward of at least this passes
const Z = 1.959963984540054;
const SAMPLES = 2000;
const WORK = 4e6; // samples x tasks at most, so that a large job does not block the tab

/** The reward named "reward", else the mean of all; null without a valid reward. @param {Row} trial @returns {number|null} */
export function rewardOfTrial(trial) {
  const values = Object.values(trial.rewards || {});
  if (!values.length) return null;
  return "reward" in trial.rewards ? trial.rewards.reward : values.reduce((a, b) => a + b, 0) / values.length;
}

/** Rewards of the valid attempts of each task. @param {Row[]} trials @returns {Map<string, number[]>} */
export function rewardsByTask(trials) {
  /** @type {Map<string, number[]>} */ const found = new Map();
  for (const trial of trials) {
    if (!found.has(trial.task)) found.set(trial.task, []);
    const reward = rewardOfTrial(trial);
    if (reward !== null) found.get(trial.task)?.push(reward);
  }
  return found;
}

/** The unbiased estimate 1 - C(n-c, k) / C(n, k). @param {number} n @param {number} c @param {number} k */
export function passAtK(n, c, k) {
  if (n - c < k) return 1;
  let missed = 1;
  for (let i = n - c + 1; i <= n; i++) missed *= 1 - k / i;
  return 1 - missed;
}

/** Wilson's score interval of a proportion. @param {number} passed @param {number} total @returns {[number, number]} */
export function wilson(passed, total) {
  if (!total) return [0, 1];
  const share = passed / total, square = Z * Z;
  const middle = (share + square / (2 * total)) / (1 + square / total);
  const half = Z / (1 + square / total) * Math.sqrt(share * (1 - share) / total + square / (4 * total * total));
  return [Math.max(0, middle - half), Math.min(1, middle + half)];
}

/** The percentile bootstrap interval of the mean; the same values give the same interval. @param {number[]} values @returns {[number, number]} */
export function bootstrap(values) {
  if (values.length < 2) return values.length ? [values[0], values[0]] : [0, 1];
  const samples = Math.max(200, Math.min(SAMPLES, Math.floor(WORK / values.length)));
  let seed = 20240229;
  const chance = () => { // mulberry32
    seed = (seed + 0x6d2b79f5) | 0;
    let t = Math.imul(seed ^ (seed >>> 15), 1 | seed);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
  };
  const means = new Float64Array(samples);
  for (let s = 0; s < samples; s++) {
    let sum = 0;
    for (let i = 0; i < values.length; i++) sum += values[Math.floor(chance() * values.length)];
    means[s] = sum / values.length;
  }
  means.sort();
  return [means[Math.floor(0.025 * samples)], means[Math.min(samples - 1, Math.floor(0.975 * samples))]];
}

const mean = (/** @type {number[]} */ values) => values.reduce((a, b) => a + b, 0) / values.length;

/** pass@k over the tasks with at least k valid attempts; null without one.
 * @param {Map<string, number[]>} rewards @param {number} k @returns {Estimate|null} */
export function passAt(rewards, k) {
  const counts = [...rewards.values()].filter((one) => one.length >= k).map((one) => [one.length, one.filter((value) => value >= PASSING).length]);
  if (!counts.length) return null;
  const values = counts.map(([n, c]) => passAtK(n, c, k));
  const single = k === 1 && (counts.length === 1 || counts.every(([n]) => n === 1));
  const [low, high] = single ? wilson(counts.reduce((a, [, c]) => a + c, 0), counts.reduce((a, [n]) => a + n, 0)) : bootstrap(values);
  return { value: mean(values), low, high, tasks: values.length };
}

/** @param {Map<string, number[]>} rewards @returns {Estimate|null} */
export function meanOf(rewards) {
  const means = [...rewards.values()].filter((one) => one.length).map(mean);
  if (!means.length) return null;
  const [low, high] = bootstrap(means);
  return { value: mean(means), low, high, tasks: means.length };
}

/** The values of k to show for a number of attempts. @param {number} attempts */
export function valuesOfK(attempts) {
  return [...new Set([1, ...[2, 5, 10, 100].filter((k) => k <= attempts), attempts])].sort((a, b) => a - b);
}

/** Two jobs on the tasks that have valid rewards in both.
 * @param {Map<string, number[]>} a @param {Map<string, number[]>} b */
export function compareJobs(a, b) {
  const has = (/** @type {Map<string, number[]>} */ side, /** @type {string} */ task) => (side.get(task) || []).length > 0;
  const rows = [...a.keys()].filter((task) => has(a, task) && has(b, task)).sort()
    .map((task) => ({ task, a: mean(/** @type {number[]} */ (a.get(task))), b: mean(/** @type {number[]} */ (b.get(task))) }));
  const changes = rows.map((row) => row.b - row.a);
  const better = changes.filter((c) => c > 1e-12).length, worse = changes.filter((c) => c < -1e-12).length;
  const [low, high] = bootstrap(changes);
  return {
    rows, better, worse, same: rows.length - better - worse, difference: rows.length ? { value: mean(changes), low, high, tasks: rows.length } : null,
    pValue: signTest(better, worse), onlyA: [...a.keys()].filter((task) => has(a, task) && !has(b, task)).length, onlyB: [...b.keys()].filter((task) => has(b, task) && !has(a, task)).length,
  };
}

/** The two-sided p-value of the exact sign test. @param {number} better @param {number} worse */
export function signTest(better, worse) {
  const total = better + worse;
  let term = -total * Math.LN2, tail = 0; // the logarithm of C(total, i) / 2^total
  for (let i = 0; i <= Math.min(better, worse); i++) {
    tail += Math.exp(term);
    term += Math.log((total - i) / (i + 1));
  }
  return Math.min(1, 2 * tail);
}

/** What the table needs of a trial: its result can have 256 KiB. @param {Row} trial @returns {Row} */
export function slimTrial(trial) {
  const { result, history, error, ...rest } = trial;
  const known = result && typeof result === "object" ? result : {};
  return { ...rest, error: error && { kind: error.kind, type: error.type, message: String(error.message || "").slice(0, 300) }, earlier: (history || []).length,
    sandbox: typeof known.sandbox_id === "string" ? known.sandbox_id : "", run: typeof known.run_id === "string" ? known.run_id : "" };
}

/** The number after which trials can have changed. @param {Row[]} trials in the order of numbers */
export function finalUpTo(trials) {
  const open = trials.find((trial) => trial.state === "pending" || trial.state === "running");
  return open ? open.number - 1 : trials.length ? trials[trials.length - 1].number : 0;
}
