"""Tools for files."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from rock.dialects.mcp.context import ToolContext
from rock.dialects.mcp.tools import InSandbox, Result, Tool
from rock.errors import InvalidConfig
from rock.protocol.keys import Access

_PAGE = 2000  # lines of one result
_LONGEST = 256 << 10  # bytes of one result
_EDITED = 8 << 20  # bytes of a file that can be edited


class Path(InSandbox):
    path: str = Field(min_length=1, max_length=4096, description="An absolute path in the sandbox.")


class Read(Path):
    line: int = Field(default=1, ge=1, description="The first line.")
    lines: int = Field(default=_PAGE, ge=1, le=_PAGE, description="Maximum number of lines.")


class Write(Path):
    content: str = Field(max_length=12 << 20, description="The complete text of the file.")
    append: bool = Field(default=False, description="Append to the file instead.")


class Edit(Path):
    old: str = Field(min_length=1, max_length=1 << 20, description="Text that occurs in the file exactly once.")
    new: str = Field(max_length=1 << 20, description="The text in its place.")
    all: bool = Field(default=False, description="Replace every occurrence.")


class List(Path):
    offset: int = Field(default=0, ge=0)
    limit: int = Field(default=500, ge=1, le=5000)


async def read(context: ToolContext, given: Read) -> Result:
    query = {"path": given.path, "length": _EDITED}
    data = await context.bytes("read_file", given=given.sandbox_id, query=query)
    text = _text(data, given.path)
    lines = text.splitlines(keepends=True)
    chosen: list[str] = []
    size = 0
    for row in lines[given.line - 1 : given.line - 1 + given.lines]:
        size += len(row.encode())
        if size > _LONGEST and chosen:
            break
        chosen.append(row[:_LONGEST])
    next_line = given.line + len(chosen)
    more = next_line <= len(lines)
    content = "".join(chosen)
    shown = {"content": content, "lines": len(lines), "next_line": next_line if more else None,
             "truncated": len(data) == _EDITED}  # fmt: skip
    note = f"\n[{len(lines)} lines; the next is line {next_line}]" if more else ""
    return Result(content + note, shown)


async def write(context: ToolContext, given: Write) -> Result:
    data = given.content.encode("utf-8", "surrogatepass")
    query = {"path": given.path, "append": int(given.append)}
    made = await context.json("write_file", data, given=given.sandbox_id, query=query)
    return Result(f"{given.path} has {made['size']} bytes", {"path": given.path, "size": made["size"]})


async def edit(context: ToolContext, given: Edit) -> Result:
    where = await context.json("stat_file", given=given.sandbox_id, query={"path": given.path})
    if where["size"] > _EDITED:
        raise InvalidConfig(f"{given.path} has {where['size']} bytes, and at most {_EDITED} can be edited",
                            hint="use run_command with sed")
    data = await context.bytes("read_file", given=given.sandbox_id, query={"path": given.path})
    text = data.decode("utf-8", "surrogateescape")  # other bytes of the file stay as they are
    found = text.count(given.old)
    if found == 0:
        raise InvalidConfig(f"the text does not occur in {given.path}", hint="read the file, and copy the text exactly")
    if found > 1 and not given.all:
        raise InvalidConfig(f"the text occurs {found} times in {given.path}",
                            hint="add lines around it until it is unique, or set all=true")
    changed = text.replace(given.old, given.new).encode("utf-8", "surrogateescape")
    query = {"path": given.path, "mode": f"{where['mode'] & 0o7777:o}"}
    await context.bytes("write_file", changed, given=given.sandbox_id, query=query)
    count = found if given.all else 1
    return Result(f"{count} {'occurrences' if count > 1 else 'occurrence'} replaced in {given.path}",
                  {"path": given.path, "replaced": count})


async def listed(context: ToolContext, given: List) -> Result:
    query = {"path": given.path, "offset": given.offset, "limit": given.limit}
    found = await context.json("list_files", given=given.sandbox_id, query=query)
    items = [{name: item[name] for name in ("name", "kind", "size")} for item in found["items"]]
    rows = [f"{item['name']}{'/' if item['kind'] == 'directory' else ''}  {item['size']}" for item in items]
    shown = {"files": items, "next_offset": found["next"] if len(items) == given.limit else None}
    return Result("\n".join(rows) or "empty", shown)


def _text(data: bytes, path: str) -> str:
    if b"\0" in data[:8192]:
        raise InvalidConfig(f"{path} is not a text file: it has NUL bytes", hint="use run_command with xxd or file")
    return data.decode("utf-8", "backslashreplace")


TOOLS: list[Tool[Any]] = [
    Tool("read_file", "Read a file", "Read lines of a text file.", Read, Access.READ, read, read_only=True),
    Tool("write_file", "Write a file", "Write a text file. Missing parent folders are created.", Write, Access.RUN,
         write, destructive=True),
    Tool("edit_file", "Edit a file", "Replace a text that occurs once in a file, or every occurrence.", Edit,
         Access.RUN, edit, destructive=True),
    Tool("list_files", "List files", "List the files of a folder.", List, Access.READ, listed, read_only=True),
]  # fmt: skip
