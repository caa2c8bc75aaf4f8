# GENERATED from src/rock/sdk/sandbox/file_system.py by tools/unasync.py: do not edit.
# ruff: noqa: E501, I001, RUF100, UP028
"""Files of a sandbox, under ROCK's path: `sandbox.fs` is one of these."""

from rock.sync.sandbox.filesystem import FileSystem

LinuxFileSystem = FileSystem

__all__ = ["FileSystem", "LinuxFileSystem"]
