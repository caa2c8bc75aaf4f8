"""Hooks of mkdocs (`make docs`): pages that are not in docs/, and links to them.

- README.md of the top folder is the first page; CONTRIBUTING, CHANGELOG, SECURITY and CODE_OF_CONDUCT are pages.
- reference/sdk.md lists the public names of the SDK, whose docstrings mkdocstrings renders.
- reference/http.md is the table of routes.
- Links to folders of the repository, which are not on the site, become plain text.
- versions.json beside the site lists the versions there, which the site's header offers, and index.html leads to the
  highest one.
"""

from __future__ import annotations

import json
import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "src"))

PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "CONTRIBUTING.md", "CHANGELOG.md": "CHANGELOG.md",
         "SECURITY.md": "SECURITY.md", "CODE_OF_CONDUCT.md": "CODE_OF_CONDUCT.md"}  # fmt: skip
CONTENTS = "contents.md"
SDK = """# SDK

`rock.Sandbox` and the other names of `rock` are for asyncio. `rock.sync` has the same names with methods that block.
Every error is a [`RockError`](errors.md).

"""
_LINK = re.compile(r"\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    for source, name in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, name, content=_moved(text, name, files)))
    contents = files.get_file_from_path("README.md")  # the list of pages; the first page is that of the top folder
    if contents is not None:
        files.remove(contents)
        files.append(File.generated(config, CONTENTS, content=contents.content_string))
    files.append(File.generated(config, "reference/sdk.md", content=sdk_page()))
    files.append(File.generated(config, "reference/http.md", content=http_page()))
    return files


def _moved(text: str, name: str, files: Files) -> str:
    """The text of a page of the top folder, with links from the site's top folder."""

    def link(found: re.Match[str]) -> str:
        label, target, anchor = found[1], found[2], found[3] or ""
        if "://" in target:
            return found[0]
        target = target.removeprefix("docs/")
        return f"[{label}]({PAGES.get(target, target)}{anchor})"

    return _LINK.sub(link, text)


def on_post_build(config: Any) -> None:
    folder = Path(config.site_dir).parent
    names = [path.parent.name for path in folder.glob("*/404.html")]
    names.sort(key=lambda name: [int(part) if part.isdecimal() else -1 for part in name.split(".")], reverse=True)
    versions = [{"version": name, "title": name, "aliases": ["latest"] if name == names[0] else []} for name in names]
    (folder / "versions.json").write_text(json.dumps(versions, indent=1) + "\n", encoding="utf-8")
    (folder / "index.html").write_text(f'<meta http-equiv="refresh" content="0; url={names[0]}/index.html">\n',
                                       encoding="utf-8")


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links to pages of the top folder, and to what is not on the site."""
    folder = posixpath.dirname(page.file.src_uri)

    def link(found: re.Match[str]) -> str:
        label, target, anchor = found[1], found[2], found[3] or ""
        if "://" in target or target.startswith("mailto:"):
            return found[0]
        place = posixpath.normpath(posixpath.join(folder, target))
        if place.startswith("../"):
            inside = place.removeprefix("../")
            if inside in PAGES:
                return f"[{label}]({posixpath.relpath(PAGES[inside], folder or '.')}{anchor})"
            return f"{label} (`{inside}`)"
        if place == "README.md":
            return f"[{label}]({posixpath.relpath(CONTENTS, folder or '.')}{anchor})"
        if files.get_file_from_path(place) is not None:
            return found[0]
        return f"{label} (`docs/{place}`)"

    # The tests read the words after the language of a block; the site does not.
    return _LINK.sub(link, re.sub(r"^```(\w+) [^\n]*$", r"```\1", markdown, flags=re.MULTILINE))


def sdk_page() -> str:
    import rock
    import rock.sdk

    found = {name: getattr(rock, name) for name in rock.__all__} | {
        name: getattr(rock.sdk, name) for name in rock.sdk.__all__}  # fmt: skip
    errors = {name for name, kind in found.items() if isinstance(kind, type) and issubclass(kind, BaseException)}
    rows = [
        f"::: {kind.__module__}.{kind.__qualname__}\n    options: {{heading_level: 2}}\n"
        for name, kind in sorted(found.items(), key=lambda pair: (isinstance(pair[1], type), pair[0]))
        if name not in errors and hasattr(kind, "__qualname__")
    ]
    return SDK + "\n".join(rows)


def http_page() -> str:
    from rock.protocol.routes import ROUTES

    parts = ["# HTTP API\n\nThe routes of a server. `/docs` of a server has the models of requests and responses, and "
             "`/openapi.json` the same for programs. Every mutating request may have an `Idempotency-Key`. The header "
             "`Authorization: Bearer KEY` has the key; `access` is the scope that it needs "
             "([keys](../guides/keys.md)).\n"]  # fmt: skip
    titles = {"control": "Control plane: the admin", "data": "Data plane: sandboxes",
              "node": "Node plane: commands of an admin to a rocklet"}  # fmt: skip
    for plane, title in titles.items():
        parts.append(f"## {title}\n\n| name | method | path | access | request | response | |\n|{'---|' * 7}")
        for row in ROUTES.values():
            if row.plane == plane:
                cells = (row.name, row.method, f"`{row.path}`", str(row.access), row.request, row.answer, row.summary)
                parts.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        parts.append("")
    return "\n".join(parts)
