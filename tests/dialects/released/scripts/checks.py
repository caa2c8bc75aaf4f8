"""Checks of a script: each prints one line of JSON, and a failed one does not end the script."""

from __future__ import annotations

import contextlib
import json
import traceback
from collections.abc import Iterator


@contextlib.contextmanager
def check(name: str) -> Iterator[None]:
    reason = ""
    try:
        yield
    except BaseException as error:
        reason = f"{type(error).__name__}: {error}"[:500]
        traceback.print_exc()
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
    finally:
        print(json.dumps({"check": name, "reason": reason}), flush=True)


@contextlib.contextmanager
def raises(kind: type[BaseException], text: str = "") -> Iterator[None]:
    try:
        yield
    except kind as error:
        assert text in str(error), f"{text!r} is not in {error}"
    else:
        raise AssertionError(f"{kind.__name__} was not raised")
