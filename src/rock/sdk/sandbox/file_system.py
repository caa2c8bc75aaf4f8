"""Files of a sandbox, under ROCK's path: `sandbox.fs` is one of these."""

from rock.sdk.sandbox.filesystem import FileSystem

LinuxFileSystem = FileSystem

__all__ = ["FileSystem", "LinuxFileSystem"]
