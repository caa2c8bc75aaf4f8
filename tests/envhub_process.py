"""An `envhub` of a test's own, as a process."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# The console script, which is not beside every Python that can run the tests.
CALL = "from rock.cli.scripts import envhub_main; envhub_main()"
SCRIPT = [sys.executable, "-W", "error::ResourceWarning", "-c", CALL]


@contextmanager
def envhub(folder: Path, *arguments: str, **environment: str) -> Iterator[str]:
    """The URL of one; it ends with status 0 when it is asked to."""
    environ = {**os.environ, "ROCK_HOME": str(folder / "home"), **environment}
    command = [*SCRIPT, "--port", "0", *arguments]
    with subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True, cwd=folder) as child:
        assert child.stdout is not None
        line = child.stdout.readline()
        found = re.search(r"http://\S+", line)
        try:
            assert found, line
            yield found[0]
        finally:
            child.send_signal(signal.SIGTERM)
            assert child.wait(30) == 0, line
