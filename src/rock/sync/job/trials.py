# GENERATED from src/rock/sdk/job/trials.py by tools/unasync.py: do not edit.
# ruff: noqa: E501, I001, RUF100, UP028
"""Kinds of trials: a script, a Harbor task, a SWE instance, and a task of a training set."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

from rock import errors
from rock.jobs import rewards, swebench
from rock.jobs.config import BashJobConfig, HarborJobConfig, JobConfig
from rock.jobs.plan import NoReward, TrialFailed, VerifierTimeout
from rock.jobs.tasks import folder_digest
from rock.sync import primitives
from rock.sync.client import Client
from rock.sync.harbor import REWARDS, HarborTask
from rock.sync.job.agents import AgentResult, AgentTask, agent_of
from rock.sync.job.attempts import KEPT, SHOWN, Attempt
from rock.sync.sandbox.sandbox import Sandbox
from rock.sync.training import TrainingSandbox

Rewards = dict[str, float] | None
_COMMIT = re.compile(r"[0-9a-f]{40,64}")
_GIT_TIMEOUT = 300.0
_LARGEST_ARTIFACTS = 256 << 20  # bytes of the artifacts of a trial
_GIT = ("git -c core.hooksPath=/dev/null -c core.fsmonitor=false -c safe.directory='*' -c user.name=rock "
        "-c user.email=rock@localhost")


class AbstractTrial:
    """A kind of trial. A subclass overrides hooks; `register_trial` makes it the class of a configuration."""

    kind: ClassVar[str] = ""

    def __init__(self, config: JobConfig | None = None) -> None:
        self.config = config

    def on_sandbox_ready(self, sandbox: Sandbox) -> None:
        """Called when the sandbox of the agent runs, before uploads and the agent; again after a takeover."""

    def run(self, attempt: Attempt) -> Rewards:
        """Run a try to its end: its rewards, or None where the kind has none. Any RockError ends the try."""
        raise NotImplementedError

    def _ready(self, attempt: Attempt, sandbox: Sandbox) -> None:
        self.on_sandbox_ready(sandbox)
        if attempt.is_started("agent"):
            return
        for local, remote in attempt.plan.uploads:
            sandbox.fs.upload(local, remote)

    def _agent(self, attempt: Attempt, task: AgentTask) -> AgentResult:
        """Install and run the agent, with a gateway run if the plan has `model`."""
        plan = attempt.agent
        agent = agent_of(plan)
        model = None if plan.model is None else {"name": plan.model, "provider": plan.model.partition("/")[0]}
        attempt.result["agent_info"] = {"name": agent.name, "version": agent.version, "model_info": model}
        with attempt.phase("agent_setup"):
            task = replace(task, run=attempt.open_run())
            agent.setup(attempt, task)
        with attempt.phase("agent_execution"):
            done = agent.run(attempt, task)
        attempt.log("agent/output.txt", done.output)
        usage = {"n_input_tokens": None, "n_cache_tokens": None, "n_output_tokens": None, "cost_usd": None,
                 "rollout_details": None, "metadata": None, **done.usage, **attempt.usage()}  # fmt: skip
        attempt.result["agent_result"] = usage
        attempt.result["agent"] = {"exit_code": done.exit_code, "timed_out": done.timed_out}
        attempt.result["output"] = done.output[-SHOWN:]
        return done

    def _agent_timeout(self, attempt: Attempt, own: float) -> float:
        plan = attempt.agent
        limit = plan.timeout or own
        if plan.longest is not None:
            limit = min(limit, plan.longest)
        return min(limit * attempt.plan.agent_factor, attempt.plan.timeout * max(1.0, attempt.plan.agent_factor))


def read_rewards(sandbox: Sandbox, paths: list[str], printed: str = "") -> dict[str, float]:
    """The rewards of the first file that exists. NoReward: there is none, or it is not a reward."""
    for path in paths:
        try:
            kind = (sandbox.fs.stat(path, follow=False)).kind
            if kind != "file":
                raise ValueError(f"it is a {kind}")
            raw = sandbox.fs.read(path, length=rewards.LARGEST)
            return rewards.read(path, raw)
        except errors.NotFound:
            continue
        except ValueError as error:
            raise NoReward(f"{path} is not a reward: {error}", details={"traceback": printed[-SHOWN:]}) from None
    raise NoReward(f"the tests wrote no reward: {' and '.join(paths)} do not exist",
                   details={"traceback": printed[-SHOWN:]})  # fmt: skip


class BashTrial(AbstractTrial):
    """A script in a sandbox, ROCK's Bash job. A nonzero exit status is the error BashExitCode."""

    kind = "bash"

    def run(self, attempt: Attempt) -> Rewards:
        spec = attempt.task.spec
        with attempt.phase("environment_setup"):
            sandbox = attempt.open()
            self._ready(attempt, sandbox)
        with attempt.phase("agent_execution"):
            if not attempt.is_started("script"):
                sandbox.fs.write("/tmp/rock-job.sh", str(spec["script"]).encode("utf-8", "replace"), mode=0o755)
            done = attempt.program("script", "exec bash /tmp/rock-job.sh", attempt.plan.timeout,
                                         env={str(k): str(v) for k, v in spec.get("env", {}).items()})  # fmt: skip
        attempt.log("output.txt", done.output)
        attempt.result["output"], attempt.result["exit_code"] = done.output[-SHOWN:], done.exit_code
        collect(attempt, sandbox)
        if done.timed_out:
            raise ProcessTimeout(f"the script took longer than {attempt.plan.timeout:g} s and was killed", "timeout")
        if done.exit_code != 0:
            raise BashExitCode(f"the script ended with exit status {done.exit_code}", "agent",
                               details={"traceback": done.output[-SHOWN:]})  # fmt: skip
        path = spec.get("reward_file")
        return None if path is None else read_rewards(sandbox, [str(path)], done.output)


