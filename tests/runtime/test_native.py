"""The compiled extension: its sources, how it is found, and the fork fallback where it is not there."""

from __future__ import annotations

import ast
import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rock.guest.init import native, process_tree
from rock.protocol.sandbox import SandboxConfig
from rock.runtime.init import python as guest_python
from rock.runtime.namespace.launcher import kernel, snapshot
from rock.runtime.namespace.runtime import NamespaceRuntime
from tests.runtime.boxes import Box, HandMade, run

HERE = Path(__file__).parents[2]
SOURCES = HERE / "native"
COMPILERS = {"x86_64": "x86_64-linux-gnu-gcc", "aarch64": "aarch64-linux-gnu-gcc"}  # Debian's names; here just cc
compiled = pytest.mark.skipif(native.library is None, reason=f"no extension: {native.missing}")


def compiler(machine: str) -> str:
    """The C compiler for a machine, or the test is skipped."""
    if os.uname().machine not in COMPILERS:
        pytest.skip("the extension is not for this machine")
    path = shutil.which("cc") if machine == os.uname().machine else shutil.which(COMPILERS[machine])
    if path is None:
        pytest.skip(f"no C compiler for {machine}")
    return path


def build_options() -> dict[str, Any]:
    """The constants of setup.py, which cannot be imported where setuptools is missing or old."""
    found = {}
    for node in ast.parse((HERE / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id] = ast.literal_eval(node.value)
    return found


def compile_library(machine: str, target: Path, *more: str, program: str | None = None) -> Path:
    """The extension, as setup.py builds it, with warnings as errors."""
    options = build_options()
    command = [program or compiler(machine), *options["COMPILE"], "-Werror", "-shared", *options["SOURCES"]]
    subprocess.run([*command, *options["LINK"], *more, "-o", str(target)], cwd=HERE, check=True)
    return target


def without_library(folder: Path) -> Path:
    """A copy of the package as it is installed without the extension: what to put into PYTHONPATH."""
    shutil.copytree(HERE / "src" / "rock", folder / "rock", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    return folder


def environment(path: Path, **more: str) -> dict[str, str]:
    """For a Python that has the package at `path`, and what this one has."""
    paths = [str(path), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": ":".join(paths), **more}


def python(path: Path, *words: str, cwd: Path) -> str:
    """What a Python prints that has the package at `path`."""
    done = subprocess.run([sys.executable, *words], env=environment(path), cwd=cwd, capture_output=True, text=True,
                          timeout=120)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---- the sources


@pytest.mark.parametrize("machine", COMPILERS)
def test_it_compiles_without_warnings_and_needs_no_library(machine: str, tmp_path: Path) -> None:
    library = compile_library(machine, tmp_path / native.NAME)
    if machine == os.uname().machine:
        assert native.Library(str(library)).path == str(library)
    if shutil.which("readelf"):
        command = ["readelf", "-dW", "--dyn-syms", str(library)]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert "NEEDED" not in report
        assert re.findall(r"UND (\S+)", report) == [], "undefined symbols"
        assert set(re.findall(r"GLOBAL DEFAULT +\d+ (\S+)", report)) == {
            "rock_native_version", "rock_start_program", "rock_run_zygote", "rock_share_pages"}  # fmt: skip


@pytest.mark.skipif(shutil.which("clang") is None, reason="no clang")
def test_clang_compiles_it_too(tmp_path: Path) -> None:
    library = compile_library(os.uname().machine, tmp_path / native.NAME, program="clang")
    assert native.Library(str(library)).path == str(library)


@pytest.mark.parametrize("machine", COMPILERS)
def test_system_call_numbers_are_the_kernel_s(machine: str) -> None:
    """In C and in the tables of Python, as the kernel's header has them."""
    names = sorted({*native._NUMBERS[machine], *kernel._TABLE[machine]})
    own = sorted(set(re.findall(r"#define CALL_(\w+)", (SOURCES / "syscall.h").read_text())))
    in_snapshot = ("write", "mmap", "pread64", "madvise", "fcntl")
    text = '#include "syscall.h"\n#include <asm/unistd.h>\n'
    text += "".join(f"value {name} __NR_{name}\n" for name in (*names, *in_snapshot))
    text += "".join(f"own {name.lower()} __NR_{name.lower()} CALL_{name}\n" for name in own)
    done = subprocess.run([compiler(machine), "-E", "-P", "-I", str(SOURCES), "-"], input=text, capture_output=True,
                          text=True)  # fmt: skip
    if "asm/unistd.h" in done.stderr:
        pytest.skip("no kernel headers")
    assert done.returncode == 0, done.stderr
    values = {name: int(number) for name, number in re.findall(r"value (\w+) (\d+)", done.stdout)}
    for table in (native._NUMBERS[machine], kernel._TABLE[machine]):
        assert {name: values[name] for name in table} == table
    assert tuple(values[name] for name in in_snapshot) == snapshot._NUMBERS[machine]
    pairs = re.findall(r"own (\w+) (\d+) (\d+)", done.stdout)
    assert len(pairs) == len(own) == 16
    assert [name for name, theirs, ours in pairs if theirs != ours] == []


# ---- how it is found


def test_it_is_built_where_it_is_looked_for() -> None:
    options = build_options()
    place = HERE.joinpath("src", *options["LIBRARY"].split(".")).with_suffix(".so")
    assert place == Path(native.__file__).with_name(native.NAME)
    assert sorted(options["SOURCES"]) == sorted(f"native/{path.name}" for path in SOURCES.glob("*.c"))


def test_an_older_library_is_refused(tmp_path: Path) -> None:
    library = compile_library(os.uname().machine, tmp_path / native.NAME, "-Drock_native_version=rock_old_version")
    with pytest.raises(OSError, match=f"version 0 instead of {native._VERSION}"):
        native.Library(str(library))


def test_a_library_of_another_machine_is_refused(tmp_path: Path) -> None:
    other = next(machine for machine in COMPILERS if machine != os.uname().machine)
    library = compile_library(other, tmp_path / native.NAME)
    with pytest.raises(OSError, match=re.escape(native.NAME)):
        native.Library(str(library))


def test_what_is_no_library_is_refused(tmp_path: Path) -> None:
    (tmp_path / native.NAME).write_bytes(b"\x7fELF and nothing more")
    with pytest.raises(OSError, match=re.escape(native.NAME)):
        native.Library(str(tmp_path / native.NAME))
    with pytest.raises(OSError, match="not built"):
        native.Library(str(tmp_path / "missing.so"))


@compiled
def test_a_container_s_python_has_it_too(tmp_path: Path) -> None:
    """Docker's and gVisor's pid 1 runs a copy of the modules; the library is loaded from there."""
    made = guest_python.prepare(tmp_path / "guests")
    ask = "from rock.guest.init import native; print(native.library.path)"
    report = python(made.folder / "modules", "-S", "-c", ask, cwd=tmp_path).strip()
    assert Path(report).parent == made.folder / "modules" / "rock" / "guest" / "init"


# ---- starting a program


@compiled
def test_a_child_stops_at_the_first_call_that_fails() -> None:
    table = native.Table()
    table.session(None)
    table.folder("/there/is/no/such/folder")
    table.execute("/bin/true", [b"true"], {})
    pid = table.run()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 127
    assert table.failed()


@compiled
def test_a_child_becomes_a_program_with_signals_unblocked() -> None:
    reading, writing = os.pipe()
    table = native.Table()
    table.session(None)
    table.descriptors({1: writing})
    table.folder("/")
    table.execute("/bin/sh", [b"sh", b"-c", b"pwd; echo $A; grep SigBlk /proc/self/status"], {b"A": b"b"})
    pid = table.run()
    os.close(writing)
    with open(reading) as file:
        assert file.read().split() == ["/", "b", "SigBlk:", "0" * 16]
    assert os.waitpid(pid, 0)[1] == 0
    assert not table.failed()
    assert ctypes.sizeof(ctypes.c_long) == 8  # the rows are 64-bit words


# ---- with and without it


@pytest.mark.parametrize("how", [pytest.param("compiled", marks=compiled), "fork"])
def test_pid_1_comes_of_the_zygote_or_of_the_launcher(how: str, tmp_path: Path) -> None:
    """The runtime's `native` decides who forks pid 1, and both run programs."""

    async def main() -> None:
        runtime = NamespaceRuntime(tmp_path / "run", 0, HandMade(tmp_path / "image"), native=how == "compiled")
        await runtime.open()
        try:
            handle = await runtime.create("x", SandboxConfig(image="hand", memory="128m", cpus=1, pids=64))
            box = Box(runtime, handle, Path("/work"))
            assert await box.sh("echo $((6 * 7)); exit 3") == "42\n"
            assert (await box.run("sh", "-c", "exit 5"))[0].code == 5
            launcher = runtime._slots.launcher.pid
            pid_1 = process_tree.read(handle.data["pid"])
            assert pid_1 is not None and launcher is not None
            parent = process_tree.read(pid_1.parent)
            if how == "compiled":
                assert parent is not None and parent.parent == launcher, "the zygote is between them"
            else:
                assert pid_1.parent == launcher
            mapped = native.NAME in Path(f"/proc/{launcher}/maps").read_text()
            assert mapped or how == "fork"
            await runtime.destroy(handle)
        finally:
            await runtime.close()

    run(main())


SANDBOX = """
import asyncio, json, sys
from pathlib import Path
sys.path.append(sys.argv[2])
import rock
from rock.guest.init import native
from tests.runtime.boxes import namespace_box, process_box

async def main():
    report = [rock.__file__, native.missing]
    for make in (namespace_box, process_box):
        async with make(Path(sys.argv[1]) / make.__name__) as b:
            report.append(await b.sh("echo of $PPID; echo $0"))
    print(json.dumps(report))

asyncio.run(main())
"""


def doctor(path: Path, folder: Path) -> dict[str, Any]:
    """What `rock doctor` reports about the extension of the package at `path`."""
    done = subprocess.run([sys.executable, "-m", "rock.cli.main", "doctor", "--json"], cwd=folder, capture_output=True,
                          env=environment(path, ROCK_HOME=str(folder / "home")), text=True, timeout=120)  # fmt: skip
    assert done.stdout, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return next(one for one in found if one["name"] == "native")


def test_an_installation_without_it(tmp_path: Path) -> None:
    """As from the wheel without the extension: sandboxes work, and the doctor reports the fallback."""
    path = without_library(tmp_path / "package")
    (tmp_path / "boxes").mkdir()
    done = subprocess.run([sys.executable, "-c", SANDBOX, str(tmp_path / "boxes"), str(HERE)], cwd=tmp_path, text=True,
                          env=environment(path), capture_output=True, timeout=120)  # fmt: skip
    if "Skipped" in done.stderr:
        pytest.skip(f"no namespaces here: {done.stderr[-300:]}")
    assert done.returncode == 0, done.stderr
    where, missing, *answers = json.loads(done.stdout)
    assert where.startswith(str(path)) and "not built" in missing
    assert all(answer.startswith("of ") for answer in answers)
    report = doctor(path, tmp_path)
    assert report["name"] == "native" and report["ok"] is None
    assert report["detail"].startswith("fork fallback: ") and "C compiler" in report["detail"] and report["hint"]


@compiled
def test_the_doctor_reports_the_compiled_one(tmp_path: Path) -> None:
    report = doctor(HERE / "src", tmp_path)
    assert report["ok"] is True
    assert report["detail"] == f"compiled: {native.library.path}"  # type: ignore[union-attr]
