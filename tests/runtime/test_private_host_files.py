"""Folders of the host that a sandbox may write over: it reads there what everybody may read at that moment."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from rock.images.records import Bind
from rock.protocol.sandbox import SandboxConfig
from tests.runtime.boxes import ROOT, Box, HandMade, namespace_runtime, run

pytestmark = pytest.mark.skipif(not ROOT, reason="an ordinary user has no folders that are mapped")
_SECRET = "for root alone"


def _make(path: Path, mode: int, *, owner: int = 0, group: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_SECRET)
    os.chown(path, owner, group)
    path.chmod(mode)


def _host(folder: Path) -> Path:
    """A folder as /usr is one: what everybody may read, beside what only some may."""
    usr = folder / "usr-of-host"
    usr.mkdir(mode=0o755)
    _make(usr / "share/public", 0o644)
    _make(usr / "share/deep/er/secret", 0o600)
    _make(usr / "share/of-the-group", 0o640)
    _make(usr / "share/of-mail", 0o660, owner=8, group=8)
    _make(usr / "share/of-another-id", 0o400, owner=70_000, group=70_000)
    _make(usr / "bin/set-user-id", 0o4755)
    _make(usr / "bin/for-staff", 0o4750, group=50)
    _make(usr / "closed/inside", 0o644)
    (usr / "closed").chmod(0o700)
    return usr


_LOOK = """
import os, sys
for top, folders, files in os.walk("/opt/host"):
    for name in files:
        path = os.path.join(top, name)
        try:
            print(path[10:], "read" if open(path).read() == sys.argv[1] else "other")
        except PermissionError:
            print(path[10:], "refused")
print("closed", "listed" if os.access("/opt/host/closed", os.R_OK) and os.listdir("/opt/host/closed") else "refused") \
    if os.path.exists("/opt/host/closed") else None
"""


async def _seen(box: Box) -> dict[str, str]:
    script = _LOOK.replace('os.access("/opt/host/closed", os.R_OK) and os.listdir("/opt/host/closed")', "_list()")
    script = "import os\ndef _list():\n    try:\n        return os.listdir('/opt/host/closed')\n" \
             "    except PermissionError:\n        return []\n" + script
    _, out, err = await box.run(box.interpreter, "-I", "-S", "-c", script, _SECRET)
    assert not err, err.decode()
    return dict(line.rsplit(" ", 1) for line in out.decode().splitlines())


_EXPECTED = {
    "share/public": "read", "share/deep/er/secret": "refused", "share/of-the-group": "refused",
    "share/of-mail": "refused", "share/of-another-id": "refused", "bin/set-user-id": "read",
    "bin/for-staff": "refused", "closed": "refused",
}  # fmt: skip


def _with_boxes(tmp_path: Path, main: Callable[..., object]) -> None:
    usr = _host(tmp_path)
    images = HandMade(tmp_path / "image")
    (images.layer / "opt/host").mkdir(parents=True)
    images.binds = (*images.binds, Bind(str(usr), "/opt/host", writable=True, idmap=True))

    async def whole() -> None:
        async with namespace_runtime(tmp_path, images=images) as runtime:
            made: list[Box] = []

            async def fresh() -> Box:
                handle = await runtime.create(f"s{len(made)}", SandboxConfig(image="hand", memory="256m", cpus=1))
                made.append(Box(runtime, handle, Path("/work")))
                return made[-1]

            await main(usr, fresh)  # type: ignore[misc]
            for box in made:
                box.close()
                await runtime.destroy(box.handle)

    run(whole())


def test_only_what_everybody_may_read_is_read(tmp_path: Path) -> None:
    async def main(usr: Path, fresh: Callable[..., object]) -> None:
        assert await _seen(await fresh()) == _EXPECTED  # type: ignore[misc, arg-type]

    _with_boxes(tmp_path, main)


def test_a_file_that_becomes_private_is_refused_at_once(tmp_path: Path) -> None:
    """In a sandbox that runs, also when it has read the file before, and in a new one."""

    async def main(usr: Path, fresh: Callable[..., object]) -> None:
        running: Box = await fresh()  # type: ignore[misc]
        assert await _seen(running) == _EXPECTED
        _make(usr / "share/deep/er/later", 0o600)
        (usr / "share/public").chmod(0o600)
        expected = {**_EXPECTED, "share/deep/er/later": "refused", "share/public": "refused"}
        assert await _seen(running) == expected
        assert await _seen(await fresh()) == expected  # type: ignore[misc, arg-type]
        (usr / "share/public").chmod(0o644)
        assert (await _seen(running))["share/public"] == "read"

    _with_boxes(tmp_path, main)


def test_root_inside_still_writes_anywhere(tmp_path: Path) -> None:
    async def main(usr: Path, fresh: Callable[..., object]) -> None:
        box: Box = await fresh()  # type: ignore[misc]
        out = await box.sh("""
            set -e; cd /opt/host
            echo mine >> share/public; tail -n 1 share/public
            echo new > share/deep/new; chmod 600 share/deep/new; cat share/deep/new
            mkdir -p lib/python/site; touch lib/python/site/module.py; mv share/public share/moved
            rm share/deep/er/secret; [ ! -e share/deep/er/secret ]; chown 8:8 share/deep/new
            chmod 755 share; stat -c %U:%a share; ls | tr '\\n' ' '
            ! cp share/of-the-group /tmp/stolen 2>/dev/null; ! ln share/of-the-group /tmp/x 2>/dev/null
            chmod 644 share/of-the-group 2>/dev/null || echo private stays
        """)
        assert out.split() == [*f"{_SECRET}mine new root:755 bin closed lib share private stays".split()], out
        assert (usr / "share/public").read_text() == _SECRET and not (usr / "lib").exists()
        assert (usr / "share/deep/er/secret").exists()

    _with_boxes(tmp_path, main)
