"""Runtimes that another installed distribution brings: one that works, and every way in which one may be at fault."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.conftest import RunningServer
from tests.leaks import Inventory

from rock import errors
from rock.sync import Client, Sandbox

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "adding-a-runtime.md"
FILE = re.compile(r"^`(\S+)`:\n\n```text\n(.*?)^```$", re.M | re.S)
BAD = '''
from rock.errors import Unsupported
from rock.protocol.sandbox import Isolation
from rock.runtime.fake import FakeRuntime

def raises(context):
    raise OSError("the engine's socket is missing")

def nothing(context):
    return object()

class Closed(FakeRuntime):
    name = "closed"
    async def open(self):
        raise Unsupported("the engine is not running", hint="start it")

class Rude(FakeRuntime):
    name = "rude"
    async def open(self):
        raise KeyError("surprise")

class Odd(FakeRuntime):
    name = "odd"
    async def sweep(self, known):
        raise ZeroDivisionError("sweep")

class Mute(FakeRuntime):
    name = "mute"
    traits = {}

def closed(context): return Closed()
def rude(context): return Rude()
def odd(context): return Odd()
def mute(context): return Mute()
'''
ENTRIES = {"raises": "raises", "nothing": "nothing", "closed": "closed", "rude": "rude", "odd": "odd", "mute": "mute",
           "misnamed": "closed", "process": "raises", "absent": "no_such_name"}  # fmt: skip
REASONS = {
    "raises": "socket is missing", "nothing": "no Runtime: it has no name, traits, open", "rude": "surprise",
    "closed": "the engine is not running", "mute": "traits", "misnamed": "calls itself 'closed'",
    "absent": "no_such_name",
}  # fmt: skip


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two installed distributions: that of the docs, and a bad one."""
    folder = tmp_path_factory.mktemp("site")
    files = dict(FILE.findall(PAGE.read_text()))
    package = next(name for name in files if name.endswith(".py"))
    (folder / package).write_text(files[package])
    (folder / "rock_bad.py").write_text(BAD)
    entries = {"rock_recorder": files["pyproject.toml"].partition("\n")[2].replace('"', ""),
               "rock_bad": "".join(f"{name} = rock_bad:{made}\n" for name, made in ENTRIES.items())}  # fmt: skip
    for name, text in entries.items():
        info = folder / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[rock.runtimes]\n{text}")
    return folder


@pytest.fixture(scope="module")
def beside(site: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    running = RunningServer(tmp_path_factory.mktemp("home"), PYTHONPATH=":".join([str(site), *sys.path]))
    running.start()
    yield running
    running.stop()
    running.assert_clean(Inventory())


def test_the_runtime_of_the_docs(beside: RunningServer) -> None:
    with Sandbox(image="any:1", runtime="recorder", base_url=beside.url) as sandbox:
        assert sandbox.arun("echo hello; (exit 3)").exit_code == 3
        assert sandbox.execute(["echo", "direct"]).stdout == "direct\n"
        lines = sorted((beside.home / "run" / "runtimes" / "recorder").glob("*.jsonl"))
        assert len(lines) == 1
        assert [json.loads(line) for line in lines[0].read_text().splitlines()][-1] == ["echo", "direct"]


@pytest.mark.parametrize("name", list(REASONS))
def test_a_broken_one_says_why(beside: RunningServer, name: str) -> None:
    with pytest.raises(errors.Unsupported, match=REASONS[name]) as caught:
        Sandbox(image="any:1", runtime=name, base_url=beside.url).start()
    assert "rock doctor" in str(caught.value)


def test_the_others_are_none_the_worse(beside: RunningServer) -> None:
    with Sandbox(image="any:1", runtime="odd", base_url=beside.url) as sandbox:
        assert sandbox.execute(["echo", "works"]).stdout == "works\n"
    with Sandbox(image="host", runtime="process", base_url=beside.url) as sandbox:  # its name cannot be taken
        assert sandbox.execute(["sh", "-c", "echo works"]).stdout == "works\n"
    with pytest.raises(errors.InvalidConfig, match=r"no runtime 'other' .*closed.*fake.*recorder"):
        Sandbox(image="any:1", runtime="other", base_url=beside.url).start()
    assert "runtime rude cannot be used: KeyError('surprise')" in beside.log()


def test_a_broken_default(site: Path, tmp_path: Path) -> None:
    for name, text in (("closed", "the engine is not running"), ("rude", None)):
        home = tmp_path / name
        home.mkdir()
        running = RunningServer(home, PYTHONPATH=":".join([str(site), *sys.path]), ROCK_RUNTIME=name)
        if text is not None:  # it says so itself: then there is nothing to serve
            with pytest.raises(AssertionError, match=text):
                running.start()
            assert "Traceback" not in running.log()
            continue
        running.start()
        with pytest.raises(errors.Unsupported, match="surprise"):
            Sandbox(image="any:1", base_url=running.url).start()
        running.stop()


def test_a_package_that_was_removed(site: Path, tmp_path: Path) -> None:
    running = RunningServer(tmp_path, PYTHONPATH=":".join([str(site), *sys.path]))
    running.start()
    sandbox = Sandbox(image="any:1", runtime="recorder", base_url=running.url)
    sandbox.start()
    running.kill()
    running.environment["PYTHONPATH"] = ":".join(sys.path)
    running.start()
    with Client(running.url) as client:
        info = client.get_sandbox(str(sandbox.sandbox_id))
        assert info.state == "stopped" and info.cause == "lost"
    running.stop()


def test_doctor_tries_them(site: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "rock.cli.main", "doctor", "--json"], capture_output=True, text=True, timeout=100,
        env={"PYTHONPATH": ":".join([str(site), *sys.path]), "PATH": "/usr/bin:/bin", "HOME": str(site)},
    )  # fmt: skip
    found = {each["name"]: each for each in json.loads(done.stdout)}
    assert found["runtime recorder"]["ok"] is True and found["runtime odd"]["ok"] is True
    for name, reason in REASONS.items():
        assert found[f"runtime {name}"]["ok"] is False
        assert re.search(reason, found[f"runtime {name}"]["detail"]), found[f"runtime {name}"]
    assert done.returncode == 1 and "runtime process" not in found
