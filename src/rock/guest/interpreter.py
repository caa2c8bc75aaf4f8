"""A Python interpreter with state for code cells, and the formats of their results. Standard library only.

The server passes the source of this module to `python3 -c` inside a sandbox. A request is one line on standard input,
{"id", "code", "env"}; each event is one line on standard output, {"id", "type", ...}, the last one of a request has the
type "done". What code and its child processes write to their standard output and error are events too.
"""

from __future__ import annotations

import ast
import asyncio
import base64
import builtins
import codeop
import importlib.abc
import importlib.machinery
import inspect
import io
import json
import linecache
import os
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

_MARK = b"\0\1rock-end-of-cell\2\0"
_PIECE = 32768
_BACKEND = "_rock_figures"  # the backend of matplotlib
_REPRS = {  # key of a result: method of an object
    "html": "_repr_html_", "markdown": "_repr_markdown_", "svg": "_repr_svg_", "png": "_repr_png_",
    "jpeg": "_repr_jpeg_", "pdf": "_repr_pdf_", "latex": "_repr_latex_", "json": "_repr_json_",
    "javascript": "_repr_javascript_",
}  # fmt: skip
_MIMES = {
    "text/plain": "text", "text/html": "html", "text/markdown": "markdown", "image/svg+xml": "svg",
    "image/png": "png", "image/jpeg": "jpeg", "application/pdf": "pdf", "text/latex": "latex",
    "application/json": "json", "application/javascript": "javascript",
}  # fmt: skip
_BOX_LINES, _BOX_POINTS = 7, 5  # of a box plot of matplotlib
_LONGEST = 8 << 20  # characters of one value of a result


class Events:
    """Writes events. Code may use threads, so each event is written under a lock."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._lock = threading.Lock()
        self.request = ""

    def send(self, kind: str, **fields: Any) -> None:
        line = json.dumps({"id": self.request, "type": kind, **fields}, default=repr).encode() + b"\n"
        with self._lock:
            view = memoryview(line)
            while view:
                view = view[os.write(self._fd, view) :]

    def text(self, kind: str, text: str) -> None:
        for start in range(0, len(text), _PIECE):
            self.send(kind, text=text[start : start + _PIECE], timestamp=time.time_ns())


class Stream(io.TextIOBase):
    """sys.stdout or sys.stderr of code: each line is an event."""

    encoding = "utf-8"
    errors = "backslashreplace"

    def __init__(self, events: Events, kind: str, fd: int) -> None:
        self._events = events
        self._kind = kind
        self._fd = fd
        self._held = ""  # of a line that is not complete
        self.buffer = _Bytes(self)

    def write(self, text: str) -> int:
        if not isinstance(text, str):
            raise TypeError(f"write() argument must be str, not {type(text).__name__}")
        lines, end, rest = (self._held + text).rpartition("\n")
        self._held = rest
        if end:
            self._events.text(self._kind, lines + end)
        if len(rest) > _PIECE:
            self.flush()
        return len(text)

    def flush(self) -> None:
        held, self._held = self._held, ""
        if held:
            self._events.text(self._kind, held)

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._fd


class _Bytes(io.RawIOBase):
    """`sys.stdout.buffer`."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def write(self, data: Any) -> int:
        data = bytes(data)
        self._stream.write(data.decode("utf-8", "backslashreplace"))
        return len(data)

    def writable(self) -> bool:
        return True


class Capture:
    """The end of a pipe that replaces a descriptor: it has what child processes write."""

    def __init__(self, events: Events, kind: str, fd: int) -> None:
        self._events = events
        self._kind = kind
        self._fd = fd
        self._drained = threading.Event()
        self._source, write_end = os.pipe()
        os.dup2(write_end, fd)
        os.close(write_end)
        threading.Thread(target=self._read, name=f"rock-{kind}", daemon=True).start()

    def drain(self) -> None:
        """Wait until what was written before is sent."""
        self._drained.clear()
        os.write(self._fd, _MARK)
        self._drained.wait(10.0)

    def _read(self) -> None:
        held = b""
        while data := os.read(self._source, _PIECE):
            held += data
            while (at := held.find(_MARK)) >= 0:
                self._emit(held[:at])
                held = held[at + len(_MARK) :]
                self._drained.set()
            keep = next((n for n in range(min(len(_MARK) - 1, len(held)), 0, -1) if held.endswith(_MARK[:n])), 0)
            ready, held = held[: len(held) - keep], held[len(held) - keep :]
            self._emit(ready)

    def _emit(self, data: bytes) -> None:
        if data:
            self._events.text(self._kind, data.decode("utf-8", "backslashreplace"))


