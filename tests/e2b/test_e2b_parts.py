"""Parts of the E2B dialect without a server: differences of folders, fields of messages, and the interpreter with its
formats of results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rock.dialects.e2b import connect
from rock.dialects.e2b.errors import RpcError
from rock.dialects.e2b.state import NewSandbox, Options, config_of
from rock.dialects.e2b.watching import Folder, Seen, changes
from rock.errors import RockError
from rock.guest import interpreter


def file(size: int = 1, mtime: float = 1.0, mode: int = 0o644) -> Seen:
    return Seen("file", size, mtime, mode, 0, 0)


@pytest.mark.parametrize(("old", "new", "events"), [
    ({}, {"a": file()}, [("a", "CREATE"), ("a", "WRITE")]), ({}, {"a": file(0)}, [("a", "CREATE")]),
    ({"a": file()}, {}, [("a", "REMOVE")]), ({"a": file()}, {"a": file(2)}, [("a", "WRITE")]),
    ({"a": file()}, {"a": file(1, 2.0)}, [("a", "WRITE")]),
    ({"a": file()}, {"a": file(1, 1.0, 0o600)}, [("a", "CHMOD")]),
    ({"a": file()}, {"b": file()}, [("a", "RENAME"), ("b", "CREATE")]), ({"a": file()}, {"a": file()}, []),
    ({"a": file(), "b": file(2)}, {"c": file(2)}, [("a", "REMOVE"), ("b", "RENAME"), ("c", "CREATE")]),
])  # fmt: skip
def test_changes_of_a_folder(old: Folder, new: Folder, events: list[tuple[str, str]]) -> None:
    assert changes(old, new) == events


_JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
                     lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3))


@given(_JSON)
def test_a_field_is_valid_or_refused(value: Any) -> None:
    for read in (connect.text, connect.flag, connect.number, connect.message_of, connect.texts, connect.text_map,
                 connect.data_of, lambda message, name: connect.word(message, name, {"A": 1})):  # fmt: skip
        try:
            read({"someField": value}, "someField")
        except RpcError as error:
            assert error.code == "invalid_argument" and "someField" in str(error)


def test_names_of_fields() -> None:
    assert connect.text({"watcher_id": "x"}, "watcherId") == "x" == connect.text({"watcherId": "x"}, "watcherId")
    assert connect.number({"pid": "7"}, "pid") == 7 and connect.data_of({"stdin": "_w"}, "stdin") == b"\xff"


@pytest.mark.parametrize(("given_fields", "network", "egress"), [
    ({}, "nat", None), ({"allow_internet_access": False}, "none", None),
    ({"network": {"denyOut": ["0.0.0.0/0"]}}, "none", None),
    ({"network": {"denyOut": ["0.0.0.0/0"], "allowOut": ["example.com"]}}, "nat", ["example.com"]),
    ({"network": {"allowOut": ["example.com"]}}, "nat", None),
])  # fmt: skip
def test_networks(given_fields: dict[str, Any], network: str, egress: list[str] | None) -> None:
    config = config_of(NewSandbox.model_validate(given_fields), Options(), "host", None)
    assert (config.network, config.egress) == (network, egress)


@pytest.mark.parametrize("name", ["autoPauseMemory", "mcp", "iam", "autoResume", "httpsPorts", "egressProxy"])
def test_an_option_that_is_refused_is_named(name: str) -> None:
    values: dict[str, Any] = {
        "autoPauseMemory": False, "mcp": {"a": {}}, "iam": {"tokens": {}}, "autoResume": {"enabled": True},
        "httpsPorts": [1], "egressProxy": {"address": "a"},
    }  # fmt: skip
    fields = {name: values[name], **({"autoPause": True} if name == "autoPauseMemory" else {})}
    spec = NewSandbox.model_validate(fields if name in NewSandbox.model_fields else {"network": fields})
    with pytest.raises(RockError, match=name):
        config_of(spec, Options(), "host", None)


# ---- the interpreter ----


def cells(*codes: str, python: str = sys.executable, **variables: str) -> list[list[dict[str, Any]]]:
    """The events of each cell."""
    lines = "".join(json.dumps({"id": str(number), "code": code}) + "\n" for number, code in enumerate(codes))
    done = subprocess.run([python, interpreter.__file__], input=lines, text=True, capture_output=True, timeout=100,
                          env={"PATH": os.environ["PATH"], **variables})  # fmt: skip
    events = [json.loads(line) for line in done.stdout.splitlines()]
    return [[event for event in events if event["id"] == str(number)] for number in range(len(codes))]


def test_cells() -> None:
    first, second, third, fourth, fifth = cells(
        "x = 1\nprint('a', end='')\nprint('b')\nimport os; _ = os.system('echo sub')\nx + 1", "x;",
        "def f(:", "!echo hi\n%cd /tmp\nimport os; os.getcwd()", "import sys; sys.exit(3)",
    )
    assert [event["type"] for event in first] == ["number_of_executions", "stdout", "stdout", "result", "done"]
    assert [event["text"] for event in first[1:4]] == ["ab\n", "sub\n", "2"] and first[3]["is_main_result"]
    assert [event["type"] for event in second] == ["number_of_executions", "done"]
    assert third[1]["name"] == "SyntaxError" and third[-1]["type"] == "done"
    assert fourth[1]["text"] == "hi\n" and fourth[2]["text"] == "'/tmp'"
    assert fifth[1]["name"] == "SystemExit" and fifth[-1]["type"] == "done"


def test_formats_of_values() -> None:
    (found,) = cells("""
