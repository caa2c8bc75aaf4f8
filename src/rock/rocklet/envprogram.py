"""The program that hosts environments, as it is started inside, and the pipes to it."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Literal

from rock.guest import envhost, frames
from rock.rocklet.envwire import Inlet, Outlet, OwnInlet, Tail
from rock.runtime.base import Process, Program
from rock.runtime.image.host import PYTHON_LIBRARIES

_ENVIRONMENT = {
    "LANG": "C.UTF-8", "HOME": "/tmp", "MPLCONFIGDIR": "/tmp",
    # Some environments iterate over sets of words: with this a seed gives the same episode in every process
    "PYTHONHASHSEED": "0", "PYTHONPATH": "",
    # A Python that is built with a shared library finds it by its own path, and that is another one inside; without
    # this it would take the machine's library of the same name, whose modules do not fit
    "LD_LIBRARY_PATH": PYTHON_LIBRARIES,
    # Threads do not survive a fork
    "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "NUMEXPR_NUM_THREADS": "1",
}  # fmt: skip
_MODULES = ("values", "frames", "spaces", "tasks", "hosting", "player", "envhost")
_LOADER = """import base64, json, sys, types, zlib
if sys.version_info < (3, 10):
    sys.exit("Python 3.10 or newer is needed, and this is " + sys.version)
for name in ("rock", "rock.guest"):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = []
for name, text in json.loads(zlib.decompress(base64.b64decode("{packed}"))):
    sys.modules[name] = module = types.ModuleType(name)
    setattr(sys.modules["rock.guest"], name.rpartition(".")[2], module)
    exec(compile(text, name, "exec"), module.__dict__)
sys.modules["rock.guest.envhost"].main()
"""


def program(folder: str | None, python: str, key: str, adapter: str = "") -> Program:
    """The host; `folder`: where its packages are inside, None for an image whose `python` has them itself; adapter:
    what guest/tasks.py installs of a training set."""
    channels: dict[int, Literal["r", "w", "m"]] = dict.fromkeys((envhost.REQUESTS, *envhost.PIPES), "r")
    channels.update(dict.fromkeys((envhost.ANSWERS, *(pipe + envhost.OWN for pipe in envhost.PIPES)), "w"))
    channels[envhost.MEMORY] = "m"
    if folder is None:
        # What makes our Python find its own must not lead the image's astray
        own = {name: value for name, value in _ENVIRONMENT.items() if name not in ("PYTHONPATH", "LD_LIBRARY_PATH")}
        return Program([python, "-B", "-X", "utf8", "-c", source(), "", adapter], env=own, stdout="null", stderr="pipe",
                       channels=channels, key=key, keep=True)  # fmt: skip
    return Program(
        [python, "-s", "-P", "-B", "-X", "utf8", "-c", source(), f"{folder}/site", adapter],
        env={**_ENVIRONMENT, "NLTK_DATA": f"{folder}/nltk_data"}, cwd="/", stdout="null", stderr="pipe",
        channels=channels, key=key, keep=True,
    )  # fmt: skip


@cache
def source() -> str:
    """The program itself: given on the command line, so nothing has to be put into the image.

    It is packed, as one argument may have 128 KiB.
    """
    folder = Path(envhost.__file__).parent
    modules = [(f"rock.guest.{name}", (folder / f"{name}.py").read_text(encoding="utf-8")) for name in _MODULES]
    packed = base64.b64encode(zlib.compress(json.dumps(modules).encode(), 9)).decode()
    return _LOADER.format(packed=packed)


class Link:
    """The pipes to the host."""

    def __init__(
        self,
        process: Process,
        answered: Callable[[bytes | bytearray, int | None], None],
        ended: Callable[[str | None], None],
        nonsense: Callable[[int, str], None],
    ) -> None:
        self.process = process
        self.inlet = Inlet(process.channels[envhost.ANSWERS], lambda frame: answered(frame, None), ended)
        self.tail = Tail(process.stderr)
        self.own: dict[int, OwnInlet] = {}
        for pipe in envhost.PIPES:
            self._add(pipe, answered, nonsense)
        self.memory = _sealed(process.channels.get(envhost.MEMORY))
        self.outlets = {pipe: Outlet(process.channels[pipe]) for pipe in (envhost.REQUESTS, *envhost.PIPES)}

    def _add(
        self, pipe: int, answered: Callable[[bytearray, int | None], None], nonsense: Callable[[int, str], None]
    ) -> None:
        self.own[pipe + envhost.OWN] = OwnInlet(
            self.process.channels[pipe + envhost.OWN],
            lambda frame: answered(frame, pipe),
            lambda why: nonsense(pipe, why),
        )

    def stop(self) -> None:
        self.inlet.stop()
        self.tail.stop()
        for own in self.own.values():
            own.stop()
        for outlet in self.outlets.values():
            outlet.drop()


def _sealed(memory: int | None) -> int | None:
    """The memory when whoever maps it can rely on its size: it came from inside, and what is cut off kills a reader."""
    if memory is None:
        return None
    try:
        seals = fcntl.fcntl(memory, fcntl.F_GET_SEALS)
        whole = os.fstat(memory).st_size >= len(envhost.PIPES) * frames.PART
    except OSError:
        return None
    return memory if whole and seals & fcntl.F_SEAL_SHRINK else None
