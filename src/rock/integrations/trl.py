"""Environments for `environment_factory` of TRL's GRPOTrainer: one sandbox, or one environment, for each rollout.

    GRPOTrainer(..., environment_factory=partial(CodingEnvironment, "python:3.11", reward="pytest -q /tests"))

The public methods of a class are the tools of the model. The module does not import trl.
"""

from __future__ import annotations

import os
from typing import Any

from rock import errors
from rock.envs.gem import RockEnv, make
from rock.sync import Sandbox

LABELS = {"rock.integration": "trl"}  # of all sandboxes of these classes
_SHOWN = 20_000  # bytes of an output that the model sees


class ToolEnvironment:
    """A sandbox with tools for commands and files; the reward comes from `reward_funcs`.

    image: of the sandbox. setup: a command that runs in each new sandbox. files: written into it, by path. timeout:
    seconds of a command. options: of `rock.Sandbox`. A row of the data set may replace `image`, `setup` and `files`.
    """

    def __init__(
        self, image: str, *, setup: str | None = None, files: dict[str, str] | None = None, timeout: float = 60.0,
        **options: Any,
    ) -> None:  # fmt: skip
        options["labels"] = {**LABELS, **options.get("labels", {})}
        options.setdefault("idle_timeout", 3600)
        self._options = options
        self._task: dict[str, Any] = {"image": image, "setup": setup, "files": files or {}}
        self._row: dict[str, Any] = {}
        self._timeout = timeout
        self._process = os.getpid()
        self._sandbox: Sandbox | None = None
        Sandbox(image, **options)  # an unknown option is rejected here

    def reset(self, **row: Any) -> None:
        """Start a new sandbox for a row of the data set; the former one is stopped."""
        self._stop()
        self._row = row
        task = {name: row[name] if row.get(name) is not None else default for name, default in self._task.items()}
        sandbox = Sandbox(task["image"], **self._options)
        sandbox.start()
        self._sandbox = sandbox
        for path, text in task["files"].items():
            if text is not None:  # a data set fills missing keys of dicts with None
                sandbox.files.write(path, text)
        if task["setup"]:
            sandbox.exec(task["setup"], timeout=self._timeout, check=True)

    def run(self, command: str) -> str:
        """Run a shell command in the sandbox and return its output.

        Args:
            command: The command line.

        Returns:
            The output, and the exit code when it is not 0.
        """
        done = self._running().exec(command, timeout=self._timeout, max_output_bytes=_SHOWN)
        text = done.output
        if done.timed_out:
            return f"{text}\n[the command took longer than {self._timeout:g} seconds and was killed]"
        return text if done.exit_code == 0 else f"{text}\n[exit code {done.exit_code}]"

    def read_file(self, path: str) -> str:
        """Read a text file.

        Args:
            path: The absolute path.

        Returns:
            The text, or an error message.
        """
        try:
            return self._running().files.read(path, length=_SHOWN).decode(errors="replace")
        except errors.ClientError as error:
            return f"[{error.message}]"

    def write_file(self, path: str, text: str) -> str:
        """Write a text file. Missing folders are made, and an old file is replaced.

        Args:
            path: The absolute path.
            text: The new text.

        Returns:
            A confirmation, or an error message.
        """
        try:
            self._running().files.write(path, text)
        except errors.ClientError as error:
            return f"[{error.message}]"
        return f"[wrote {path}]"

    def _running(self) -> Sandbox:
        if self._sandbox is None:
            raise errors.Conflict("the environment has no sandbox", hint="call reset before")
        return self._sandbox

    def _stop(self) -> None:
        sandbox, self._sandbox = self._sandbox, None
        if sandbox is not None:
            sandbox.stop()

    def __del__(self) -> None:
        if getattr(self, "_sandbox", None) is not None and self._process == os.getpid():
            try:
                self._stop()
            except Exception:  # no caller to report to; the sandbox has an idle timeout
                pass


class CodingEnvironment(ToolEnvironment):
    """A ToolEnvironment whose reward is that of a command: 1.0 for the exit code 0, else 0.0.

    reward: the command, which a row of the data set may replace. reward_files: written before it runs, by path, so that
    the model has not seen them.
    """

    def __init__(
        self, image: str, *, reward: str | None = None, reward_files: dict[str, str] | None = None, **options: Any
    ) -> None:
        super().__init__(image, **options)
        self._reward: dict[str, Any] = {"reward": reward, "reward_files": reward_files or {}}

    def get_reward(self) -> float | None:
        """The reward; None when the sandbox has ended, so that the rollout is left out. The sandbox is stopped."""
        task = {name: self._row[name] if self._row.get(name) is not None else default
                for name, default in self._reward.items()}  # fmt: skip
        if not task["reward"]:
            raise errors.InvalidConfig("there is no reward command",
                                       hint="pass reward=, or a column `reward` of the data set")
        try:
            sandbox = self._running()
            for path, text in task["reward_files"].items():
                if text is not None:
                    sandbox.files.write(path, text)
            done = sandbox.exec(task["reward"], timeout=self._timeout)
        except (errors.SandboxError, errors.Unavailable):
            return None
        finally:
            self._stop()
        return None if done.exit_code is None and not done.timed_out else float(done.exit_code == 0)


class GameEnvironment:
    """An environment of GEM on the server, with the tool `act`; the reward is the sum of an episode's rewards.

    env_id, options: as of `rock.make`. A row of the data set may have a `seed`.
    """

    def __init__(self, env_id: str, **options: Any) -> None:
        self._env: RockEnv = make(env_id, **options)
        self._total = 0.0
        self._over = True

    def reset(self, seed: int | None = None, **_: Any) -> str:
        """Start an episode; the observation is added to the prompt."""
        observation, _info = self._env.reset(seed=seed)
        self._total, self._over = 0.0, False
        return str(observation)

    def act(self, action: str) -> str:
        """Act in the environment.

        Args:
            action: The action, in the format that the environment describes.

        Returns:
            The next observation.
        """
        if self._over:
            return "[the episode has ended]"
        observation, reward, terminated, truncated, _ = self._env.step(action)
        self._total += float(reward)
        self._over = bool(terminated or truncated)
        return f"{observation}\n[the episode has ended]" if self._over else str(observation)

    def get_reward(self) -> float:
        """The sum of the rewards of the episode."""
        return self._total

    def __del__(self) -> None:
        env = getattr(self, "_env", None)
        if env is not None:
            try:
                env.close()
            except Exception:  # no caller to report to; the lease of the environment expires
                pass