# ---- results ----


def formats(value: object) -> dict[str, Any]:
    """The representations of a value by key. A representation that raises is left out."""
    found: dict[str, Any] = {}
    bundle = _called(value, "_repr_mimebundle_")
    if isinstance(bundle, tuple):
        bundle = bundle[0]
    if isinstance(bundle, dict):
        found |= {_MIMES[mime]: data for mime, data in bundle.items() if mime in _MIMES}
    for key, method in _REPRS.items():
        if key not in found and (data := _called(value, method)) is not None:
            found[key] = data[0] if isinstance(data, tuple) else data
    for key, data in found.items():
        if isinstance(data, bytes | bytearray):
            found[key] = base64.b64encode(data).decode()
    if "text" not in found:
        try:
            found["text"] = repr(value)
        except Exception as error:
            found["text"] = f"<{type(value).__name__}, whose repr raises {type(error).__name__}>"
    if type(value).__name__ == "DataFrame" and hasattr(value, "to_dict"):
        try:
            found["data"] = json.loads(json.dumps(value.to_dict(orient="list"), default=str))
        except Exception:
            found.pop("data", None)
    return {key: data[:_LONGEST] if isinstance(data, str) else data for key, data in found.items()}


def _called(value: object, method: str) -> Any:
    if isinstance(value, type):
        return None
    call = getattr(type(value), method, None)
    if call is None:
        return None
    try:
        return call(value, include=None, exclude=None) if method == "_repr_mimebundle_" else call(value)
    except Exception:
        return None


# ---- charts ----


def chart_of(figure: Any) -> dict[str, Any] | None:
    """The data of a matplotlib figure; None where it has no axes."""
    charts = [found for axes in figure.axes if (found := _axes_chart(axes)) is not None]
    if not charts:
        return None
    if len(charts) == 1:
        return charts[0]
    title = figure._suptitle.get_text() if getattr(figure, "_suptitle", None) is not None else ""
    return {"type": "superchart", "title": title, "elements": charts}


def _axes_chart(axes: Any) -> dict[str, Any] | None:
    title = axes.get_title()
    wedges = [patch for patch in axes.patches if type(patch).__name__ == "Wedge"]
    if wedges:
        labels = [text.get_text() for text in axes.texts]
        parts = [{"label": labels[number] if number < len(labels) else "", "angle": float(abs(w.theta2 - w.theta1)),
                  "radius": float(w.r)} for number, w in enumerate(wedges)]  # fmt: skip
        return {"type": "pie", "title": title, "elements": parts}
    plane: dict[str, Any] = {"title": title, "x_label": axes.get_xlabel(), "y_label": axes.get_ylabel(),
                             "x_unit": _unit(axes.get_xlabel()), "y_unit": _unit(axes.get_ylabel())}  # fmt: skip
    bars = [container for container in axes.containers if type(container).__name__ == "BarContainer"]
    if bars:
        return {"type": "bar", **plane, "elements": list(_bars(axes, bars))}
    lines = [line for line in axes.get_lines() if len(line.get_xdata()) or line.get_label() == "_nolegend_"]
    dots = [each for each in axes.collections if hasattr(each, "get_offsets") and len(each.get_offsets())]
    if not lines and not dots:
        return None
    if any(line.get_label() == "_nolegend_" for line in lines):
        return _box_chart(plane, lines, [label.get_text() for label in axes.get_xticklabels()])
    for side, axis in (("x", axes.xaxis), ("y", axes.yaxis)):
        plane[f"{side}_ticks"] = [_plain(tick) for tick in axis.get_ticklocs()]
        plane[f"{side}_tick_labels"] = [label.get_text() for label in axis.get_ticklabels()]
        plane[f"{side}_scale"] = axis.get_scale()
    if lines:
        elements = [{"label": line.get_label(), "points": _points(line.get_xdata(), line.get_ydata())}
                    for line in lines]  # fmt: skip
        return {"type": "line", **plane, "elements": elements}
    elements = [{"label": each.get_label(), "points": [[_plain(x), _plain(y)] for x, y in each.get_offsets()]}
                for each in dots]  # fmt: skip
    return {"type": "scatter", **plane, "elements": elements}


