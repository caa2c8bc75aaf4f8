"""Import paths, names and fields of rl-rock 1.11 that scripts of its users have, in this package's own SDK."""

from __future__ import annotations

import asyncio
import importlib
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.conftest import IMAGE, RunningServer

from rock import env_vars, errors
from rock.actions import SandboxStatusResponse
from rock.sdk.sandbox.client import Sandbox, SandboxConfig
from rock.utils import extract_nohup_pid, find_free_port, retry_async, run_until_complete, wait_until_alive

# Written down from the released package; what is left out here is in docs/guides/from-rock.md.
NAMES = {
    "rock": "make codes RockException BadRequestRockError InternalServerRockError CommandRockError raise_for_code",
    "rock.actions": "AbstractSandbox Action BaseResponse BashAction BashObservation ChmodRequest ChownRequest "
    "CloseBashSessionRequest CloseSessionRequest Command CommandResponse CommitErrorCode CommitPhase "
    "CommitStatusResponse CreateBashSessionRequest CreateSessionRequest CreateSessionResponse Env EnvCloseRequest "
    "EnvCloseResponse EnvListResponse EnvMakeRequest EnvMakeResponse EnvResetRequest EnvResetResponse EnvStepRequest "
    "EnvStepResponse FileUploadResponse IsAliveResponse Observation ReadFileRequest ResponseStatus RockResponse "
    "SandboxResponse SandboxStatusResponse UploadMode UploadRequest WriteFileRequest",
    "rock.actions.envs.base": "Env",
    "rock.actions.envs.request": "EnvMakeRequest EnvResetRequest EnvStepRequest EnvCloseRequest",
    "rock.actions.envs.response": "EnvMakeResponse EnvResetResponse EnvStepResponse EnvCloseResponse EnvListResponse",
    "rock.actions.response": "BaseResponse ResponseStatus RockResponse",
    "rock.actions.sandbox.base": "AbstractSandbox",
    "rock.actions.sandbox.request": "CreateSessionRequest CreateBashSessionRequest ChownRequest UploadMode",
    "rock.actions.sandbox.response": "CommitPhase CommitErrorCode CommitStatusResponse State StateTransitionRecord",
    "rock.env_vars": "is_set",
    "rock.logger": "init_logger",
    "rock.sdk.common.constants": "RunModeType PID_PREFIX PID_SUFFIX",
    "rock.sdk.common.exceptions": "RockException InvalidParameterRockException raise_for_code",
    "rock.sdk.envs": "make RockEnv",
    "rock.sdk.envs.registration": "make",
    "rock.sdk.envs.rock_env": "RockEnv",
    "rock.sdk.envhub": "EnvHubClient EnvHubClientConfig EnvHubError RockEnvInfo",
    "rock.sdk.sandbox.client": "Sandbox SandboxGroup SandboxConfig RunMode RunModeType Command BashAction Observation",
    "rock.sdk.sandbox.config": "BaseConfig SandboxConfig SandboxGroupConfig",
    "rock.sdk.sandbox.file_system": "FileSystem LinuxFileSystem",
    "rock.sdk.sandbox.remote_user": "RemoteUser LinuxRemoteUser",
    "rock.sdk.sandbox.runtime_env": "RuntimeEnv PythonRuntimeEnvConfig NodeRuntimeEnvConfig",
    "rock.sdk.sandbox.speedup": "SpeedupType",
    "rock.utils": "extract_nohup_pid find_free_port get_host_ip retry_async run_until_complete wait_until_alive Timer",
    "rock.utils.retry": "retry_async",
}
METHODS = [
    "archive", "arun", "attach", "close", "close_session", "commit", "commit_async", "create_session", "delete",
    "execute", "get_commit_status", "get_status", "handle_nohup_output", "is_alive", "read_file",
    "read_file_by_line_range", "restart", "run_in_session", "run_nohup_and_wait", "start", "start_nohup_process",
    "stop", "upload", "upload_by_path", "wait_for_process_completion", "write_file", "write_file_by_path",
]  # fmt: skip
FIELDS = [
    "sandbox_id", "status", "port_mapping", "host_name", "host_ip", "is_alive", "image", "gateway_version",
    "swe_rex_version", "user_id", "experiment_id", "namespace", "cpus", "memory", "num_gpus", "accelerator_type",
    "disk", "disk_limit_rootfs", "state", "start_time", "stop_time", "create_time", "archive_time", "delete_time",
    "auto_stop_time", "auto_archive_time", "auto_delete_time", "state_history",
]  # fmt: skip


@pytest.mark.parametrize("module", NAMES)
def test_names(module: str) -> None:
    found = importlib.import_module(module)
    assert not [name for name in NAMES[module].split() if not hasattr(found, name)]


