"""Reports of jobs, as views of stored trials: ROCK, Harbor (result.json), SWE-bench (schema 2), and a summary.

Names of files are made of names of the job and numbers; nothing that a sandbox wrote becomes a path.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rock.jobs import swebench
from rock.jobs.statistics import Estimate, mean_of, pass_at
from rock.protocol.jobs import JobDetail, TrialError, TrialInfo, TrialState

PHASES = ("environment_setup", "agent_setup", "agent_execution", "verifier")
PASSING = 1.0  # a reward of at least this passes


def rewards_by_task(trials: Sequence[TrialInfo]) -> dict[str, list[float]]:
    """Rewards of the valid attempts of each task; tasks without one have an empty list."""
    found: dict[str, list[float]] = {}
    for trial in trials:
        values = found.setdefault(trial.task, [])
        if trial.reward is not None:
            values.append(trial.reward)
    return found


def summary(job: JobDetail, trials: Sequence[TrialInfo], threshold: float = PASSING) -> dict[str, Any]:
    """Counts, mean reward and pass@k with 95 % intervals, tokens and cost. A trial passes with a reward of at least
    `threshold`; one without a valid reward is excluded, and counted in `invalid`."""
    rewards = rewards_by_task(trials)
    passed = {task: [value >= threshold for value in values] for task, values in rewards.items()}
    ks = sorted({1, job.attempts, *(k for k in (2, 5, 10, 100) if k <= job.attempts)})
    final = [trial for trial in trials if trial.state.is_final]
    usage = {name: sum(_usage(trial).get(name) or 0 for trial in trials) for name in _USAGE}
    errors: dict[str, int] = {}
    for trial in final:
        if trial.error is not None:
            errors[trial.error.type] = errors.get(trial.error.type, 0) + 1
    return {
        "job_id": job.job_id, "name": job.name, "state": job.state.value, "tasks": job.tasks, "attempts": job.attempts,
        "trials": job.trials, **job.counts.model_dump(), "valid": sum(map(len, rewards.values())),
        "invalid": sum(trial.reward is None for trial in final),
        "retries": sum(max(0, trial.tries - 1) for trial in trials),
        "mean_reward": _estimate(mean_of(rewards)),
        "pass_at_k": {str(k): estimate for k in ks if (estimate := _estimate(pass_at(passed, k))) is not None},
        "errors": errors, "usage": usage, "duration": _duration(job),
    }  # fmt: skip


_USAGE = ("n_input_tokens", "n_cache_tokens", "n_output_tokens", "cost_usd")


def _usage(trial: TrialInfo) -> dict[str, Any]:
    found = trial.result.get("agent_result")
    return found if isinstance(found, dict) else {}


def _estimate(found: Estimate | None) -> dict[str, float] | None:
    return None if found is None else asdict(found)


def _duration(job: JobDetail) -> float | None:
    return None if job.started_at is None or job.finished_at is None else job.finished_at - job.started_at


def _time(at: object) -> str | None:
    return datetime.fromtimestamp(at, UTC).isoformat() if isinstance(at, int | float) and at > 0 else None


def trial_name(trial: TrialInfo) -> str:
    """The name of a trial: task__attempt, as a file name. Trials of different tasks have different names."""
    words = re.sub(r"[^A-Za-z0-9._-]+", "-", trial.task).strip(".-")[:80] or "task"
    return f"{words}-{trial.task_index}__{trial.attempt}"


# ---- ROCK ----


def rock(job: JobDetail, trials: Sequence[TrialInfo]) -> dict[str, Any]:
    """ROCK's JobResult, with its score summary. score: mean of the valid rewards. pass_rate: of valid rewards of at
    least 1; ROCK counts finished trials as passed."""
    figures = summary(job, trials)
    passed = sum(trial.reward is not None and trial.reward >= PASSING for trial in trials)
    return {
        "job_id": job.job_id, "status": job.state.value, "labels": job.labels, "score": job.mean_reward,
        "exit_code": 0 if job.state.value == "completed" else 1,
        "trial_results": [rock_trial(trial) for trial in trials],
        "summary": {
            "total": job.trials, "completed": job.counts.completed, "failed": job.counts.failed,
            "skipped": job.counts.cancelled, "avg_score": job.mean_reward, "valid": figures["valid"],
            "pass_rate": passed / figures["valid"] if figures["valid"] else None, "pass_at_k": figures["pass_at_k"],
        },
    }  # fmt: skip


def rock_trial(trial: TrialInfo) -> dict[str, Any]:
    """ROCK's TrialResult, HarborTrialResult where the trial has one."""
    return {
        "task_name": trial.task, "trial_name": trial_name(trial), "status": trial.state.value,
        "exception_info": _exception(trial.error), "started_at": _time(trial.started_at),
        "finished_at": _time(trial.finished_at), "raw_output": trial.result.get("output", ""),
        "exit_code": trial.result.get("exit_code", 0 if trial.state is TrialState.COMPLETED else 1),
        "score": trial.reward, "reward_valid": trial.rewards is not None,
        "agent_info": trial.result.get("agent_info"), "agent_result": trial.result.get("agent_result"),
        "verifier_result": None if trial.rewards is None else {"rewards": trial.rewards},
        **{phase: _phase(trial, phase) for phase in PHASES},
    }  # fmt: skip


def _exception(error: TrialError | None) -> dict[str, Any] | None:
    if error is None:
        return None
    return {"exception_type": error.type, "exception_message": error.message, "exception_traceback": error.traceback,
            "occurred_at": _time(error.at)}  # fmt: skip