def _box_chart(plane: dict[str, Any], lines: Sequence[Any], labels: Sequence[str]) -> dict[str, Any]:
    """Of a box plot: its lines are, for each box, the box, two whiskers, two caps, the median and the outliers."""
    groups = [lines[at : at + _BOX_LINES] for at in range(0, len(lines), _BOX_LINES)]
    if any(len(group) != _BOX_LINES or len(group[0].get_ydata()) != _BOX_POINTS for group in groups):
        return {**plane, "type": "unknown", "elements": []}
    boxes = []
    for number, (box, _, _, low, high, median, outliers) in enumerate(groups):
        heights = [float(y) for y in box.get_ydata()]
        boxes.append({"label": labels[number] if number < len(labels) else "", "min": float(low.get_ydata()[0]),
                      "first_quartile": min(heights), "median": float(median.get_ydata()[0]),
                      "third_quartile": max(heights), "max": float(high.get_ydata()[0]),
                      "outliers": [_plain(y) for y in outliers.get_ydata()]})  # fmt: skip
    return {**plane, "type": "box_and_whisker", "elements": boxes}


def _bars(axes: Any, containers: Sequence[Any]) -> Iterator[dict[str, Any]]:
    names = {round(float(place), 6): label.get_text()
             for place, label in zip(axes.get_xticks(), axes.get_xticklabels(), strict=False)}  # fmt: skip
    for container in containers:
        for patch in container.patches:
            middle = round(float(patch.get_x() + patch.get_width() / 2), 6)
            yield {"label": names.get(middle) or f"{middle:g}", "value": _plain(patch.get_height()),
                   "group": container.get_label()}  # fmt: skip


def _unit(label: str) -> str | None:
    match = re.search(r"\(([^()]+)\)\s*$", label)
    return match[1] if match else None


def _points(xs: Any, ys: Any) -> list[list[Any]]:
    return [[_plain(x), _plain(y)] for x, y in zip(xs, ys, strict=False)]


