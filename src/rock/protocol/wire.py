"""The base of all messages: validation, errors with a hint, and tables for notebooks."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from difflib import get_close_matches
from html import escape
from typing import TYPE_CHECKING, Any, ClassVar, Self, dataclass_transform

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from rock.errors import InvalidConfig

if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass
else:
    ModelMetaclass = type(BaseModel)  # its module is private


def html_table(rows: Mapping[str, object]) -> str:
    """Rows of a name and a value for a notebook. All values are escaped: a sandbox may have produced them."""
    cells = (
        f"<tr><th style='text-align:left'>{escape(name)}</th><td><pre>{escape(str(value))}</pre></td></tr>"
        for name, value in rows.items()
        if value not in (None, "")
    )
    return f"<table>{''.join(cells)}</table>"


class InvalidValue(InvalidConfig, ValueError):
    """A message was constructed with a wrong value: InvalidConfig, and a ValueError as in pydantic."""


def explain(error: ValidationError, kind: type[BaseModel]) -> InvalidValue:
    """The error of a ValidationError, with the field in `details` and the closest name as hint for a wrong name."""
    items = error.errors(include_url=False)
    parts = []
    hint = None
    for item in items:
        where = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            close = get_close_matches(where, kind.model_fields, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]!r}?" if close else hint
            parts.append(f"{kind.__name__} has no field {where!r}")
            continue
        message = item["msg"].removeprefix("Value error, ").replace("Input should be", "it must be")
        shown = repr(item["input"])
        if item["type"] not in ("value_error", "missing") and where.split(".")[0] not in _SECRET:
            message += f", not {shown if len(shown) <= 80 else shown[:76] + '...'}"
        hint = hint or _hint(where, item["type"], item["input"], item.get("ctx", {}))
        parts.append(f"{where}: {message}" if where and not message.startswith(where) else message)
    first = str(items[0]["loc"][0]) if items and items[0]["loc"] else ""
    return InvalidValue("; ".join(parts), hint=hint, details={"field": first})


_SECRET = frozenset({"key", "headers", "api_key", "xrl_authorization", "registry_password", "extra_headers", "env"})


def _hint(field: str, kind: str, value: object, context: Mapping[str, Any]) -> str | None:
    """What to do about one wrong value."""
    if field in ("memory", "disk", "shm_size"):
        if isinstance(value, int | float) and not isinstance(value, bool):
            return f"write a string with a unit, like '{value:g}m' for {value:g} MiB"
        if isinstance(value, str) and value.isdigit():
            return f"{value} is a number of bytes: write '{value}m' for {value} MiB"
        return "use a number with a unit, like '512m' or '8g'"
    if kind in ("enum", "literal_error"):
        allowed = re.findall(r"'([^']*)'", str(context.get("expected", "")))
        close = get_close_matches(str(value), allowed, n=1, cutoff=0.5)
        return f"did you mean {close[0]!r}?" if close else None
    return None


@dataclass_transform(kw_only_default=True, field_specifiers=(Field,))
class _Checked(ModelMetaclass):
    """Construction of a message by a user raises InvalidValue; validation of a received one is unchanged."""


def _construct(kind: type[BaseModel], /, *args: Any, **fields: Any) -> Any:
    try:
        return type.__call__(kind, *args, **fields)
    except ValidationError as error:
        raise explain(error, kind) from None


type.__setattr__(_Checked, "__call__", _construct)  # in the class body, it would hide the fields from type checkers


class Wire(BaseModel, metaclass=_Checked):
    """Base of all messages: unknown keys are rejected, so that a misspelled key is an error."""

    # Deferred: the validator of a model is built on its first use. Building all of them takes a third of the start
    # time.
    model_config = ConfigDict(extra="forbid", validate_assignment=True, defer_build=True)

    @classmethod
    def made(cls, **values: Any) -> Self:
        """Construct a message from correct values, without validation: each request makes some. It takes a tenth of the
        time of pydantic's model_construct."""
        model = cls.__new__(cls)
        set_to = object.__setattr__
        set_to(model, "__dict__", {**_defaults(cls), **values})
        set_to(model, "__pydantic_fields_set__", set(values))
        set_to(model, "__pydantic_extra__", None)
        set_to(model, "__pydantic_private__", None)
        return model


@functools.cache
def _defaults(kind: type[Wire]) -> dict[str, Any]:
    """The default values that all messages of a class can share; a field with a factory has to be given."""
    return {name: field.get_default() for name, field in kind.model_fields.items()
            if not field.is_required() and field.default_factory is None}  # fmt: skip


def _assign(message: Wire, name: str, value: object) -> None:
    try:
        BaseModel.__setattr__(message, name, value)
    except ValidationError as error:
        raise explain(error, type(message)) from None


type.__setattr__(Wire, "__setattr__", _assign)


class Inside(Wire):
    """Base of messages whose strings reach an operating system, as paths, words or names: NUL characters are rejected.
    texts: fields that may contain one."""

    texts: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="after")
    def _no_nul(self) -> Self:
        values, texts = self.__dict__, self.texts
        for name in self.__pydantic_fields_set__:
            value = values[name]
            if ("\0" in value if type(value) is str else _has_nul(value)) and name not in texts:
                raise ValueError(f"{name}: a NUL character cannot be in it")
        return self


def _has_nul(value: object) -> bool:
    if isinstance(value, str):
        return "\0" in value
    if isinstance(value, dict):
        return any(_has_nul(part) for row in value.items() for part in row)
    return isinstance(value, list | tuple) and any(map(_has_nul, value))
