"""An installation without the server, on other platforms, and beside distributions with a package of the same name."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import rock
from rock.cli import installation
from rock.errors import Conflict

# A finder that hides the modules of the extra `server`, and all that only they need.
WITHOUT = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Hidden())
"""
SERVER_ONLY = {*installation.SERVER, "starlette", "uvloop", "httptools", "anyio"}
CLIENT = ["rock", "rock.sync", "rock.sdk.sandbox.client", "rock.sdk.harbor", "rock.training", "rock.actions",
          "rock.envs", "rock.sdk.envhub", "rock.cli.main", "rock.cli.commands.sandbox", "rock.cli.commands.run",
          "rock.cli.commands.observe", "rock.cli.commands.logs", "rock.cli.commands.context", "rock.cli.commands.image",
          "rock.cli.commands.env", "rock.cli.commands.copy", "rock.cli.commands.terminal"]  # fmt: skip
# Modules that CPython has on Linux only, or not on Windows.
LINUX_ONLY: dict[str, set[str]] = {
    "win32": {"fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "readline", "syslog"}, "darwin": set(),
}  # fmt: skip
# Imported before the platform is faked: code that is not ours and looks at the platform when it is imported.
LIBRARIES = """
import asyncio, bz2, concurrent.futures, ctypes, fractions, hashlib, importlib.metadata, ipaddress, lzma
import multiprocessing, pydantic, queue, secrets, shutil, sqlite3, ssl, subprocess, sysconfig, tarfile, tempfile, click
import urllib.request, uuid, uvicorn, webbrowser, websockets.asyncio.client, zipfile, zoneinfo
sysconfig.get_config_vars()
"""
FAKED = """
import os, signal, socket, sys
sys.platform = {platform!r}
import platform
platform.system = lambda: {system!r}
for module, names in ((os, ["fork", "setns", "unshare", "pidfd_open", "memfd_create", "O_PATH", "splice", "eventfd",
                             "sched_setaffinity", "sched_getaffinity", "posix_fallocate", "statvfs", "mkfifo"]),
                      (signal, ["pidfd_send_signal"]), (socket, ["SO_PEERCRED", "SCM_CREDENTIALS", "AF_NETLINK"])):
    for name in names:
        if hasattr(module, name):
            delattr(module, name)
if {platform!r} == "win32":
    for module, names in ((os, ["geteuid", "getuid", "getgid", "chown", "setsid", "getpgid", "killpg", "WNOHANG"]),
                          (signal, ["SIGCHLD", "SIGKILL", "SIGHUP", "SIGUSR1", "SIGALRM", "pthread_sigmask"]),
                          (socket, ["AF_UNIX"])):
        for name in names:
            if hasattr(module, name):
                delattr(module, name)
"""


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("module", CLIENT)
def test_the_client_imports_without_the_server(module: str) -> None:
    done = python(WITHOUT.format(names=SERVER_ONLY) + f"import {module}")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "words", [["admin", "start"], ["bench"], ["ps", "--base-url", "x"]], ids=lambda words: " ".join(words)
)
def test_a_command_of_the_server_tells_how_to_install_it(words: list[str], tmp_path: Path) -> None:
    code = WITHOUT.format(names=SERVER_ONLY) + "from rock.cli.main import main; main()"
    done = python(f"import os; os.environ['ROCK_HOME'] = {str(tmp_path)!r}" + code, *words)
    assert "Traceback" not in done.stderr and done.returncode in (1, 2), done.stderr
    if words[0] != "ps":
        assert "pip install 'rock-sandbox[server]'" in done.stderr


def test_testing_tells_how_to_install_it() -> None:
    done = python(WITHOUT.format(names=SERVER_ONLY) + "import rock.testing")
    assert "ImportError: rock.testing runs a server: pip install 'rock-sandbox[server]'" in done.stderr


@pytest.mark.parametrize("platform", LINUX_ONLY)
@pytest.mark.parametrize("module", [*CLIENT, "rock.testing"])
def test_the_client_imports_on_other_platforms(platform: str, module: str) -> None:
    """With a faked platform, from which everything is removed that Python lacks there."""
    hidden = WITHOUT.format(names=LINUX_ONLY[platform])
    forget = f"for name in {LINUX_ONLY[platform]!r}: sys.modules.pop(name, None)\n"
    faked = FAKED.format(platform=platform, system={"win32": "Windows", "darwin": "Darwin"}[platform])
    done = python("\n".join([LIBRARIES, faked, hidden, forget, f"import {module}"]))
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.skipif(not os.environ.get("ROCK_TEST_INSTALL"), reason="installs with pip: set ROCK_TEST_INSTALL=1")
def test_the_client_is_at_most_8_distributions(tmp_path: Path) -> None:
    """A new virtual environment with the wheel, without extras: what is installed, and that the command works."""
    root = Path(__file__).parent.parent.parent
    source = tmp_path / "source"
    shutil.copytree(root, source, ignore=shutil.ignore_patterns(".venv", ".git", "build", "*.egg-info", "tests"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    subprocess.run([*pip, "wheel", "--no-deps", "-w", str(tmp_path), str(source)], check=True, timeout=600)
    (wheel,) = tmp_path.glob("rock_sandbox-*.whl")
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    inside = str(tmp_path / "venv" / "bin" / "python")
    before = distributions(inside)
    subprocess.run([inside, *pip[1:], "install", str(wheel)], check=True, timeout=600)
    added = distributions(inside) - before - {"rock-sandbox"}
    assert {"pydantic", "orjson", "websockets", "click"} <= added and len(added) <= 8, added
    shown = subprocess.run([str(tmp_path / "venv" / "bin" / "rock"), "--help"], capture_output=True, text=True)
    assert shown.returncode == 0 and "Sandboxes:" in shown.stdout, shown.stderr


def distributions(python: str) -> set[str]:
    """The names of the distributions of an environment."""
    done = subprocess.run([python, "-m", "pip", "list", "--format", "json", "--disable-pip-version-check"], check=True,
                          capture_output=True, text=True)  # fmt: skip
    return {item["name"].lower().replace("_", "-") for item in json.loads(done.stdout)}


def test_a_distribution_that_overwrites_this_one_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert installation.conflicts() == []
    info = tmp_path / "rl_rock-1.11.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: rl-rock\nVersion: 1.11.0\n")
    (info / "RECORD").write_text("rock/__init__.py,,\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    (sentence,) = installation.conflicts()
    assert sentence.startswith("the distribution rl-rock 1.11.0 has a package `rock` too")
    (tmp_path / "rock").symlink_to(Path(rock.__file__).parent)
    (sentence,) = installation.conflicts()
    assert "overwrites files in" in sentence
    with pytest.raises(Conflict, match="pip uninstall rl-rock"):
        installation.require_server()