class BashExitCode(TrialFailed):
    """ROCK's exception type of a script with a nonzero exit status."""


class ProcessTimeout(TrialFailed):
    """ROCK's exception type of a script that took too long."""


class HarborTrial(AbstractTrial):
    """A task folder of Harbor: the agent works in a sandbox, then tests/test.sh writes the reward."""

    kind = "harbor"

    def run(self, attempt: Attempt) -> Rewards:
        spec = attempt.task.spec
        folder = Path(str(spec["folder"]))
        if spec.get("digest") not in (None, primitives.in_thread(folder_digest, folder)):
            raise TrialFailed(f"the folder {folder} has changed since the job was created", "request",
                              hint="create a new job")  # fmt: skip
        task = primitives.in_thread(HarborTask.load, folder)
        plan = attempt.plan
        with attempt.phase("environment_setup"):
            image = self._image(attempt, task)
            sandbox = attempt.open(image=image, memory=plan.memory or task.memory, cpus=plan.cpus or task.cpus,
                                         disk=plan.disk, env=task.env, **agent_of(attempt.agent).fields())  # fmt: skip
            self._ready(attempt, sandbox)
        agent = AgentTask(attempt.trial.task, task.instruction, self._agent_timeout(attempt, task.step_timeout),
                          solution=task.folder / "solution", solution_env=task.solution_env)  # fmt: skip
        self._agent(attempt, agent)
        if not plan.verify:
            collect(attempt, sandbox)
            return None
        with attempt.phase("verifier"):
            found = self._verify(attempt, task, sandbox)
        collect(attempt, sandbox)
        return found

    def _image(self, attempt: Attempt, task: HarborTask) -> str | None:
        """The image of the task: what it names, what its Dockerfile builds, else the environment's."""
        if task.image is not None:
            return task.image
        if not (task.folder / "environment" / "Dockerfile").is_file():
            return None
        name = task.built_image
        if name in attempt.built:
            return name
        options = attempt.plan.environment
        with Client(attempt.reach.get("base_url"), attempt.reach.get("api_key")) as client:
            client.build_image(task.folder / "environment", name, network=options.get("network", "none"),
                                     memory=task.memory, use_cache=not attempt.plan.force_build)  # fmt: skip
        attempt.built.add(name)
        return name

    def _verify(self, attempt: Attempt, task: HarborTask, sandbox: Sandbox) -> Rewards:
        plan = attempt.plan
        limit = plan.verifier_timeout or task.verifier_timeout
        limit = min(limit, plan.verifier_longest or limit) * plan.verifier_factor
        if not attempt.is_started("verifier"):
            sandbox.execute(["rm", "-rf", REWARDS, "/tests"], check=True)  # of the agent
            sandbox.fs.mkdir(REWARDS)
            sandbox.fs.upload_dir(task.folder / "tests", "/tests", check="raise")
        done = attempt.program("verifier", "exec bash /tests/test.sh", limit,
                                     env={**task.verifier_env, **plan.verifier_env})  # fmt: skip
        attempt.log("verifier/test-stdout.txt", done.output)
        attempt.result["verifier"] = {"exit_code": done.exit_code, "timed_out": done.timed_out}
        if done.timed_out:
            raise VerifierTimeout(f"the tests of {task.name} took longer than {limit:g} s and were killed",
                                  details={"traceback": done.output})  # fmt: skip
        return read_rewards(sandbox, [f"{REWARDS}/reward.json", f"{REWARDS}/reward.txt"], done.output)


