# GENERATED from src/rock/sdk/sandbox/file_system.py by tools/unasync.py: do not edit.
# ruff: noqa: E501, I001, RUF100, UP028
"""`FileSystem` under ROCK's import path: the class of `sandbox.fs`."""

from rock.sync.sandbox.files import Files as FileSystem

LinuxFileSystem = FileSystem

__all__ = ["FileSystem", "LinuxFileSystem"]
