"""Write clients/typescript/src/generated.ts: the messages and routes of the OpenAPI page, and the classes of errors.

`--check`: only compare.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from rock import errors
from rock.protocol.routes import name_of
from rock.sync import Client
from rock.testing.server import FakeServer

TARGET = Path(__file__).parent.parent / "clients" / "typescript" / "src" / "generated.ts"
HEAD = """// `python tools/typescript_types.py` writes this file from the OpenAPI page of a server and from its errors.

/* eslint-disable */
import { RockError } from "./error.js";

"""
_NAME = re.compile(r"^[A-Za-z_$][A-Za-z0-9_$]*$")
_METHODS = ("get", "head", "post", "put", "patch", "delete", "options")
_PLAIN = {"string": "string", "integer": "number", "number": "number", "boolean": "boolean", "null": "null"}


def kind(schema: Any) -> str:
    """The type of a schema."""
    if not isinstance(schema, dict) or not schema:
        return "unknown"
    if "$ref" in schema:
        return str(schema["$ref"]).rpartition("/")[2]
    if "const" in schema:
        return json.dumps(schema["const"])
    if "enum" in schema:
        return " | ".join(json.dumps(value) for value in schema["enum"])
    for word in ("anyOf", "oneOf", "allOf"):
        if word in schema:
            parts = list(dict.fromkeys(kind(part) for part in schema[word]))
            return (" & " if word == "allOf" else " | ").join(parts)
    given = schema.get("type")
    if isinstance(given, list):
        return " | ".join(_PLAIN.get(one, "unknown") for one in given)
    if given == "array":
        if "prefixItems" in schema:
            return f"[{', '.join(kind(item) for item in schema['prefixItems'])}]"
        item = kind(schema.get("items"))
        return f"({item})[]" if " " in item else f"{item}[]"
    if given == "object" and schema.get("properties"):
        return "{ " + " ".join(fields(schema)) + " }"
    if given == "object":
        value = schema.get("additionalProperties")
        return f"Record<string, {kind(value) if isinstance(value, dict) else 'unknown'}>"
    return _PLAIN.get(str(given), "unknown")


def fields(schema: dict[str, Any]) -> list[str]:
    """The lines of the properties of an object. A property that is not required may be left out."""
    required = set(schema.get("required", ()))
    return [
        f"{name if _NAME.match(name) else json.dumps(name)}{'' if name in required else '?'}: {kind(part)};"
        for name, part in schema["properties"].items()
    ]


def messages(schemas: dict[str, Any]) -> list[str]:
    lines = []
    for name in sorted(schemas):
        schema = schemas[name]
        about = " ".join(str(schema.get("description", "")).split()).replace("*/", "* /")
        lines += [f"/** {about} */"] if about else []
        if schema.get("type") == "object" and schema.get("properties"):
            lines += [f"export interface {name} {{", *(f"  {line}" for line in fields(schema)), "}", ""]
        else:
            lines += [f"export type {name} = {kind(schema)};", ""]
    return lines


def routes(paths: dict[str, Any]) -> list[str]:
    found = {
        name_of(method.upper(), path): (method.upper(), path)
        for path, methods in paths.items() if path.startswith("/v1/")
        for method in methods if method in _METHODS and name_of(method.upper(), path)
    }  # fmt: skip
    lines = ["/** Method and path of each operation. */", "export const ROUTES = {"]
    rows = sorted(found.items())
    lines += [f"  {name}: [{json.dumps(method)}, {json.dumps(path)}]," for name, (method, path) in rows]
    return [*lines, "} as const;", "", "export type Operation = keyof typeof ROUTES;", ""]


def classes() -> list[str]:
    """The tree of errors, a base class before its subclasses."""
    lines, codes = [], []

    def add(base: type[errors.RockError]) -> None:
        for child in base.__subclasses__():
            if child.__module__ != errors.__name__ or child.__bases__[0] is not base:
                continue
            about = " ".join((child.__doc__ or "").split("\n\n")[0].split()).replace("*/", "* /")
            lines.extend([f"/** {about} */", f"export class {child.__name__} extends {base.__name__} {{}}", ""])
            codes.append(f"  {json.dumps(child.code)}: {child.__name__},")
            add(child)

    add(errors.RockError)
    return [*lines, "/** The class of each code on the wire. */",
            "export const ERRORS: Record<string, typeof RockError> = {", *dict.fromkeys(codes), "};", ""]  # fmt: skip


def page() -> str:
    with FakeServer() as server, Client(server.url) as client:
        schema = client.transport.json("GET", "/openapi.json")
    parts = [*messages(schema["components"]["schemas"]), *routes(schema["paths"]), *classes()]
    return HEAD + "\n".join(parts)


def main() -> int:
    text = page()
    if "--check" in sys.argv[1:]:
        if TARGET.exists() and TARGET.read_text() == text:
            return 0
        print(f"{TARGET} is not current: run python tools/typescript_types.py", file=sys.stderr)
        return 1
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    TARGET.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
