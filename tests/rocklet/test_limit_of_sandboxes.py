"""The limit of sandboxes of a worker: a setting, or what memory and file descriptors permit."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest

from rock import errors
from rock.host import resources
from rock.runtime.namespace import probe
from rock.settings import Settings
from rock.sync import Sandbox
from rock.testing import FakeServer

_LOOK = "from rock.host import resources; print(*resources.sandboxes())"


def _derived(files: int) -> tuple[int, str]:
    """What a process with this soft limit of descriptors derives."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    program = f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, ({files}, {hard})); {_LOOK}"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    number, _, reason = found.stdout.strip().partition(" ")
    return int(number), reason


def test_descriptors_limit_the_number() -> None:
    assert _derived(700) == (262, "700 file descriptors (ulimit -n), 2 each for idle ones")


def test_memory_limits_the_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "read", lambda: (40 << 20, 0))
    assert resources.sandboxes() == (10, "40 MB of memory, 4 each")


def test_the_error_names_limit_and_setting() -> None:
    with FakeServer(sandbox_limit=1) as server:
        with Sandbox(base_url=server.url), \
                pytest.raises(errors.NoCapacity, match="limit of sandboxes: 1 on 1") as caught:
            Sandbox(base_url=server.url, startup_timeout=1).start()
        assert "ROCK_SANDBOX_LIMIT" in (caught.value.hint or "")


def test_a_negative_limit_is_refused() -> None:
    with pytest.raises(ValueError, match="ROCK_SANDBOX_LIMIT=-1 is below 0"):
        Settings.read(sandbox_limit=-1)


def test_the_report_of_the_host_names_the_limit_of_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "read", lambda: (64 << 30, 0))
    files = resources.open_files(hard=True)
    found = next(one for one in probe.host_report() if one.name == "open files")
    if files is None:
        assert found.ok and found.detail == "no limit"
    else:
        most = (files - files // 4) // 2
        assert found.detail == f"{files}: {most} sandboxes with sessions at most"
        enough = most >= (64 << 30) // resources.MEMORY_EACH
        assert found.ok is (True if enough else None) and bool(found.hint) != enough
