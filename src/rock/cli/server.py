"""The server as `rock admin start` starts it: `python -m rock.cli.server`."""

from __future__ import annotations

import argparse
import gc
import sys


def main() -> int:
    gc.disable()  # what a start makes stays: to look through it again and again is a tenth of a start. On in `serve`
    from rock.cli.output import status_of
    from rock.cli.serve.serve import run_server
    from rock.settings import Settings

    parser = argparse.ArgumentParser(prog="rock.cli.server")
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    given = parser.parse_args()
    return status_of(lambda: run_server(Settings.read(host=given.host, port=given.port)))


if __name__ == "__main__":
    sys.exit(main())
