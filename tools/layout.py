"""Figures of the layout of src/rock: modules, lines, folders, TYPE_CHECKING blocks and import cycles.

    python tools/layout.py              print the figures, the import cycles and the small modules
    python tools/layout.py --json       print the figures as one JSON object
    python tools/layout.py --folders    print each folder with its number of modules and lines
    python tools/layout.py --functions  print the imports inside functions, and the cycles that they are part of

Everything is read from the syntax trees; no module of rock is imported. `rock.sync` is generated and is left out.

The import graph has an edge from a module to each module of rock that it imports:

- runtime: at module level (or in a class body);
- type: inside `if TYPE_CHECKING:`;
- function: inside a function. These edges are listed, and are not part of the cycles.

A cycle is a strongly connected component of two or more modules in the graph of the runtime and the type edges.
"""

from __future__ import annotations

import argparse
import ast
import json
import statistics
import sys
from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

SOURCE = Path(__file__).parent.parent / "src" / "rock"
GENERATED = ("rock.sync",)
SMALL = 60  # lines
Kind = Literal["runtime", "type", "function"]


@dataclass(frozen=True)
class Import:
    """One import of a module of rock by another one."""

    importer: str
    imported: str
    kind: Kind
    line: int


@dataclass(frozen=True)
class Cycle:
    """A strongly connected component of the import graph. edges: the imports between its members."""

    members: tuple[str, ...]
    edges: tuple[Import, ...]

    @property
    def type_only(self) -> bool:
        """Whether the component falls apart without its type edges."""
        runtime = {(e.importer, e.imported) for e in self.edges if e.kind == "runtime"}
        return not components(set(self.members), runtime)


@dataclass(frozen=True)
class Module:
    name: str
    path: Path
    tree: ast.Module
    lines: int

    @property
    def is_package(self) -> bool:
        return self.path.name == "__init__.py"


class Layout:
    """The modules below `source`, a folder that is the package `rock`."""

    def __init__(self, source: Path = SOURCE) -> None:
        self.source = source
        self.modules: dict[str, Module] = {}
        for path in sorted(source.rglob("*.py")):
            name = _name(source, path)
            if not name.startswith(tuple(f"{prefix}." for prefix in GENERATED)) and name not in GENERATED:
                text = path.read_text(encoding="utf-8")
                self.modules[name] = Module(name, path, ast.parse(text), text.count("\n"))

    @cached_property
    def imports(self) -> list[Import]:
        """Every import of a module of rock by another one, each pair once of each kind."""
        found: dict[tuple[str, str, Kind], Import] = {}
        for module in self.modules.values():
            for imported, kind, line in _imports(module, self.modules):
                if imported != module.name:
                    found.setdefault((module.name, imported, kind), Import(module.name, imported, kind, line))
        return sorted(found.values(), key=lambda edge: (edge.importer, edge.imported, edge.kind))

    @cached_property
    def cycles(self) -> list[Cycle]:
        """The cycles of the runtime and type imports, the largest first."""
        return self._cycles(("runtime", "type"))

    @cached_property
    def runtime_cycles(self) -> list[Cycle]:
        """The cycles of the runtime imports alone."""
        return self._cycles(("runtime",))

    @cached_property
    def function_cycles(self) -> list[Cycle]:
        """The cycles of all imports: an import that moves into a function leaves its cycle here."""
        return self._cycles(("runtime", "type", "function"))

    def _cycles(self, kinds: tuple[Kind, ...]) -> list[Cycle]:
        edges = [edge for edge in self.imports if edge.kind in kinds]
        found = components(set(self.modules), {(edge.importer, edge.imported) for edge in edges})
        cycles = [Cycle(tuple(sorted(members)),
                        tuple(e for e in edges if e.importer in members and e.imported in members))
                  for members in found]  # fmt: skip
        return sorted(cycles, key=lambda cycle: (-len(cycle.members), cycle.members))

    @cached_property
    def type_checking_blocks(self) -> list[tuple[str, int]]:
        """Module and line of each `if TYPE_CHECKING:`."""
        return [(module.name, node.lineno) for module in self.modules.values() for node in ast.walk(module.tree)
                if isinstance(node, ast.If) and _is_type_checking(node.test)]  # fmt: skip

    @cached_property
    def folders(self) -> dict[str, list[Module]]:
        """The modules of each folder, by the folder's path below src, without those of its sub-folders."""
        found: dict[str, list[Module]] = defaultdict(list)
        for module in self.modules.values():
            found[module.path.parent.relative_to(self.source.parent).as_posix()].append(module)
        return dict(found)

    @property
    def small(self) -> list[Module]:
        """Modules below SMALL lines, but for `__init__.py`."""
        return sorted((m for m in self.modules.values() if m.lines < SMALL and not m.is_package),
                      key=lambda module: (module.lines, module.name))  # fmt: skip

    def largest_folder(self) -> tuple[str, int]:
        """The folder with the most modules, `__init__.py` not counted, and how many it has."""
        name, modules = max(self.folders.items(), key=lambda row: (_files(row[1]), row[0]))
        return name, _files(modules)

    def figures(self) -> dict[str, int]:
        """What the ceilings of tests/test_layout.py are compared with."""
        lines = [module.lines for module in self.modules.values()]
        return {
            "modules": len(self.modules),
            "lines": sum(lines),
            "median_lines": int(statistics.median(lines)),
            "largest_module_lines": max(lines),
            "largest_folder": self.largest_folder()[1],
            "folders_above_20": sum(_files(modules) > 20 for modules in self.folders.values()),
            "small_modules": len(self.small),
            "type_checking_blocks": len(self.type_checking_blocks),
            "type_only_imports": sum(edge.kind == "type" for edge in self.imports),
            "function_imports": sum(edge.kind == "function" for edge in self.imports),
            "cycles": len(self.cycles),
            "modules_in_cycles": sum(len(cycle.members) for cycle in self.cycles),
            "runtime_cycles": len(self.runtime_cycles),
            "cycles_with_function_imports": len(self.function_cycles),
        }


