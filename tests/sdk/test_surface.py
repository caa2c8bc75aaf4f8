"""What users import: every path of ROCK's that this project has, on any system, and quickly."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

PATHS = {
    "rock": "make RockEnv Sandbox SandboxConfig SandboxGroup SandboxGroupConfig codes RockException "
    "BadRequestRockError InternalServerRockError CommandRockError raise_for_code",
    "rock.sdk.sandbox.client": "Sandbox SandboxGroup RunMode RunModeType",
    "rock.sdk.sandbox.config": "BaseConfig SandboxConfig SandboxGroupConfig",
    "rock.sdk.sandbox.request": "CreateBashSessionRequest Command BashAction Action UploadRequest",
    "rock.sdk.sandbox": "Sandbox SandboxConfig SandboxGroup SandboxGroupConfig RunMode",
    "rock.actions": "Action BashAction Command CreateBashSessionRequest CloseSessionRequest CloseBashSessionRequest "
    "ReadFileRequest WriteFileRequest UploadRequest UploadMode Observation BashObservation CommandResponse "
    "CreateBashSessionResponse CloseBashSessionResponse ReadFileResponse WriteFileResponse UploadResponse "
    "IsAliveResponse SandboxResponse SandboxStatusResponse OssSetupResponse ExecuteBashSessionResponse "
    "CloseResponse ChownRequest ChmodRequest RunMode",
    "rock.actions.sandbox.request": "Command CreateBashSessionRequest ChownRequest ChmodRequest",
    "rock.actions.sandbox.response": "Observation ChownResponse ChmodResponse DownloadFileResponse State",
    "rock.actions.sandbox.base": "AbstractSandbox",
    "rock.sdk.envs": "make RockEnv",
    "rock.sdk.common.exceptions": "RockException BadRequestRockError InternalServerRockError CommandRockError "
    "InvalidParameterRockException raise_for_code SandboxNotFoundRockError",
    "rock.sdk.sandbox.runtime_env": "RuntimeEnv RuntimeEnvConfig PythonRuntimeEnv PythonRuntimeEnvConfig "
    "NodeRuntimeEnv NodeRuntimeEnvConfig RuntimeEnvConfigType",
    "rock.sdk.envhub.client": "EnvHubClient EnvHubError EnvHubClientConfig RockEnvInfo",
    "rock.sdk.envhub.schema": "RockEnvInfo EnvHubClientConfig",
    "rock.sdk.envhub": "EnvHubClient",
    "rock.sdk.sandbox.speedup": "SpeedupType",
    "rock.sync": "Sandbox SandboxConfig SandboxGroup SandboxGroupConfig RunMode Client",
    "rock.sync.sandbox.client": "Sandbox SandboxGroup",
    "rock.sdk": "Client Sandbox",
}


@pytest.mark.parametrize("module", PATHS)
def test_names(module: str) -> None:
    found = importlib.import_module(module)
    for name in PATHS[module].split():
        assert getattr(found, name) is not None
    if hasattr(found, "__all__"):
        assert set(PATHS[module].split()) <= set(found.__all__) or module == "rock"
        for name in found.__all__:
            assert getattr(found, name) is not None


def test_one_class_under_every_path() -> None:
    from rock import Sandbox
    from rock.actions import Action, BashAction
    from rock.actions.sandbox.base import AbstractSandbox
    from rock.sdk.sandbox.client import Sandbox as Same
    from rock.sdk.sandbox.request import BashAction as SameAction
    from rock.sync import Sandbox as Blocking

    assert Sandbox is Same and BashAction is SameAction
    assert Blocking.__module__ != Sandbox.__module__
    assert Action(session="s", command="c").check == "raise"
    assert isinstance(Sandbox(), AbstractSandbox)


def test_codes() -> None:
    from rock import codes, errors, raise_for_code

    assert codes.BAD_REQUEST == 4000 and codes.get_reason_phrase(5000) == "Internal Server Error"
    assert codes.OK.phrase == "OK" and codes.get_reason_phrase(1) == ""
    assert errors.Conflict.rock_code is codes.BAD_REQUEST and codes.is_error(6100) and not codes.is_error(2000)
    for code in (None, 2000, 2999):
        raise_for_code(code)
    for code, kind in ((4000, errors.BadRequestRockError), (5999, errors.InternalServerRockError),
                       (6000, errors.CommandRockError), (3000, errors.RockException)):  # fmt: skip
        with pytest.raises(kind, match="why"):
            raise_for_code(code, "why")


def test_misspelt_and_bad_configs() -> None:
    from rock import Sandbox, SandboxConfig, SandboxGroup

    with pytest.raises(ValueError, match="memry"):
        SandboxConfig(memry="8g")  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="sise"):
        SandboxGroup(sise=2)
    with pytest.raises(ValueError, match="Invalid memory size"):
        Sandbox(memory="much")
    from rock.errors import InvalidConfig

    with pytest.raises(InvalidConfig, match="base_url"):
        Sandbox(base_url="localhost:1")


def test_the_group_hands_its_config_on() -> None:
    from rock import SandboxGroup, SandboxGroupConfig

    group = SandboxGroup(
        SandboxGroupConfig(base_url="http://x:1", api_key="k", size=3, image="i", sandbox_id="g", env={"A": "1"})
    )
    assert [sandbox.config.sandbox_id for sandbox in group.sandbox_list] == ["g-0", "g-1", "g-2"]
    config = group.sandbox_list[0].config
    assert (config.base_url, config.api_key, config.image, config.env) == ("http://x:1", "k", "i", {"A": "1"})
    assert not hasattr(config, "size")


BLOCKED = """
import sys
for name in ("fcntl", "resource", "pty", "termios", "tty", "grp", "pwd", "uvloop", "uvicorn", "fastapi"):
    sys.modules[name] = None
import rock, rock.sdk, rock.sync, rock.envs, rock.actions, rock.sdk.sandbox, rock.sync.sandbox, rock.sync.client
import rock.sdk.client, rock.cli.main, rock.cli.commands.copy, rock.cli.commands.sandbox
rock.Sandbox, rock.make, rock.sync.Sandbox, rock.sync.Client
print("ok")
"""


def test_the_client_needs_nothing_that_only_unix_has() -> None:
    done = subprocess.run([sys.executable, "-W", "error", "-c", BLOCKED], capture_output=True, text=True, check=False)
    assert done.stdout == "ok\n", done.stderr


def test_import_rock_loads_next_to_nothing() -> None:
    text = (
        "import sys, rock; print(sorted(m for m in sys.modules if m.split('.')[0] in ('rock', 'pydantic', 'asyncio')))"
    )
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['rock']"


def test_the_blocking_sdk_is_generated_from_the_asynchronous_one() -> None:
    root = Path(__file__).parent.parent.parent
    done = subprocess.run([sys.executable, "tools/unasync.py", "--check"], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_both_faces_have_the_same_names() -> None:
    from rock import sdk, sync
    from rock.sdk import primitives
    from rock.sdk.sandbox import sandbox as one
    from rock.sync import primitives as blocking_primitives
    from rock.sync.sandbox import sandbox as other

    assert sdk.__all__ == sync.__all__
    public = {name for name in dir(one.Sandbox) if not name.startswith("_")}
    assert public == {name for name in dir(other.Sandbox) if not name.startswith("_")}
    for name in ("connect", "gather", "in_thread", "receive", "resolve", "scope", "send", "settle", "sleep"):
        assert callable(getattr(primitives, name)) and callable(getattr(blocking_primitives, name))