def test_members() -> None:
    assert not [name for name in METHODS if not callable(getattr(Sandbox, name, None))]
    assert not [name for name in FIELDS if name not in SandboxStatusResponse.model_fields]


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    yield monkeypatch
    logging.getLogger("compat-names").handlers.clear()


def test_settings_as_attributes(settled: pytest.MonkeyPatch) -> None:
    settled.delenv("ROCK_DEFAULT_CLUSTER", raising=False)
    assert env_vars.ROCK_DEFAULT_CLUSTER == "vpc-nt-a" and not env_vars.is_set("ROCK_DEFAULT_CLUSTER")
    settled.setenv("ROCK_SANDBOX_STARTUP_TIMEOUT_SECONDS", "7")
    settled.setenv("ROCK_OSS_ENABLE", "True")
    assert env_vars.ROCK_SANDBOX_STARTUP_TIMEOUT_SECONDS == 7 and env_vars.ROCK_OSS_ENABLE is True
    settled.setattr(env_vars, "ROCK_DEFAULT_CLUSTER", "mine", raising=False)
    assert env_vars.ROCK_DEFAULT_CLUSTER == "mine"
    with pytest.raises(AttributeError, match="ROCK_BASE_URL"):
        _ = env_vars.ROCK_NOTHING


def test_a_logger(tmp_path: Path, settled: pytest.MonkeyPatch) -> None:
    from rock.logger import init_logger

    settled.setenv("ROCK_LOGGING_PATH", str(tmp_path / "logs"))
    settled.setenv("ROCK_LOGGING_LEVEL", "WARNING")
    logger = init_logger("compat-names", "mine.log")
    assert logger is init_logger("compat-names")
    logger.info("quiet")
    logger.warning("loud")
    for handler in logger.handlers:
        handler.close()
    text = (tmp_path / "logs/mine.log").read_text()
    assert "loud" in text and "quiet" not in text


def test_helpers() -> None:
    calls: list[int] = []

    @retry_async(max_attempts=3, delay_seconds=0.001, jitter=True, exceptions=(KeyError,))
    async def fails(until: int) -> int:
        calls.append(until)
        if len(calls) < until:
            raise KeyError(until)
        return len(calls)

    assert run_until_complete(fails(3)) == 3
    calls.clear()
    with pytest.raises(KeyError):
        run_until_complete(fails(9))
    assert len(calls) == 3
    assert extract_nohup_pid("x PIDSTART71PIDEND y") == 71
    with pytest.raises(errors.InvalidConfig, match="no process id"):
        extract_nohup_pid("nothing")
    assert 0 < asyncio.run(find_free_port()) < 65536

    async def dead() -> bool:
        return False

    with pytest.raises(errors.Unavailable, match="no check succeeded"):
        asyncio.run(wait_until_alive(dead, timeout=0.1, sleep=0.01))


def test_a_background_command_step_by_step(server: RunningServer) -> None:
    async def main() -> None:
        async with Sandbox(SandboxConfig(base_url=server.url, image=IMAGE, memory="256m", disk="50g")) as sandbox:
            two = "sh -c 'echo one; sleep 0.3; echo two'"
            pid, failed = await sandbox.start_nohup_process(two, "/tmp/o", "default")
            assert failed is None and pid is not None
            done, message = await sandbox.wait_for_process_completion(pid, "default", 20, 10)
            assert done and "completed" in message
            seen = await sandbox.handle_nohup_output("/tmp/o", "default", done, message, False, None)
            assert (seen.output, seen.exit_code) == ("one\ntwo\n", 0)
            seen = await sandbox.handle_nohup_output("/tmp/o", "default", done, message, False, 3)
            assert (seen.output, seen.dropped_bytes) == ("one", 5)
            told = (await sandbox.handle_nohup_output("/tmp/o", "default", done, message, True, None)).output
            assert "Status: completed" in told and "8 bytes" in told
            pid, _ = await sandbox.start_nohup_process("sleep 60", "/tmp/late", "default")
            assert pid is not None
            done, message = await sandbox.wait_for_process_completion(pid, "default", 0.2)
            assert not done and f"Process {pid} did not complete" in message
            assert (await sandbox.handle_nohup_output("/tmp/late", "default", done, message)).exit_code == 1
            pid, failed = await sandbox.start_nohup_process("for x in", "/tmp/bad", "default")
            assert pid is None and failed is not None and failed.failure_reason
            status = await sandbox.get_status()
            assert status.disk == "50g" and status.create_time is not None and "+00:00" in status.create_time
            assert status.start_time is not None and status.stop_time is None
            assert [step.to_state for step in status.state_history][-1] == "running"

    asyncio.run(main())
