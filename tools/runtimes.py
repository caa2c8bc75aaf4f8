"""Write the table of docs/runtimes.md from what the runtimes declare. `--check`: only say whether it is up to date."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from rock.cli.serve.serve import make_runtimes
from rock.protocol.sandbox import Isolation
from rock.rocklet.images.store import Images
from rock.runtime.base import Files, Keeps, Limits, Pauses, Ports, Runtime, Snapshots, Trait, Watches
from rock.runtime.plugins import OWN
from rock.runtime.pools import Pools
from rock.settings import Settings

PAGE = Path(__file__).parent.parent / "docs" / "runtimes.md"
BEGIN, END = "<!-- written by tools/runtimes.py -->\n", "<!-- to here -->\n"
TRAITS = {
    Trait.PROGRAMS: "runs the programs of its image",
    Trait.IMAGES: "mounts the images of the server's store",
    Trait.TERMINALS: "terminals",
    Trait.OUTLIVES: "outlives the server's process",
    Trait.ROOT: "files of its own: no path leads to the host's",
    Trait.TREES: "a time-out ends daemons and orphans too",
    Trait.PROCESSES: "sees no processes but its own",
    Trait.NETWORK: "`network=\"none\"` is a loopback of its own",
    Trait.USERS: "several users inside",
    Trait.LIMITS: "memory, CPUs and processes are held",
}
TYPES = {
    Files: "files in and out",
    Ports: "ports inside can be reached",
    Limits: "measured use",
    Watches: "tells of kills for memory",
    Keeps: "stopped sandboxes keep their files, and are archived",
    Pauses: "pauses and resumes",
    Snapshots: "becomes an image (`commit`)",
    Pools: "warm pool",
}


def columns() -> list[tuple[str, Isolation, Runtime]]:
    """(runtime, level, the runtime) of ROCK's own, in the order of their names and from the weakest level on."""
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(Path(folder), runtime="process")
        made = make_runtimes(settings, Images(settings.image_dir))
    own = [made[name] for name in sorted(made) if name in OWN]
    order = list(Isolation)
    return [(runtime.name, level, runtime) for runtime in own for level in sorted(runtime.traits, key=order.index)]


def table() -> str:
    """The table, as Markdown."""
    found = columns()
    assert set(TRAITS) == set(Trait), "every trait has a row"
    rows = [["", *(f"`{name}`" for name, _, _ in found)], ["---"] * (len(found) + 1)]
    rows.append(["isolation level", *(f"`{level.value}`" for _, level, _ in found)])
    for trait, text in TRAITS.items():
        rows.append([text, *("yes" if trait in runtime.traits[level] else "" for _, level, runtime in found)])
    for kind, text in TYPES.items():
        rows.append([text, *("yes" if isinstance(runtime, kind) else "" for _, _, runtime in found)])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def page(text: str) -> str:
    """The page with the table of now."""
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n{table()}\n{END}{tail}"


def main() -> int:
    text = PAGE.read_text()
    new = page(text)
    if "--check" in sys.argv[1:]:
        if new != text:
            print(f"{PAGE} is not what the runtimes declare: run python tools/runtimes.py")
        return int(new != text)
    PAGE.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
