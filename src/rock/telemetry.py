"""Logs of a server: one line an event, with the names of what it is about."""

from __future__ import annotations

import logging
import sys
from logging.handlers import RotatingFileHandler
from pathlib import Path

_FORMAT = "%(asctime)s.%(msecs)03d %(levelname)-7s %(name)s: %(message)s"


def set_up_logs(level: str, folder: Path | None = None) -> None:
    """Log to standard error, and to a file of `folder` (10 MB, three old ones kept)."""
    formatter = logging.Formatter(_FORMAT, "%Y-%m-%dT%H:%M:%S")
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        handlers = [RotatingFileHandler(folder / "server.log", maxBytes=10 << 20, backupCount=3)]
    root = logging.getLogger("rock")
    root.setLevel(level.upper())
    root.handlers[:] = []
    for handler in handlers:
        handler.setFormatter(formatter)
        root.addHandler(handler)
    root.propagate = False
