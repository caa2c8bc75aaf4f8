"""Entry point of the background server of `rock admin start`: `python -m rock.cli.server`."""

from __future__ import annotations

import argparse
import gc
import sys


def main() -> int:
    gc.disable()  # collections would take a tenth of the start-up time; `serve` enables them
    from rock.cli.installation import require_server
    from rock.cli.output import status_of

    if status := status_of(require_server):
        return status
    from rock.cli.serve.serve import run_server
    from rock.settings import Settings

    parser = argparse.ArgumentParser(prog="rock.cli.server")
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    given = parser.parse_args()
    return status_of(lambda: run_server(Settings.read(host=given.host, port=given.port)))


if __name__ == "__main__":
    sys.exit(main())
