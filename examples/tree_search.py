"""Best-first search over forks: of a sandbox with a Git repository and failing tests, and of a Sokoban environment.

    python examples/tree_search.py [--svg tree.svg] [--skip-env]

A scripted policy stands for a model: it proposes edits, or moves. Each node of the first tree is a sandbox, forked from
its parent; each node of the second one is an environment, forked with its memory. The program prints both trees, and
writes the first one as an SVG. It needs a server: `rock admin start`.
"""

import argparse
import heapq
import html
import itertools
from typing import Any

import rock
from rock.sync import Sandbox

MODULE = """\
def median(values):
    ordered = sorted(values)
    middle = len(ordered) / 2
    return ordered[middle]


def mode(values):
    return max(values, key=values.index)
"""
TESTS = """\
import unittest
from stats import median, mode


class Tests(unittest.TestCase):
    def test_odd(self):
        self.assertEqual(median([3, 1, 2]), 2)

    def test_even(self):
        self.assertEqual(median([4, 1, 2, 3]), 2.5)

    def test_mode(self):
        self.assertEqual(mode([1, 2, 2, 3]), 2)

    def test_input_is_kept(self):
        values = [2, 1]
        median(values)
        self.assertEqual(values, [2, 1])


unittest.main()
"""
EDITS = {  # what a model could propose; half of it is wrong
    "integer index": ("len(ordered) / 2", "len(ordered) // 2"),
    "sort in place": ("ordered = sorted(values)", "ordered = values; ordered.sort()"),
    "mean of the middle": ("return ordered[middle]",
                           "return (ordered[middle] + ordered[-middle - 1]) / 2"),
    "count, not index": ("values.index", "values.count"),
    "last value": ("return max(values, key=values.index)", "return values[-1]"),
}


class Node:
    """A state of the search. score: the higher the better. label: the edit or move that led to it."""

    def __init__(self, label: str, parent: "Node | None", score: float, thing: Any) -> None:
        self.label, self.parent, self.score, self.thing = label, parent, score, thing
        self.children: list[Node] = []
        self.at = (0, 0)
        if parent is not None:
            parent.children.append(self)


def draw(node: Node, best: Node, indent: str = "") -> None:
    mark = " *" if node is best else ""
    print(f"{indent}{node.label}: {node.score:g}{mark}")
    for child in node.children:
        draw(child, best, indent + "  ")


def svg(root: Node, best: Node) -> str:
    """The tree as an SVG: one line for each node, connected to its parent."""
    rows: list[Node] = []

    def place(node: Node, depth: int) -> None:
        node.at = (20 + 40 * depth, 24 + 26 * len(rows))
        rows.append(node)
        for child in node.children:
            place(child, depth + 1)

    place(root, 0)
    parts = []
    for node in rows:
        x, y = node.at
        if node.parent is not None:
            left, above = node.parent.at
            parts.append(f'<path d="M{left} {above}V{y}H{x}" fill="none" stroke="#888"/>')
        color = "#2a7" if node is best else "#47c"
        text = html.escape(f"{node.label}: {node.score:g}")
        parts.append(f'<circle cx="{x}" cy="{y}" r="5" fill="{color}"/><text x="{x + 10}" y="{y + 4}">{text}</text>')
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="520" height="{30 + 26 * len(rows)}" '
            f'font-family="sans-serif" font-size="13">{"".join(parts)}</svg>')


def passed(sandbox: Sandbox) -> int:
    """How many tests pass."""
    seen = sandbox.exec("cd /tmp/repository && python3 tests.py -v 2>&1", timeout=60)
    return sum(line.endswith("... ok") for line in seen.stdout.splitlines())


def repair() -> tuple[Node, Node]:
    """Search for the edits that make all tests pass; returns the root and the best node."""
    order = itertools.count()
    with Sandbox("host", memory="256m", cpus=1.0) as sandbox:
        sandbox.files.write("/tmp/repository/stats.py", MODULE)
        sandbox.files.write("/tmp/repository/tests.py", TESTS)
        sandbox.run("cd /tmp/repository && git init -q . && git add -A", check=True)
        sandbox.run("git -c user.name=x -c user.email=x@example.org commit -qm start", check=True)
        best = root = Node("start", None, passed(sandbox), sandbox)
        started: list[Sandbox] = []
        todo = [(-root.score, next(order), root)]
        try:
            while todo and best.score < 4 and len(started) < 40:
                node = heapq.heappop(todo)[2]
                text = node.thing.files.read_text("/tmp/repository/stats.py")
                edits = {name: text.replace(*edit) for name, edit in EDITS.items() if edit[0] in text}
                children = node.thing.fork(len(edits)) if edits else []
                started += children
                for (name, edited), child in zip(edits.items(), children, strict=True):
                    child.files.write("/tmp/repository/stats.py", edited)
                    found = Node(name, node, passed(child), child)
                    heapq.heappush(todo, (-found.score, next(order), found))
                    best = max(best, found, key=lambda one: one.score)
            if best.thing is not sandbox:
                print(best.thing.run("cd /tmp/repository && git diff --stat").output)
        finally:
            for one in started:
                one.stop()
    return root, best


def play(most: int) -> tuple[Node, Node]:
    """Search a Sokoban level over forks of the environment; returns the root and the best node."""
    order = itertools.count()
    with rock.make("game:Sokoban-v0-easy") as env:
        first, _ = env.reset(seed=7)
        best = root = Node("start", None, 0.0, env)
        seen, todo = {first}, [(0.0, next(order), root)]
        opened: list[Any] = []
        while todo and len(opened) < most and best.score < 1:
            node = heapq.heappop(todo)[2]
            for move, child in zip(("up", "down", "left", "right"), node.thing.fork(4), strict=True):
                opened.append(child)
                observation, reward, terminated, truncated, _ = child.step(f"\\boxed{{{move}}}")
                if observation in seen:
                    child.close()
                    continue
                seen.add(observation)
                found = Node(move, node, node.score + reward, child)
                best = max(best, found, key=lambda one: one.score)
                if not (terminated or truncated):
                    heapq.heappush(todo, (-found.score, next(order), found))
        for child in opened:
            child.close()
    return root, best


def main() -> None:
    parser = argparse.ArgumentParser(description="Best-first search over forks.")
    parser.add_argument("--svg", default="tree.svg", help="where the first tree is written")
    parser.add_argument("--skip-env", action="store_true", help="leave out the environment")
    parser.add_argument("--moves", type=int, default=40, help="forks of the environment")
    arguments = parser.parse_args()
    root, best = repair()
    draw(root, best)
    with open(arguments.svg, "w") as file:
        file.write(svg(root, best))
    path, node = [], best
    while node.parent is not None:
        path.append(node.label)
        node = node.parent
    print(f"{best.score:g} of 4 tests pass after: {', '.join(reversed(path))}")
    if not arguments.skip_env:
        root, best = play(arguments.moves)
        draw(root, best)
        print(f"best reward: {best.score:g}")


if __name__ == "__main__":
    main()