def _plain(value: Any) -> Any:
    """A number, or a text for what is none, such as a date."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return str(value)
    return number if number == number and abs(number) != float("inf") else str(value)


class _Backend(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """The module of the backend of matplotlib: figures are results when they are shown, or at the end of a cell."""

    def __init__(self, show: Callable[[], None]) -> None:
        self._show = show

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        return importlib.machinery.ModuleSpec(name, self) if name == _BACKEND else None

    def create_module(self, spec: Any) -> types.ModuleType | None:
        return None

    def exec_module(self, module: types.ModuleType) -> None:
        agg = importlib.import_module("matplotlib.backends.backend_agg")
        module.__dict__.update(FigureCanvas=agg.FigureCanvasAgg, FigureManager=agg.FigureManagerBase
                               if hasattr(agg, "FigureManagerBase") else None)  # fmt: skip
        if module.__dict__["FigureManager"] is None:
            bases = importlib.import_module("matplotlib.backend_bases")
            module.__dict__["FigureManager"] = bases.FigureManagerBase
        show = self._show
        module.__dict__["show"] = lambda *args, **kwargs: show()


# ---- cells ----


class Interpreter:
    """Runs cells one after the other in one namespace."""

    def __init__(self, events: Events, captures: Sequence[Capture]) -> None:
        self._events = events
        self._captures = captures
        self._count = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self.running = False
        self.module = types.ModuleType("__main__")
        self.module.__dict__["__builtins__"] = builtins
        self.module.__dict__["display"] = self.display
        sys.modules["__main__"] = self.module
        sys.displayhook = self._displayed
        sys.meta_path.insert(0, _Backend(self.show_figures))
        os.environ.setdefault("MPLBACKEND", f"module://{_BACKEND}")

    def run(self, code: str, env: dict[str, str]) -> None:
        """Run one cell."""
        self._count += 1
        self._events.send("number_of_executions", execution_count=self._count)
        before = {name: os.environ.get(name) for name in env}
        os.environ.update(env)
        try:
            self.running = True
            try:
                self._execute(code)
                self.show_figures()
            finally:
                self.running = False
        except SystemExit:
            self._events.send("error", name="SystemExit", value="the code called exit", traceback="")
        except BaseException as error:
            self._flush()
            self._failed(error)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        self._flush()
        for capture in self._captures:
            capture.drain()

    def _flush(self) -> None:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, Stream):
                stream.flush()

    def _execute(self, code: str) -> None:
        name = f"<cell {self._count}>"
        source = _without_magics(code)
        tree = ast.parse(source, name)
        linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        if source.rstrip().endswith(";") and last is not None:
            tree.body.append(last)
            last = None
        flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
        if tree.body:
            self._evaluate(compile(tree, name, "exec", flags))
        if last is not None:
            expression = ast.Expression(last.value)  # type: ignore[attr-defined]
            self._displayed(self._evaluate(compile(expression, name, "eval", flags)))

    def _evaluate(self, code: types.CodeType) -> Any:
        value = eval(code, self.module.__dict__)
        if code.co_flags & inspect.CO_COROUTINE:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                asyncio.set_event_loop(self._loop)
            return self._loop.run_until_complete(value)
        return value

    def _displayed(self, value: object) -> None:
        """The value of the last expression of a cell."""
        if value is None:
            return
        self._flush()
        for capture in self._captures:  # what child processes wrote before comes before the value
            capture.drain()
        self.module.__dict__["_"] = value
        figure = getattr(value, "figure", None)
        if type(value).__name__ == "Figure" and hasattr(value, "savefig"):
            return  # it is shown at the end of the cell
        if figure is not None and "matplotlib" in type(value).__module__:
            self._events.send("result", text=repr(value), is_main_result=True)
            return
        self._events.send("result", **formats(value), is_main_result=True)

    def display(self, *values: object, **options: object) -> None:
        """Show values as results."""
        self._flush()
        for value in values:
            self._events.send("result", **formats(value), is_main_result=False)

    def show_figures(self) -> None:
        """Send the open figures of matplotlib as results, and close them."""
        pyplot: Any = sys.modules.get("matplotlib.pyplot")
        if pyplot is None or not hasattr(pyplot, "get_fignums"):
            return
        for number in pyplot.get_fignums():
            figure = pyplot.figure(number)
            image = io.BytesIO()
            figure.savefig(image, format="png", bbox_inches="tight")
            fields: dict[str, Any] = {"png": base64.b64encode(image.getvalue()).decode(), "text": repr(figure)}
            try:
                if (chart := chart_of(figure)) is not None:
                    fields["chart"] = chart
            except Exception:
                fields["chart"] = {"type": "unknown", "title": "", "elements": []}
            self._flush()
            self._events.send("result", **fields, is_main_result=False)
            pyplot.close(figure)

    def _failed(self, error: BaseException) -> None:
        frames = traceback.extract_tb(error.__traceback__)
        own = next((at for at, frame in enumerate(frames) if frame.filename.startswith("<cell ")), len(frames))
        text = "".join(["Traceback (most recent call last):\n", *traceback.format_list(frames[own:]),
                        *traceback.format_exception_only(error)])  # fmt: skip
        self._events.send("error", name=type(error).__name__, value=str(error), traceback=text)


def _without_magics(code: str) -> str:
    """The code, with lines of the form `!command`, `%pip ...` and `%cd ...` as calls, where it is no Python."""
    try:
        codeop.compile_command(code, symbol="exec")
        return code
    except (SyntaxError, ValueError, OverflowError):
        lines = code.split("\n")
    for number, line in enumerate(lines):
        bare = line.lstrip()
        indent = line[: len(line) - len(bare)]
        if bare.startswith("!"):
            lines[number] = f"{indent}__import__('__main__').__rock_shell__({bare[1:]!r})"
        elif bare.startswith(("%pip ", "%conda ")):
            lines[number] = f"{indent}__import__('__main__').__rock_shell__({'python3 -m ' + bare[1:]!r})"
        elif bare.startswith("%cd "):
            lines[number] = f"{indent}__import__('os').chdir({bare[4:].strip()!r})"
    return "\n".join(lines)


def _shell(command: str) -> None:
    subprocess.run(["/bin/sh", "-c", command], stdin=subprocess.DEVNULL, check=False)


def main() -> None:
    """Serve requests until the end of standard input."""
    requests = os.fdopen(os.dup(0), "rb")
    events = Events(os.dup(1))
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    captures = [Capture(events, "stdout", 1), Capture(events, "stderr", 2)]
    sys.stdout, sys.stderr = Stream(events, "stdout", 1), Stream(events, "stderr", 2)
    sys.path.insert(0, "")
    interpreter = Interpreter(events, captures)
    interpreter.module.__dict__["__rock_shell__"] = _shell

    def interrupted(number: int, frame: object) -> None:
        if interpreter.running:
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupted)
    for line in requests:
        request = json.loads(line)
        events.request = request["id"]
        interpreter.run(request["code"], request.get("env") or {})
        events.send("done")


if __name__ == "__main__":
    main()