class SweTrial(AbstractTrial):
    """A SWE-bench instance: the agent changes a repository; its patch is graded in a fresh sandbox."""

    kind = "swe"
    # Restored after the patch, besides the files of the test patch: they change how tests are collected and reported.
    PROTECTED = ("conftest.py", "pytest.ini", ".pytest.ini", "tox.ini", "sitecustomize.py", "usercustomize.py")

    def run(self, attempt: Attempt) -> Rewards:
        instance = primitives.in_thread(instance_of, attempt.task.spec)
        report: dict[str, Any] = {"patch_exists": False, "applied": False, "resolved": False}
        attempt.result["swe"] = report
        patch = self._patch(attempt, instance)
        report["patch_exists"] = bool(patch.strip())
        report["patch"] = patch[:100_000].decode("utf-8", "replace")
        report["patch_size"] = len(patch)
        attempt.log("agent/patch.diff", patch.decode("utf-8", "replace"))
        if not patch.strip():
            return {"reward": 0.0}
        with attempt.phase("verifier"):
            return self._grade(attempt, instance, patch, report)

    def _patch(self, attempt: Attempt, instance: swebench.Instance) -> bytes:
        """The changes of the agent. The solution and the tests are not in its sandbox."""
        if attempt.agent.name == "oracle":
            attempt.result["agent_info"] = {"name": "oracle", "version": "1", "model_info": None}
            return instance.patch.encode()
        with attempt.phase("environment_setup"):
            sandbox = attempt.open(image=instance.image, **agent_of(attempt.agent).fields())
            self._ready(attempt, sandbox)
            base = self._provide(attempt, sandbox, instance)
        limit = self._agent_timeout(attempt, 1800.0)
        self._agent(attempt, AgentTask(instance.id, instance.problem, limit, workdir=instance.workdir))
        script = (f"{_GIT} add -A && {_GIT} diff --cached --binary --no-color --no-ext-diff --no-textconv {base} "
                  "> /tmp/rock.patch")
        done = attempt.program("diff", script, _GIT_TIMEOUT, cwd=instance.workdir)
        collect(attempt, sandbox)
        if done.exit_code != 0:
            attempt.result["swe"]["diff_error"] = done.output[-2000:]
            return b""
        if (sandbox.fs.stat("/tmp/rock.patch", follow=False)).size > swebench.LARGEST_PATCH:
            raise TrialFailed(f"the patch has more than {swebench.LARGEST_PATCH} bytes", "agent")
        return sandbox.fs.read("/tmp/rock.patch", length=swebench.LARGEST_PATCH)

    def _provide(self, attempt: Attempt, sandbox: Sandbox, instance: swebench.Instance) -> str:
        """The repository at the base commit, without later history, with the tag rock-base. Returns the id of this
        commit: the agent may move the tag."""
        started = attempt.is_started("prepare")
        if instance.repository is not None and not started:
            archive = primitives.in_thread(_archive, instance.repository, instance.base_commit)
            try:
                sandbox.fs.mkdir(instance.workdir)
                sandbox.fs.unpack(archive, instance.workdir)
            finally:
                archive.close()
        if instance.repository is not None:
            script = (f"{_GIT} init -q . && {_GIT} add -A -f && {_GIT} commit -q --allow-empty -m base && "
                      f"{_GIT} tag -f rock-base")
        else:
            script = (f"{_GIT} tag -f rock-base {instance.base_commit} && {_GIT} add -A && "
                      f"({_GIT} diff --cached --quiet rock-base || "
                      f"{{ {_GIT} commit -q -m base && {_GIT} tag -f rock-base; }})")
        script = f"{script} >/dev/null && {_GIT} rev-parse rock-base^{{commit}}"
        done = attempt.program("prepare", script, _GIT_TIMEOUT, cwd=instance.workdir)
        base = done.output.strip().rpartition("\n")[2]
        if done.exit_code != 0 or not _COMMIT.fullmatch(base):
            raise TrialFailed(f"the repository of {instance.id} cannot be prepared: {done.output[-500:]}", "request",
                              hint="the sandbox needs git, and the repository at workdir or in `repository`")
        return base

    def _grade(
        self, attempt: Attempt, instance: swebench.Instance, patch: bytes, report: dict[str, Any]
    ) -> dict[str, float]:
        sandbox = attempt.open("-grade", image=instance.image)
        self._provide(attempt, sandbox, instance)
        if not attempt.is_started("apply"):
            sandbox.fs.write("/tmp/model.patch", patch)
            sandbox.fs.write("/tmp/test.patch", instance.test_patch)
            sandbox.fs.write("/tmp/tests.list", "".join(f"{name}\0" for name in instance.test_files))
            sandbox.fs.write("/tmp/apply.sh", _apply(self.PROTECTED))
        done = attempt.program("apply", "exec bash /tmp/apply.sh", _GIT_TIMEOUT, cwd=instance.workdir)
        report["applied"] = done.exit_code == 0
        if done.exit_code == 3:
            raise TrialFailed(f"the test patch of {instance.id} cannot be applied: {done.output[-500:]}", "request")
        if done.exit_code != 0:
            report["log"] = swebench.log_text(done.output[-SHOWN:], None, False, False)
            attempt.log("verifier/test_output.txt", report["log"])
            return {"reward": 0.0}
        limit = instance.timeout * attempt.plan.verifier_factor
        done = attempt.program("verifier", instance.command, limit, cwd=instance.workdir, shown=KEPT,
                                     env=attempt.plan.verifier_env)  # fmt: skip
        attempt.log("verifier/test_output.txt", swebench.log_text(done.output, done.exit_code, done.timed_out, True))
        if done.timed_out:
            raise VerifierTimeout(f"the tests of {instance.id} took longer than {limit:g} s and were killed",
                                  details={"traceback": done.output[-SHOWN:]})  # fmt: skip
        grade = swebench.grade(instance, swebench.statuses_of(instance, done.output))
        report["resolved"], report["tests_status"] = grade.resolved, grade.tests_status()
        report["exit_code"] = done.exit_code
        return {"reward": float(grade.resolved)}


