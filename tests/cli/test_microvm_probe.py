"""Engines of micro virtual machines are believed when one has booted, and not before."""

from __future__ import annotations

import importlib
import importlib.util
import os
import time
from pathlib import Path

import pytest

from rock.host import microvm

_ENGINE = """
class SimpleBox:
    def __init__(self, rootfs_path, memory_mib, cpus):
        self.path = rootfs_path
    async def __aenter__(self):
        {enter}
        return self
    async def __aexit__(self, *_):
        pass
    async def exec(self, *argv):
        import pathlib, types
        assert (pathlib.Path(self.path) / "oci-layout").exists()
        return types.SimpleNamespace(stdout="booted\\n")
"""


@pytest.fixture(autouse=True)
def _a_device() -> None:
    if not os.path.exists("/dev/kvm"):
        pytest.skip("no /dev/kvm: an engine is not tried")


def _engine(folder: Path, monkeypatch: pytest.MonkeyPatch, enter: str) -> None:
    """An engine of the name, that does something else than boot: what we are to make of it is what is tested."""
    (folder / "boxlite").mkdir()
    (folder / "boxlite" / "__init__.py").write_text(_ENGINE.replace("{enter}", enter))
    monkeypatch.syspath_prepend(str(folder))
    importlib.invalidate_caches()


def test_one_that_is_not_installed() -> None:
    if any(importlib.util.find_spec(name) for name in microvm.ENGINES):
        pytest.skip("an engine is installed here")
    for name in microvm.ENGINES:
        assert microvm.try_engine(name) == microvm.Boot(name, None, "not installed")


def test_one_that_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _engine(tmp_path, monkeypatch, "pass")
    assert microvm.try_engine("boxlite").ok is True


def test_one_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _engine(tmp_path, monkeypatch, "raise OSError('no virtualization')")
    boot = microvm.try_engine("boxlite")
    assert boot.ok is False
    assert "no virtualization" in boot.detail


def test_one_that_never_answers_is_ended_with_all_that_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    note = tmp_path / "helper"
    _engine(tmp_path, monkeypatch, f"""
        import subprocess, sys, time
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        open({str(note)!r}, "w").write(str(child.pid))
        time.sleep(600)
""")
    boot = microvm.try_engine("boxlite", patience=4.0)
    assert boot.ok is False
    assert "no answer in 4 s" in boot.detail
    helper, end = int(note.read_text()), time.monotonic() + 10
    while os.path.exists(f"/proc/{helper}") and time.monotonic() < end:
        time.sleep(0.05)
    assert not os.path.exists(f"/proc/{helper}")
