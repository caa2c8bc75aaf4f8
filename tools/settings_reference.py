"""Write docs/reference/configuration.md from the table in src/rock/settings.py. `--check`: only compare."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from rock import settings

PAGE = Path(__file__).parent.parent / "docs" / "reference" / "configuration.md"
# Headings with the first variable of each, in the order of the table.
SECTIONS = (
    ("Client", "ROCK_BASE_URL"),
    ("Server", "ROCK_HOME"),
    ("Images", "ROCK_INSECURE_REGISTRIES"),
    ("Environments", "ROCK_ENV_PIPES"),
    ("Compatibility with the original ROCK", "ROCK_DIALECT_NETWORK"),
    ("Leases and archives", "ROCK_ENV_LEASE"),
    ("Network and TLS", "ROCK_NETWORK_RESOLVERS"),
    ("Store and workers", "ROCK_STORE"),
    ("Logs and telemetry", "ROCK_LOG_LEVEL"),
    ("Other", "ROCK_DRAIN_SECONDS"),
)
HEAD = """# Configuration

All settings are environment variables. Clients read theirs at each call, a server reads its own once, at its start.
`rock admin start` and `rocklet` have options for the most important ones. Sizes accept a unit: `512m`, `8g` (powers of
1024). Durations are in seconds. An invalid value ends the start with a message.

This page is generated from `src/rock/settings.py` by `python tools/settings_reference.py`.
"""


def rows() -> list[tuple[str, str, str]]:
    """(variables, default, meaning), in the order of the table."""
    found = []
    for line in (settings.__doc__ or "").splitlines():
        if line.startswith("| ") and not line.startswith(("| variable |",)):
            names, default, meaning = (cell.strip() for cell in line.strip("| ").split(" | ", 2))
            found.append((names, default, meaning))
    return found


def fields() -> set[str]:
    """The variables of the server's settings, by the fields of `Settings`."""
    found = [field for field in dataclasses.fields(settings.Settings) if not field.metadata.get("internal")]
    names = {f"ROCK_{field.name.upper()}" for field in found}
    cluster = {"KUBERNETES_SERVICE_HOST", "KUBERNETES_SERVICE_PORT"}
    return names - {"ROCK_DOCKER_HOST", "ROCK_KUBERNETES_HOST", "ROCK_KUBERNETES_PORT"} | {"DOCKER_HOST"} | cluster


def page() -> str:
    """The page, as Markdown."""
    starts = {first: title for title, first in SECTIONS}
    lines = [HEAD]
    for names, default, meaning in rows():
        first = names.split(",")[0]
        if first in starts:
            lines.append(f"## {starts[first]}\n\n| variable | default | meaning |\n|---|---|---|")
        shown = ", ".join(f"`{name.strip()}`" for name in names.split(","))
        lines.append(f"| {shown} | {default} | {meaning} |")
    text = "\n".join(lines) + "\n"
    return text.replace(" |\n## ", " |\n\n## ")


def main() -> int:
    if "--check" in sys.argv[1:]:
        if PAGE.read_text() != page():
            print(f"{PAGE} is not current: python tools/settings_reference.py", file=sys.stderr)
            return 1
        return 0
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page())
    return 0


if __name__ == "__main__":
    sys.exit(main())
