"""The namespace runtime in boxes like pods: levels A and B, a masked /proc, and `rock doctor --kubernetes`."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rock.runtime.namespace import pod
from rock.runtime.namespace.launcher import userns
from rock.runtime.namespace.pod import Facts
from tests.kubernetes.pod_box import PodBox, readable_path
from tests.unprivileged import interpreter

PYTHON = interpreter()
needs_root = pytest.mark.skipif(os.geteuid() != 0 or PYTHON is None, reason="needs root, and a Python for any user")
ALL = frozenset({"user namespaces", "overlay file system", "a /proc of its own", "landlock"})
SYS_ADMIN = 1 << 21


@pytest.mark.parametrize(
    ("facts", "level"),
    [
        (Facts(0, 65_536, ALL, SYS_ADMIN), "A"),
        (Facts(0, (1 << 32) - 2, ALL, SYS_ADMIN), "C"),
        (Facts(1000, 65_536, ALL), "B"),
        (Facts(1000, (1 << 32) - 2, ALL), "B"),
        (Facts(0, 65_536, ALL), "B"),
        (Facts(0, (1 << 32) - 2, frozenset({"landlock"})), "D"),
        (Facts(1000, (1 << 32) - 2, frozenset({"landlock"})), "E"),
        (Facts(0, 65_536, frozenset()), "E"),
    ],
)
def test_the_level_follows_from_the_facts(facts: Facts, level: str) -> None:
    assert pod.level_of(facts) == level
    if level != "A":
        assert pod.advice(facts), "each lower level has a line that changes it"


def test_ids_are_divided() -> None:
    whole = userns.divided((1 << 32) - 2)
    assert (whole.first, whole.size) == (200_000, 65_536) and whole.lines(200_000) == "0 200000 65536\n"
    few = userns.divided(65_536)
    assert (few.size, few.most, few.last) == (1024, 63, 65_535) and few.end == 65_536
    assert few.lines(2048) == "0 2048 1023\n65534 3071 1\n"
    assert not few.first <= few.stranger < few.end
    assert userns.divided(1).most == 0
    assert userns.available("0 1000000000 65536\n") == 65_536
    assert userns.available("         0          0 4294967295\n") >= (1 << 32) - 2
    assert userns.available("0 5000 10\n10 100000 65526\n") == 65_536
    assert userns.available("1000 1000 1\n") == 0


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with readable_path(tmp_path_factory.mktemp("checkout")) as found:
        yield found


@pytest.fixture
def home() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="rock-pod-") as folder:  # not pytest's, which is private
        Path(folder).chmod(0o755)
        yield Path(folder) / "box"


def runtime_in(level: str, home: Path, path: str, masked: bool = False) -> dict[str, Any]:
    assert PYTHON is not None
    done = PodBox(level, home, path, masked).run(PYTHON, str(Path(__file__).parent / "in_pod.py"), str(home))
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@needs_root
@pytest.mark.parametrize("level", ["A", "B"])
def test_sandboxes_in_a_pod(level: str, home: Path, path: str) -> None:
    found = runtime_in(level, home, path)
    if level == "A":
        assert (found["isolation"], found["most"]) == ("namespaces", 63)
        assert found["map"][2::3] == ["1023", "1"] and found["map"] != found["other_map"]
        assert found["chown"] == 0, "other users own files, user 65534 too"
        assert (found["many"], found["refusal"]) == (63, "NoCapacity")
    else:
        assert (found["isolation"], found["most"]) == ("userns", None) and found["map"] == ["0", "0", "1"]
    assert found["written"] == "data\n" and found["unseen"] != 0, "files of one are not seen by another"
    assert int(found["processes"]) < 10, "it sees its own processes"
    succeeded = [name for name, status in found["attempts"].items() if status == 0]
    assert succeeded == [], "what a sandbox must not do"
    assert found["left"] == []


@needs_root
@pytest.mark.parametrize("level", ["A", "B"])
def test_a_masked_proc(level: str, home: Path, path: str) -> None:
    """Level B is refused with the reason. At level A a read-only /proc/sys is no obstacle: settings of a sandbox are
    written through its own /proc. The kernel refuses that one where the masks are locked, as a container engine's are;
    those of the box are not."""
    found = runtime_in(level, home, path, masked=True)
    if level == "B":
        assert found["error"] == "Unsupported" and "proc" in found["message"]
    else:
        assert found["isolation"] == "namespaces" and found["chown"] == 0 and found["left"] == []
        assert [name for name, status in found["attempts"].items() if status == 0] == []


@needs_root
@pytest.mark.parametrize("masked", [False, True])
def test_locked_masks_of_proc_at_level_a(masked: bool, home: Path, path: str) -> None:
    """Where the masks are locked, the kernel refuses a /proc of a sandbox, and the runtime its start; doctor has the
    line that changes it. Without masks a pod whose mounts are locked is of level A as any other."""
    assert PYTHON is not None
    box = PodBox("A", home, path, masked, locked=True)
    done = box.run(PYTHON, str(Path(__file__).parent / "in_pod.py"), str(home))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    doctor = box.run(PYTHON, "-m", "rock", "doctor", "--kubernetes", "--json")
    rows = {row["name"]: row["detail"] for row in json.loads(doctor.stdout)}
    if masked:
        assert found["error"] == "Unsupported" and "proc" in found["message"], found
        assert rows["level"].startswith("D: runtime landlock") and "procMount: Unmasked" in rows["for level A"]
    else:
        assert found["isolation"] in ("namespaces", "userns") and found["left"] == [], found
        assert [name for name, status in found["attempts"].items() if status == 0] == []
        assert rows["level"].startswith("A: runtime namespace")


@needs_root
@pytest.mark.parametrize(("level", "masked", "shown", "line"), [
    ("A", False, "A: runtime namespace", ""),
    ("B", False, "B: runtime namespace", "hostUsers: false"),
    ("A", True, "D: runtime landlock", "procMount: Unmasked"),
    ("B", True, "E: runtime process", "procMount: Unmasked"),
])  # fmt: skip
def test_doctor_names_the_level_and_the_line(
    level: str, masked: bool, shown: str, line: str, home: Path, path: str
) -> None:
    assert PYTHON is not None
    done = PodBox(level, home, path, masked).run(PYTHON, "-m", "rock", "doctor", "--kubernetes", "--json")
    rows = {row["name"]: row for row in json.loads(done.stdout)}
    assert rows["level"]["detail"].startswith(shown), done.stdout
    assert not line or any(line in row["detail"] for row in json.loads(done.stdout) if row["name"] == "for level A")
