"""Copies the written folders of a sandbox whose processes are stopped. Run by its path, with JSON as its argument.

As an ordinary user it creates a user namespace in which it is root, so it can read files that the guest, who has the
same user id, made unreadable. `cp` copies attributes, hard links, deleted names and sparse files, and shares the blocks
where the file system supports that. Standard library only.
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":  # allow imports of rock without running rock/__init__.py
    import types

    _source = os.path.abspath(__file__)
    while os.path.basename(_source) != "rock":
        _source = os.path.dirname(_source)
    _package = types.ModuleType("rock")
    _package.__path__ = [_source]
    sys.modules["rock"] = _package

import json

from rock.runtime.namespace.launcher import userns


def main() -> None:
    options = json.loads(sys.argv[1])
    if options["enter"]:
        userns.become_root()
    names = [name for name in sorted(os.listdir(options["source"])) if name.startswith("upper")]
    sources = [f"{options['source']}/{name}" for name in names]
    os.execvp("cp", ["cp", "-a", "--reflink=auto", "--sparse=auto", "--", *sources, options["target"]])


if __name__ == "__main__":
    main()