class Rich:
    def _repr_html_(self): return "<b>"
    def _repr_png_(self): return b"png"
    def _repr_json_(self): return {"a": 1}
    def _repr_latex_(self): raise ValueError
class Bundle:
    def _repr_mimebundle_(self, include=None, exclude=None): return {"text/markdown": "**x**", "application/x": 1}
class Broken:
    def __repr__(self): raise ValueError
display(Rich(), Bundle(), Broken())
""")
    rich, bundle, broken = (event for event in found if event["type"] == "result")
    assert (rich["html"], rich["png"], rich["json"], "latex" in rich) == ("<b>", "cG5n", {"a": 1}, False)
    assert bundle["markdown"] == "**x**" and "repr raises" in broken["text"]


_CHARTS = """
import matplotlib.pyplot as plt
plt.plot([1, 2], [3, 4], label="l"); plt.title("lines"); plt.xlabel("time (s)"); plt.show()
plt.scatter([1, 2], [3, 4], label="s"); plt.show()
plt.bar(["a", "b"], [3, 4]); plt.show()
plt.pie([1, 3], labels=["p", "q"]); plt.show()
plt.boxplot([[1, 2, 3, 4, 40]]); plt.show()
figure, (left, right) = plt.subplots(1, 2); left.plot([1], [2]); _ = right.bar(["x"], [1])
"""


def test_charts_of_matplotlib(everything: None, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    (found,) = cells(_CHARTS, python=request.getfixturevalue("charts_python"), HOME=str(tmp_path))
    results = [event for event in found if event["type"] == "result"]
    assert all(event["png"].startswith("iVBOR") for event in results), found
    line, dots, bars, pie, boxes, both = (event["chart"] for event in results)
    assert (line["type"], line["title"], line["x_unit"]) == ("line", "lines", "s")
    assert line["elements"] == [{"label": "l", "points": [[1.0, 3.0], [2.0, 4.0]]}]
    assert dots["type"] == "scatter" and dots["elements"][0]["points"] == [[1.0, 3.0], [2.0, 4.0]]
    assert [(bar["label"], bar["value"]) for bar in bars["elements"]] == [("a", 3.0), ("b", 4.0)]
    assert [(part["label"], round(part["angle"])) for part in pie["elements"]] == [("p", 90), ("q", 270)]
    (box,) = boxes["elements"]
    assert boxes["type"] == "box_and_whisker" and (box["min"], box["median"], box["outliers"]) == (1.0, 3.0, [40.0])
    assert both["type"] == "superchart" and [each["type"] for each in both["elements"]] == ["line", "bar"]
