"""Fields as data: what a YAML file may hold, checked in one pass that reports every problem, and as JSON Schema.

A specification is a nest of the frozen classes below. ``problems`` compares a document with it; ``json_schema`` gives
the same specification to editors. Run configurations and hardware profiles are both checked by this file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from emulation.errors import InputError, suggestion
from hwmodels.strict_yaml import Document, KeyPath, dotted


@dataclass(frozen=True, kw_only=True)
class Field:
    """What one key may hold; ``doc`` is its one-line meaning, ``required`` whether its mapping must have it."""

    doc: str = ""
    required: bool = True


@dataclass(frozen=True, kw_only=True)
class Number(Field):
    """A finite number: ``above`` and ``below`` are exclusive limits; ``hint`` is for one that is out of range."""

    above: float | None = None
    minimum: float | None = None
    maximum: float | None = None
    below: float | None = None
    integer: bool = False
    hint: str | None = None


@dataclass(frozen=True, kw_only=True)
class Text(Field):
    """Non-empty text: one of ``choices``, or all of it matching ``pattern`` (a regular expression), where given."""

    choices: tuple[str, ...] | None = None
    pattern: str | None = None
    hint: str | None = None


@dataclass(frozen=True, kw_only=True)
class Flag(Field):
    """``true`` or ``false``."""


@dataclass(frozen=True, kw_only=True)
class Null(Field):
    """``null``."""


@dataclass(frozen=True, kw_only=True)
class Anything(Field):
    """A value that is checked elsewhere."""


@dataclass(frozen=True, kw_only=True)
class Items(Field):
    """A list of at least ``minimum`` items, each as ``item`` says."""

    item: Field
    minimum: int = 0


@dataclass(frozen=True, kw_only=True)
class Table(Field):
    """A mapping from free names (of ``keys``, where given) to what ``value`` says, at least ``minimum`` of them."""

    value: Field
    keys: tuple[str, ...] | None = None
    minimum: int = 0


@dataclass(frozen=True, kw_only=True)
class Fields(Field):
    """A mapping with exactly these keys."""

    entries: Mapping[str, Field]


@dataclass(frozen=True, kw_only=True)
class OneOf(Field):
    """A value as one of ``options`` says."""

    options: tuple[Field, ...]


def problems(document: Document, field: Field) -> list[InputError]:
    """Every way in which a document is not what ``field`` says, keys given twice included, each with file and line."""
    found = list(document.problems)
    _check(document.data, field, (), document, found)
    return found


def _check(value: Any, field: Field, path: KeyPath, document: Document, found: list[InputError]) -> None:
    def wrong(message: str, hint: str | None = None) -> None:
        found.append(document.error(path, f"{_shown(path, value)} {message}", hint=hint))

    if isinstance(field, OneOf):
        _check_one_of(value, field, path, document, found)
    elif not _has_type(value, field):
        wrong(f"is not {_expected(field)}", _type_hint(value, field))
    elif isinstance(field, Number):
        _check_number(value, field, wrong)
    elif isinstance(field, Text):
        if field.choices is not None and value not in field.choices:
            wrong("is unknown", suggestion(value, field.choices))
        elif field.pattern is not None and not re.fullmatch(field.pattern, value):
            wrong("is not allowed here", field.hint or f"it has to match {field.pattern}")
        elif not value.strip():
            wrong("is empty", field.hint)
    elif isinstance(field, Items):
        if len(value) < field.minimum:
            message = f"{dotted(path)} has {len(value)} items, at least {field.minimum} are needed"
            found.append(document.error(path, message))
        for index, item in enumerate(value):
            _check(item, field.item, (*path, index), document, found)
    elif isinstance(field, Table):
        _check_table(value, field, path, document, found)
    elif isinstance(field, Fields):
        _check_fields(value, field, path, document, found)


def _check_number(value: float, field: Number, wrong: Any) -> None:
    if not math.isfinite(value):
        wrong("is not finite", field.hint)
    elif field.above is not None and not value > field.above:
        wrong(f"is not above {field.above:g}", field.hint)
    elif field.minimum is not None and not value >= field.minimum:
        wrong(f"is below {field.minimum:g}", field.hint)
    elif field.below is not None and not value < field.below:
        wrong(f"is not below {field.below:g}", field.hint)
    elif field.maximum is not None and not value <= field.maximum:
        wrong(f"is above {field.maximum:g}", field.hint)


def _check_table(
    value: dict[str, Any], field: Table, path: KeyPath, document: Document, found: list[InputError]
) -> None:
    if len(value) < field.minimum:
        found.append(
            document.error(path, f"{dotted(path)} has {len(value)} entries, at least {field.minimum} are needed")
        )
    for key, item in value.items():
        here = (*path, key)
        if field.keys is not None and key not in field.keys:
            found.append(
                document.error(here, f"unknown name {_cut(key)} in {dotted(path)}", hint=suggestion(key, field.keys))
            )
        else:
            _check(item, field.value, here, document, found)


def _check_fields(
    value: dict[str, Any], field: Fields, path: KeyPath, document: Document, found: list[InputError]
) -> None:
    where = f" in {dotted(path)}" if path else ""
    for key, item in value.items():
        if key in field.entries:
            _check(item, field.entries[key], (*path, key), document, found)
        else:
            message = f"unknown key {_cut(key)}{where}"
            found.append(document.error((*path, key), message, hint=suggestion(key, field.entries)))
    for key, entry in field.entries.items():
        if entry.required and key not in value:
            found.append(document.error(path, f"missing key {key!r}{where}", hint=entry.doc or None))


def _check_one_of(value: Any, field: OneOf, path: KeyPath, document: Document, found: list[InputError]) -> None:
    fitting = [option for option in field.options if _has_type(value, option)]
    if not fitting:
        expected = " or ".join(dict.fromkeys(_expected(option) for option in field.options))
        hint = next(filter(None, (_type_hint(value, option) for option in field.options)), None)
        found.append(document.error(path, f"{_shown(path, value)} is not {expected}", hint=hint))
        return
    _check(value, min(fitting, key=lambda option: _misfit(value, option)), path, document, found)


def _misfit(value: Any, field: Field) -> int:
    """How many keys of a mapping are not those that ``field`` has: which of several kinds of mapping was meant."""
    if not isinstance(field, Fields):
        return 0
    missing = [key for key, entry in field.entries.items() if entry.required and key not in value]
    return len(missing) + sum(key not in field.entries for key in value)


def _has_type(value: Any, field: Field) -> bool:
    match field:
        case Number():
            return isinstance(value, int if field.integer else (int, float)) and not isinstance(value, bool)
        case Text():
            return isinstance(value, str)
        case Flag():
            return isinstance(value, bool)
        case Null():
            return value is None
        case Items():
            return isinstance(value, list)
        case Table() | Fields():
            return isinstance(value, dict)
        case OneOf():
            return any(_has_type(value, option) for option in field.options)
    return True


def _expected(field: Field) -> str:
    match field:
        case Number():
            return "a whole number" if field.integer else "a number"
        case Text():
            return "text"
        case Flag():
            return "true or false"
        case Null():
            return "null"
        case Items():
            return "a list"
        case Table() | Fields():
            return "a mapping of keys to values"
    return "allowed here"


def _type_hint(value: Any, field: Field) -> str | None:
    if value is None:
        return "give it a value, or leave the key out" if not field.required else "give it a value"
    if isinstance(field, Number) and isinstance(value, str):
        return field.hint or "a bare number, without unit, quotes or separators: 3.35e12"
    if isinstance(field, Flag) and isinstance(value, str):
        return "true or false, bare"
    if isinstance(field, Text) and isinstance(value, (int, float)):
        return "text that looks like a number or a truth value needs quotes"
    return None


def _shown(path: KeyPath, value: Any) -> str:
    shown = {dict: "a mapping", list: "a list", type(None): "null"}.get(type(value)) or _cut(value)
    return f"{dotted(path)}={shown}" if path else f"the file's content ({shown})"


def _cut(value: Any) -> str:
    large = isinstance(value, float) and 1e6 <= abs(value) < 1e16  # people write 3.35e12, not thirteen digits
    text = f"{value:.12g}" if large else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def json_schema(field: Field) -> dict[str, Any]:
    """``field`` as JSON Schema (draft 2020-12), without the outermost ``$schema`` and ``title``."""
    schema: dict[str, Any] = {"description": field.doc} if field.doc else {}
    match field:
        case Number():
            schema["type"] = "integer" if field.integer else "number"
            limits = {"exclusiveMinimum": field.above, "minimum": field.minimum, "exclusiveMaximum": field.below}
            limits["maximum"] = field.maximum
            schema |= {name: limit for name, limit in limits.items() if limit is not None}
        case Text():
            schema |= {"type": "string", "minLength": 1}
            if field.choices is not None:
                schema["enum"] = list(field.choices)
            if field.pattern is not None:
                schema["pattern"] = f"^(?:{field.pattern})$"
        case Flag():
            schema["type"] = "boolean"
        case Null():
            schema["type"] = "null"
        case Items():
            schema |= {"type": "array", "items": json_schema(field.item), "minItems": field.minimum}
        case Table():
            schema |= {
                "type": "object",
                "additionalProperties": json_schema(field.value),
                "minProperties": field.minimum,
            }
            if field.keys is not None:
                schema["propertyNames"] = {"enum": list(field.keys)}
        case Fields():
            schema |= {"type": "object", "additionalProperties": False}
            schema["properties"] = {name: json_schema(entry) for name, entry in field.entries.items()}
            schema["required"] = [name for name, entry in field.entries.items() if entry.required]
        case OneOf():
            schema["anyOf"] = [json_schema(option) for option in field.options]
    return schema
