"""Compatibility module for the original ROCK's loggers: `from rock.logger import init_logger`."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from rock import env_vars

_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"

__all__ = ["init_logger"]


def init_logger(name: str | None = None, file_name: str | None = None) -> logging.Logger:
    """A logger of that name ("rock" when None) that writes to a file, or to stderr.

    The level is ROCK_LOGGING_LEVEL, the folder ROCK_LOGGING_PATH, and the file `file_name` or ROCK_LOGGING_FILE_NAME in
    it; without a folder it writes to stderr. The same name returns the same logger, which is configured once.
    """
    logger = logging.getLogger(name or "rock")
    if not logger.handlers:
        logger.addHandler(_handler(file_name))
        level = str(env_vars.ROCK_LOGGING_LEVEL).upper()
        logger.setLevel(level if level in logging.getLevelNamesMapping() else "INFO")
        logger.propagate = False
    return logger


def _handler(file_name: str | None) -> logging.Handler:
    folder = env_vars.ROCK_LOGGING_PATH
    handler: logging.Handler = logging.StreamHandler(sys.stderr)
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(Path(folder, file_name or env_vars.ROCK_LOGGING_FILE_NAME),
                                      mode="a" if env_vars.ROCK_LOGGING_APPEND else "w", delay=True)  # fmt: skip
    handler.setFormatter(logging.Formatter(_FORMAT))
    return handler
