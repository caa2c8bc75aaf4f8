"""`FileSystem` under ROCK's import path: the class of `sandbox.fs`."""

from rock.sdk.sandbox.files import Files as FileSystem

LinuxFileSystem = FileSystem

__all__ = ["FileSystem", "LinuxFileSystem"]