def components(nodes: set[str], edges: set[tuple[str, str]]) -> list[set[str]]:
    """The strongly connected components of two or more nodes (Tarjan's algorithm, without recursion)."""
    after: dict[str, list[str]] = {node: [] for node in nodes}
    for start, end in sorted(edges):
        after[start].append(end)
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[set[str]] = []
    for root in sorted(nodes):
        if root in index:
            continue
        work = [(root, iter(after[root]))]
        index[root] = low[root] = len(index)
        stack.append(root)
        while work:
            node, successors = work[-1]
            for successor in successors:
                if successor not in index:
                    index[successor] = low[successor] = len(index)
                    stack.append(successor)
                    work.append((successor, iter(after[successor])))
                    break
                if successor in stack:
                    low[node] = min(low[node], index[successor])
            else:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[node])
                if low[node] == index[node]:
                    member = ""
                    component: set[str] = set()
                    while member != node:
                        member = stack.pop()
                        component.add(member)
                    if len(component) > 1:
                        found.append(component)
    return found


def back_edges(cycle: Cycle) -> list[tuple[Import, list[str]]]:
    """The type imports of a cycle, each with the shortest way back from the imported module to the importer."""
    after: dict[str, list[str]] = defaultdict(list)
    for edge in cycle.edges:
        after[edge.importer].append(edge.imported)
    return [(edge, way) for edge in cycle.edges if edge.kind == "type"
            if (way := _shortest(after, edge.imported, edge.importer))]  # fmt: skip


def _shortest(after: dict[str, list[str]], start: str, end: str) -> list[str]:
    before = {start: ""}
    queue = deque([start])
    while queue:
        node = queue.popleft()
        if node == end:
            way = [node]
            while before[way[-1]]:
                way.append(before[way[-1]])
            return way[::-1]
        for successor in after[node]:
            if successor not in before:
                before[successor] = node
                queue.append(successor)
    return []


def _files(modules: list[Module]) -> int:
    return sum(not module.is_package for module in modules)


def _name(source: Path, path: Path) -> str:
    parts = path.relative_to(source.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _is_type_checking(test: ast.expr) -> bool:
    name = test.id if isinstance(test, ast.Name) else test.attr if isinstance(test, ast.Attribute) else ""
    return name == "TYPE_CHECKING"


def _imports(module: Module, modules: dict[str, Module]) -> Iterator[tuple[str, Kind, int]]:
    """(imported module, kind, line) of each import of rock in a module."""
    waiting: deque[tuple[ast.AST, Kind]] = deque([(module.tree, "runtime")])
    while waiting:
        node, kind = waiting.popleft()
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from ((name, kind, node.lineno) for name in _imported(node, module, modules))
            continue
        if isinstance(node, ast.If) and _is_type_checking(node.test):
            waiting.extend((child, "type") for child in node.body)
            waiting.extend((child, kind) for child in node.orelse)
            continue
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and kind == "runtime":
            kind = "function"
        waiting.extend((child, kind) for child in ast.iter_child_nodes(node))


def _imported(node: ast.Import | ast.ImportFrom, module: Module, modules: dict[str, Module]) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if alias.name in modules)
        return
    base = node.module or ""
    if node.level:
        package = module.name.split(".") if module.is_package else module.name.split(".")[:-1]
        package = package[: len(package) - node.level + 1]
        base = ".".join([*package, base] if base else package)
    for alias in node.names:
        # `from rock.admin import keys` imports the module rock.admin.tenants, where there is one
        name = f"{base}.{alias.name}"
        if name in modules:
            yield name
        elif base in modules:
            yield base


def _print(layout: Layout) -> None:
    figures = layout.figures()
    for name, value in figures.items():
        more = f"  ({layout.largest_folder()[0]})" if name == "largest_folder" else ""
        print(f"{name:28} {value:>6}{more}")
    for number, cycle in enumerate(layout.cycles, 1):
        kind = "type imports alone close it" if cycle.type_only else "runtime imports close it too"
        print(f"\ncycle {number}: {len(cycle.members)} modules, {kind}")
        for member in cycle.members:
            print(f"    {member}")
        for edge, way in back_edges(cycle):
            print(f"  type import {edge.importer}:{edge.line} of {edge.imported}; back: {' -> '.join(way)}")
    print(f"\nmodules below {SMALL} lines, __init__.py not counted: {len(layout.small)}")
    for module in layout.small:
        print(f"  {module.lines:4} {module.path.relative_to(layout.source.parent)}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, default=SOURCE, help="the folder of the package rock")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--folders", action="store_true")
    parser.add_argument("--functions", action="store_true")
    asked = parser.parse_args()
    layout = Layout(asked.source.resolve())
    if asked.json:
        print(json.dumps(layout.figures()))
    elif asked.folders:
        for name, modules in sorted(layout.folders.items()):
            print(f"{_files(modules):4} files {sum(m.lines for m in modules):6} lines  {name}")
    elif asked.functions:
        for edge in layout.imports:
            if edge.kind == "function":
                print(f"{edge.importer}:{edge.line} {edge.imported}")
        for cycle in layout.function_cycles:
            print(f"cycle of {len(cycle.members)}: {' '.join(cycle.members)}")
    else:
        _print(layout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
