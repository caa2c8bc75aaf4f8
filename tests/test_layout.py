"""The layout of src/rock stays within the ceilings of one table; `python tools/layout.py` prints the figures.

A ceiling may only fall: a change that improves a figure lowers its ceiling.
"""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from tools.layout import Cycle, Layout, back_edges

# rock.sync is generated and is not counted. largest_folder: files of one folder, __init__.py and sub-folders not
# counted. cycles: with type-only imports; modules_in_cycles: their members.
CEILINGS = {
    "modules": 675,
    "largest_module_lines": 600,
    "largest_folder": 20,
    "folders_above_20": 0,
    "small_modules": 46,  # below 60 lines
    "type_checking_blocks": 9,
    "type_only_imports": 16,
    "function_imports": 75,
    "cycles": 0,
    "modules_in_cycles": 0,
    "runtime_cycles": 0,
    "cycles_with_function_imports": 0,
}


@pytest.fixture(scope="module")
def figures() -> dict[str, int]:
    return Layout().figures()


@pytest.mark.parametrize("name", CEILINGS)
def test_a_figure_is_below_its_ceiling(figures: dict[str, int], name: str) -> None:
    figure, ceiling = figures[name], CEILINGS[name]
    assert figure <= ceiling, f"{name} is {figure}, above its ceiling {ceiling}: see `python tools/layout.py`"


def _tree(folder: Path, **modules: str) -> Layout:
    top = folder / "rock"
    for name, text in {"__init__": "", **modules}.items():
        path = top / f"{name.replace('__in__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return Layout(top)


HIDDEN = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from rock.b import B\n"


def _members(cycles: list[Cycle]) -> list[tuple[str, ...]]:
    return [cycle.members for cycle in cycles]


def test_a_cycle_of_type_imports_is_found(tmp_path: Path) -> None:
    layout = _tree(tmp_path, a=HIDDEN, b="from rock import c\n", c="import rock.a\n", d="import rock.a\n")
    assert _members(layout.cycles) == [("rock.a", "rock.b", "rock.c")]
    assert layout.cycles[0].type_only and not layout.runtime_cycles
    (edge, way), = back_edges(layout.cycles[0])  # fmt: skip
    assert (edge.importer, edge.line, way) == ("rock.a", 3, ["rock.b", "rock.c", "rock.a"])
    figures = layout.figures()
    assert (figures["type_checking_blocks"], figures["type_only_imports"]) == (1, 1)


def test_a_cycle_of_runtime_imports_is_found(tmp_path: Path) -> None:
    layout = _tree(tmp_path, p__in____init__="from rock.p import x\n", p__in__x="from . import y\n",
                   p__in__y="from .x import z\n")  # fmt: skip
    assert _members(layout.runtime_cycles) == [("rock.p.x", "rock.p.y")]
    assert not layout.cycles[0].type_only


def test_an_import_in_a_function_hides_no_cycle(tmp_path: Path) -> None:
    layout = _tree(tmp_path, a="def f():\n    if True:\n        import rock.b\n", b="import rock.a\n")
    assert layout.cycles == []
    assert layout.figures()["function_imports"] == 1
    assert _members(layout.function_cycles) == [("rock.a", "rock.b")]


def test_generated_modules_are_not_counted(tmp_path: Path) -> None:
    layout = _tree(tmp_path, a="", sync__in____init__="import rock.a\n", sync__in__a="", synced="")
    assert sorted(layout.modules) == ["rock", "rock.a", "rock.synced"]


def test_the_tool_prints_its_figures(tmp_path: Path) -> None:
    top = _tree(tmp_path, a=HIDDEN, b="import rock.a\n").source
    tool = Path(__file__).parent.parent / "tools" / "layout.py"
    done = subprocess.run([sys.executable, tool, "--source", top], capture_output=True, text=True, check=True)
    assert "cycle 1: 2 modules, type imports alone close it\n    rock.a\n    rock.b\n" in done.stdout
    assert "type import rock.a:3 of rock.b; back: rock.b -> rock.a" in done.stdout


def test_names_of_test_modules_are_unique() -> None:
    names = Counter(path.name for path in Path(__file__).parent.rglob("test_*.py"))
    assert not [name for name, times in names.items() if times > 1], "pytest imports only one of them"