def _apply(protected: tuple[str, ...]) -> str:
    """Apply the patch, then restore tests and protected files, then apply the test patch. Exit status 2: the patch does
    not apply; 3: the test patch does not."""
    names = " ".join(f"-name {name} -o" for name in protected).removesuffix(" -o")
    return f"""
{_GIT} apply --whitespace=nowarn /tmp/model.patch || {_GIT} apply --whitespace=nowarn --ignore-whitespace -C1 \\
    --recount /tmp/model.patch || exit 2
find . -path ./.git -prune -o \\( {names} \\) -print0 | while IFS= read -r -d '' file; do
    {_GIT} cat-file -e "rock-base:$file" 2>/dev/null || rm -rf -- "$file"
done
{_GIT} ls-tree -r -z --name-only rock-base | while IFS= read -r -d '' file; do
    case "${{file##*/}}" in {"|".join(protected)}) {_GIT} checkout -q rock-base -- "$file";; esac
done
while IFS= read -r -d '' file; do
    rm -rf -- "$file"
    ! {_GIT} cat-file -e "rock-base:$file" 2>/dev/null || {_GIT} checkout -q rock-base -- "$file"
done < /tmp/tests.list
[ ! -s /tmp/test.patch ] || {_GIT} apply --whitespace=nowarn /tmp/test.patch || exit 3
"""


def instance_of(spec: dict[str, Any]) -> swebench.Instance:
    """The instance of a task. TrialFailed: the data set has changed."""
    path = Path(str(spec["file"]))
    data = swebench.load(path).get(str(spec["id"]))
    if data is None or swebench.digest(data) != spec["digest"]:
        raise TrialFailed(f"instance {spec['id']} of {path} has changed since the job was created", "request",
                          hint="create a new job")  # fmt: skip
    return swebench.Instance.parse(data, path.parent)


