"""Logs of a server: one line an event, as text or as JSON, with the request, the sandbox and the tenant it is about."""

from __future__ import annotations

import json
import logging
import sys
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

from rock.telemetry.context import CURRENT

FORMATS = ("text", "json")
_FORMAT = "%(asctime)s.%(msecs)03d %(levelname)-7s %(name)s: %(message)s"
# What could end a line, or control the terminal of the reader
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if code != 9}
_CONTROLS |= {10: "\\n", 13: "\\r", 0x2028: "\\u2028", 0x2029: "\\u2029"}
_OTHERS = ("uvicorn", "asyncio", "opentelemetry")  # of libraries that have something to say of a server


def known(record: logging.LogRecord) -> dict[str, str]:
    """What is known of what a line is about: request, sandbox, tenant and trace, as far as there are any. A caller
    may name the sandbox, by `extra`."""
    context, sandbox = CURRENT.get(), getattr(record, "sandbox_id", "")
    if context is None:
        return {"sandbox_id": str(sandbox)} if sandbox else {}
    said = {"request_id": context.request_id, "sandbox_id": sandbox or context.sandbox_id, "tenant": context.tenant}
    if context.traceparent is not None:
        said["trace_id"] = context.traceparent[3:35]
    return {name: value for name, value in said.items() if value}


class Text(logging.Formatter):
    """For people. What an event tells is one line, whatever is in it; a traceback follows, on lines that begin with
    `  | `."""

    def __init__(self) -> None:
        super().__init__(_FORMAT, "%Y-%m-%dT%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:
        line = super().formatMessage(record).translate(_CONTROLS)
        said = " ".join(f"{name}={value}" for name, value in known(record).items())
        return f"{line} [{said.translate(_CONTROLS)}]" if said else line


    def format(self, record: logging.LogRecord) -> str:
        record.exc_text = None  # another formatter's, as it came
        return super().format(record)

    def formatException(self, ei: Any) -> str:
        return _set_off(super().formatException(ei))

    def formatStack(self, stack_info: str) -> str:
        return _set_off(super().formatStack(stack_info))


def _set_off(text: str) -> str:
    """Lines that none of which can be taken for an event."""
    return "\n".join("  | " + line.translate(_CONTROLS) for line in text.split("\n"))


class Json(logging.Formatter):
    """For programs: an object a line. `time` is seconds since the epoch."""

    def format(self, record: logging.LogRecord) -> str:
        told: dict[str, object] = {
            "time": round(record.created, 6), "level": record.levelname.lower(), "logger": record.name,
            "message": record.getMessage(), **known(record),
        }  # fmt: skip
        if record.exc_info:
            told["exception"] = self.formatException(record.exc_info)
        return json.dumps(told)


class LogFile(RotatingFileHandler):
    """As its base, which formats each line twice and calls stat twice for it. Other processes do not write to the
    file."""

    def __init__(self, path: Path, most: int, kept: int) -> None:
        super().__init__(path, maxBytes=most, backupCount=kept, encoding="utf-8", errors="backslashreplace")
        self._size = path.stat().st_size

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record) + self.terminator
            if self._size and self._size + len(line) >= self.maxBytes:
                self.doRollover()
                self._size = 0
            self._size += len(line)
            if self.stream is not None:  # closed
                self.stream.write(line)
                self.flush()
        except Exception:
            self.handleError(record)


_usual: dict[str, int] = {}  # the level of this process without a configured one


def set_log_level(level: str | None) -> None:
    """Change the level of this process: debug, info, warning or error; None is that of its settings."""
    logger = logging.getLogger("rock")
    usual = _usual.setdefault("rock", logger.level)
    logger.setLevel(usual if level is None else level.upper())


def set_up_logs(level: str, folder: Path | None = None, style: str = "text", name: str = "server.log") -> None:
    """Log to standard error, or to a file of `folder` (10 MB, three old ones kept). style: text or json."""
    formatter = Json() if style == "json" else Text()
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        handlers = [LogFile(folder / name, 10 << 20, 3)]
    for known in ("rock", *_OTHERS):
        logger = logging.getLogger(known)
        for old in logger.handlers[:]:
            logger.removeHandler(old)
        for handler in handlers:
            handler.setFormatter(formatter)
            logger.addHandler(handler)
        logger.propagate = False
    logging.getLogger("rock").setLevel(level.upper())
    _usual.clear()