def _phase(trial: TrialInfo, name: str) -> dict[str, Any] | None:
    times = trial.result.get("phases", {})
    pair = times.get(name) if isinstance(times, dict) else None
    if not isinstance(pair, list) or len(pair) != 2:
        return None
    return {"started_at": _time(pair[0]), "finished_at": _time(pair[1])}


# ---- Harbor ----


def harbor_trial(job: JobDetail, trial: TrialInfo) -> dict[str, Any]:
    """Harbor's result.json of a trial. reward_valid: False without a reward; failure_cause: the class of the error."""
    spec = job.task_list[trial.task_index].spec
    return {
        "id": f"{job.job_id}-{trial.number}", "task_name": trial.task, "trial_name": trial_name(trial),
        "trial_uri": f"rock://jobs/{job.job_id}/trials/{trial.number}",
        "task_id": {"path": spec.get("folder") or spec.get("file") or trial.task}, "source": spec.get("source"),
        "task_checksum": spec.get("digest"), "config": {"attempt": trial.attempt, "job_id": job.job_id},
        "agent_info": trial.result.get("agent_info"), "agent_result": trial.result.get("agent_result"),
        "verifier_result": None if trial.rewards is None else {"rewards": trial.rewards},
        "exception_info": _exception(trial.error), "started_at": _time(trial.started_at),
        "finished_at": _time(trial.finished_at), **{phase: _phase(trial, phase) for phase in PHASES},
        "step_results": None, "failure_cause": None if trial.error is None else trial.error.kind,
        "reward_valid": trial.rewards is not None,
    }  # fmt: skip


def harbor(job: JobDetail, trials: Sequence[TrialInfo]) -> Iterator[tuple[str, Any]]:
    """(path, JSON) of the files of a job folder of Harbor."""
    evals: dict[str, Any] = {}
    for trial in trials:
        info = trial.result.get("agent_info") or {}
        key = "__".join(str(part) for part in (info.get("name", "agent"), job.config.get("dataset") or "adhoc"))
        one = evals.setdefault(key, {"n_trials": 0, "n_errors": 0, "metrics": [], "pass_at_k": {}, "reward_stats": {},
                                     "exception_stats": {}, "_trials": []})  # fmt: skip
        one["_trials"].append(trial)
        if not trial.state.is_final:
            continue
        one["n_trials"] += 1
        if trial.error is not None:
            one["n_errors"] += 1
            one["exception_stats"].setdefault(trial.error.type, []).append(trial_name(trial))
        for name, value in (trial.rewards or {}).items():
            one["reward_stats"].setdefault(name, {}).setdefault(str(value), []).append(trial_name(trial))
    for one in evals.values():
        figures = summary(job, one.pop("_trials"))
        one["metrics"] = [] if figures["mean_reward"] is None else [{"mean": figures["mean_reward"]["value"]}]
        one["pass_at_k"] = {k: estimate["value"] for k, estimate in figures["pass_at_k"].items()}
    done = sum(trial.state.is_final for trial in trials)
    yield "result.json", {
        "id": job.job_id, "started_at": _time(job.started_at), "finished_at": _time(job.finished_at),
        "n_total_trials": job.trials,
        "stats": {"n_trials": done, "n_errors": sum(trial.error is not None for trial in trials), "evals": evals},
    }  # fmt: skip
    yield "config.json", job.config
    for trial in trials:
        if trial.state.is_final:
            yield f"{trial_name(trial)}/result.json", harbor_trial(job, trial)


# ---- SWE-bench ----


def swe(job: JobDetail, trials: Sequence[TrialInfo], model: str) -> Iterator[tuple[str, Any]]:
    """(path, JSON) of a run report and of the report of each instance. The first attempt of an instance counts: the
    format has one for each."""
    groups: dict[str, list[str]] = {name: [] for name in swebench.GROUPS}
    reasons: dict[str, str] = {}
    incomplete = []
    safe = re.sub(r"[^A-Za-z0-9._-]+", "_", model.replace("/", "__")).lstrip(".") or "model"
    for trial in trials:
        if trial.attempt != 1:
            continue
        name = str(job.task_list[trial.task_index].spec.get("id") or trial.task)
        if not trial.state.is_final or trial.state is TrialState.CANCELLED:
            incomplete.append(name)
            continue
        groups["submitted"].append(name)
        result = trial.result.get("swe") or {}
        reason = None
        if trial.rewards is not None:
            empty = not result.get("patch_exists", False)
            groups["empty_patch" if empty else "completed"].append(name)
            if not empty:
                groups["resolved" if result.get("resolved") else "unresolved"].append(name)
        else:
            kind = trial.error.kind if trial.error is not None else "infrastructure"
            reason = trial.error.type if trial.error is not None else "Unknown"
            reasons[name] = reason
            groups["error"].append(name)
            groups["infra_failure" if kind == "infrastructure" else "ambiguous_failure"].append(name)
        folder = f"logs/run_evaluation/{job.job_id}/{safe}/{re.sub(r'[^A-Za-z0-9._+-]+', '-', name).lstrip('.')}"
        yield f"{folder}/report.json", swebench.instance_report(name, result, reason)
    total = len({trial.task_index for trial in trials})
    yield f"{safe}.{job.job_id}.json", swebench.run_report(total, groups, incomplete, reasons)


def write(folder: Path, files: Iterator[tuple[str, Any]]) -> list[Path]:
    """Write the files of a report below a folder; returns their paths."""
    made = []
    for name, data in files:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(data, indent=2, sort_keys=False) + "\n", encoding="utf-8")
        made.append(path)
    return made