def _archive(repository: str, commit: str) -> BinaryIO:
    """The files of a commit as a tar. InvalidConfig."""
    file: Any = tempfile.TemporaryFile()  # noqa: SIM115  # closed by the caller
    why = ""
    try:
        done = subprocess.run(["git", "-C", repository, "archive", "--format=tar", commit], stdout=file,
                              stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, timeout=_GIT_TIMEOUT)  # fmt: skip
        why = done.stderr.decode("utf-8", "replace")[-500:] if done.returncode else ""
    except (OSError, subprocess.TimeoutExpired) as error:
        why = str(error)
    if why:
        file.close()
        raise errors.InvalidConfig(f"commit {commit} of {repository} cannot be read: {why}",
                                   hint="set repository to a Git repository with that commit")  # fmt: skip
    file.seek(0)
    made: BinaryIO = file
    return made


class TrainingTrial(AbstractTrial):
    """A task of a training set. The oracle plays the set's solution; nop evaluates the initial state."""

    kind = "training"

    def run(self, attempt: Attempt) -> Rewards:
        spec, name = attempt.task.spec, attempt.agent.name
        if name not in ("oracle", "nop"):
            raise TrialFailed(f"agent {name} cannot act in a training set", "request", hint="use oracle or nop")
        attempt.result["agent_info"] = {"name": name, "version": "1", "model_info": None}
        box = TrainingSandbox(box_type=str(spec["set"]), base_url=attempt.reach.get("base_url"),
                              bearer_token=attempt.reach.get("api_key"), data=spec.get("data"))  # fmt: skip
        with box:
            with attempt.phase("environment_setup"):
                made = box.create_instance(str(spec["set"]), str(spec["id"]), params=spec.get("params") or {})
                instance = made["info"]["instance_id"]
            with attempt.phase("agent_execution"):
                for message in box.get_solution(instance) if name == "oracle" else []:
                    if message.get("role") == "assistant":
                        box.step(instance, message)
            with attempt.phase("verifier"):
                score = box.evaluate(instance)
        scores = score if isinstance(score, dict) else {"reward": score}
        return {str(key): rewards.number(value) for key, value in scores.items()}


def collect(attempt: Attempt, sandbox: Sandbox) -> None:
    """Store the artifacts as tar files in the folder of the trial. Missing ones, and all beyond the size limit, are
    left out and listed in the result."""
    if attempt.folder is None or not attempt.plan.artifacts:
        return
    left = _LARGEST_ARTIFACTS
    entries: list[dict[str, Any]] = []
    folder = attempt.folder / "artifacts"
    folder.mkdir(parents=True, exist_ok=True)
    for number, source in enumerate(attempt.plan.artifacts, 1):
        entry: dict[str, Any] = {"source": source, "destination": None}
        entries.append(entry)
        try:
            is_folder = (sandbox.fs.stat(source)).kind == "directory"
            place = folder / (f"{number}.tar" if is_folder else f"{number}.bin")
            size = 0
            with open(place, "wb") as file:
                for part in sandbox.fs.pack(source) if is_folder else sandbox.fs.chunks(source):
                    size += len(part)
                    if size > left:
                        break
                    file.write(part)
            if size > left:
                os.unlink(place)
                entry["error"] = f"more than {_LARGEST_ARTIFACTS} bytes"
                continue
            left -= size
            entry["destination"] = place.name
        except errors.ClientError as error:
            entry["error"] = error.message[:200]
    attempt.result["artifacts"] = entries


_KINDS: dict[str, type[AbstractTrial]] = {
    kind.kind: kind for kind in (BashTrial, HarborTrial, SweTrial, TrainingTrial)
}
_CONFIGS: dict[type[JobConfig], str] = {BashJobConfig: "bash", HarborJobConfig: "harbor"}


def register_trial(config: type[JobConfig], trial: type[AbstractTrial]) -> None:
    """Make a class the kind of trials of a configuration, as in ROCK."""
    if config not in _CONFIGS:
        raise errors.InvalidConfig(f"{config.__name__} has no trials", hint="use BashJobConfig or HarborJobConfig")
    _KINDS[_CONFIGS[config]] = trial


def trial_of(kind: str, config: JobConfig | None = None) -> AbstractTrial:
    """The kind of a task. InvalidConfig."""
    if kind not in _KINDS:
        raise errors.InvalidConfig(f"there are no trials of kind {kind!r}", hint=f"known: {', '.join(sorted(_KINDS))}")
    return _KINDS[kind](config)
