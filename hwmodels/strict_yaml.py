"""YAML as people mean it: every value has a line, no key is given twice, numbers are numbers, nothing expands.

What differs from ``yaml.safe_load``: ``1e-5`` and ``3.35e12`` are floats; of two equal keys none is silently dropped;
``yes``, ``on``, ``1:30`` and dates stay text; keys are text; anchors, aliases and tags are refused, so that a small
file stays small in memory. Only text, ``true``/``false``, ``null``, integers, floats, lists and mappings remain.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from emulation.errors import InputError

SIZE_LIMIT_BYTES = 1 << 20
DEPTH_LIMIT = 32
DIGITS_LIMIT = 100  # of one number: beyond it int() itself refuses, and no quantity here needs them

KeyPath = tuple[str | int, ...]

_NULL = re.compile(r"~|null|Null|NULL|")
_TRUE = re.compile(r"true|True|TRUE")
_FALSE = re.compile(r"false|False|FALSE")
_INTEGER = re.compile(r"[-+]?[0-9]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_INFINITE = re.compile(r"([-+]?)\.(inf|Inf|INF)")
_NAN = re.compile(r"\.(nan|NaN|NAN)")
# libyaml is some ten times faster; the marks and the events are the same
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class InputErrors(InputError):
    """Several problems found in one go; ``errors`` holds each, in the order of the files' lines."""

    def __init__(self, errors: Iterable[InputError]) -> None:
        self.errors = tuple(errors)
        first = self.errors[0]
        super().__init__(first.message, hint=first.hint, file=first.file, line=first.line)

    def __str__(self) -> str:
        return "\n".join(str(error) for error in self.errors)


def raise_all(errors: Iterable[InputError]) -> None:
    """Raise nothing for no error, the error itself for one, ``InputErrors`` for several (by file and line)."""
    found = sorted(errors, key=lambda e: (str(e.file or ""), e.line or 0))
    if len(found) == 1:
        raise found[0]
    if found:
        raise InputErrors(found)


def dotted(path: KeyPath) -> str:
    """A key path as people write it: ``formats.nvfp4.layouts[0]``."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


@dataclass(frozen=True, kw_only=True)
class Document:
    """A YAML file as read: its data, and the line of every key and list item.

    Args:
        file: what messages call it.
        data: text, bool, None, int, float, list or dict (with text keys), nested.
        lines: key path -> 1-based line.
        problems: keys given twice (the first one stands in ``data``).
        files: key path -> file, for what came from another file than ``file``.
    """

    file: str
    data: Any
    lines: Mapping[KeyPath, int]
    problems: tuple[InputError, ...] = ()
    files: Mapping[KeyPath, str] = field(default_factory=dict)

    def error(self, path: KeyPath, message: str, *, hint: str | None = None) -> InputError:
        """An ``InputError`` that points at ``path``, or at the nearest key above it."""
        while path and path not in self.lines:
            path = path[:-1]
        return InputError(message, hint=hint, file=self.files.get(path, self.file), line=self.lines.get(path))


def load_yaml(path: str | Path) -> tuple[Any, Mapping[KeyPath, int]]:
    """The data of a YAML file and the line of every key; raises ``InputError`` with file and line.

    Args:
        path: a UTF-8 file of at most ``SIZE_LIMIT_BYTES``.

    Returns:
        ``(data, lines)``: lines maps key paths such as ``("formats", "nvfp4", "layouts", 0)`` to 1-based lines.
    """
    document = read_yaml(path)
    raise_all(document.problems)
    return document.data, document.lines


def read_yaml(path: str | Path) -> Document:
    """The document of a YAML file: equal keys are listed in its ``problems``, all else raises ``InputError``."""
    path = Path(path)
    try:
        if not path.is_file():
            raise InputError("no such file" if not path.exists() else "not a file", file=path)
        with path.open("rb") as stream:
            raw = stream.read(SIZE_LIMIT_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        if isinstance(error, InputError):
            raise
        raise InputError(f"cannot be read: {getattr(error, 'strerror', None) or error}", file=repr(str(path))) from None
    if len(raw) > SIZE_LIMIT_BYTES:
        raise InputError(f"larger than {SIZE_LIMIT_BYTES} bytes, the limit of a configuration file", file=path)
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        hint = "save the file as UTF-8"
        raise InputError(f"not UTF-8: byte 0x{raw[error.start]:02x}", hint=hint, file=path, line=line) from None
    return parse_yaml(text, file=str(path))


def parse_yaml(text: str, *, file: str = "<text>") -> Document:
    """The document in ``text``; raises ``InputError`` as ``read_yaml`` does."""
    builder = _Builder(file)
    try:
        data = builder.document(yaml.parse(text, Loader=_LOADER))
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1 if isinstance(error.position, int) else None
        raise InputError("a character that YAML does not allow", file=file, line=line) from None
    except UnicodeEncodeError as error:
        raise InputError(
            "a character that YAML does not allow", file=file, line=text.count("\n", 0, error.start) + 1
        ) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = " ".join(filter(None, (error.context, error.problem)))
        hint = "indent with spaces" if "'\\t'" in problem else None
        raise InputError(f"not YAML: {problem}", hint=hint, file=file, line=mark.line + 1 if mark else None) from None
    except yaml.YAMLError as error:
        raise InputError(f"not YAML: {' '.join(str(error).split())}", file=file) from None
    return Document(file=file, data=data, lines=builder.lines, problems=tuple(builder.problems))


class _Writer(yaml.SafeDumper):
    """Quotes the texts that this module would read as numbers; PyYAML alone leaves ``1e5`` bare."""


_Writer.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(f"(?:{_FLOAT.pattern})$"), list("-+.0123456789"))


def dump_yaml(data: Any) -> str:
    """Plain data as YAML that :func:`parse_yaml` reads back the same, in the order given."""
    return str(yaml.dump(data, Dumper=_Writer, sort_keys=False, allow_unicode=True))


def _line(event: Any) -> int:
    line: int = event.start_mark.line + 1
    return line


class _Builder:
    """Builds plain data from the parser's events, one recursive step per nesting, so that nothing is ever shared."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.lines: dict[KeyPath, int] = {(): 1}
        self.problems: list[InputError] = []

    def error(self, event: Any, message: str, hint: str | None = None) -> InputError:
        return InputError(message, hint=hint, file=self.file, line=_line(event))

    def document(self, events: Iterator[Any]) -> Any:
        data: Any = None
        seen = False
        for event in events:
            if isinstance(event, yaml.DocumentStartEvent):
                if seen:
                    raise self.error(event, "a second document (---) in one file", "give each its own file")
                seen = True
                data = self.value(next(events), events, ())
        return data

    def value(self, event: Any, events: Iterator[Any], path: KeyPath) -> Any:
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            raise self.error(
                event, "anchors (&) and aliases (*) are not allowed", "write the value out where it is used"
            )
        if event.tag is not None:
            raise self.error(event, f"tag {event.tag!r} is not allowed", "quote text, leave numbers bare")
        if len(path) > DEPTH_LIMIT:
            raise self.error(event, f"nested deeper than {DEPTH_LIMIT} levels")
        if isinstance(event, yaml.ScalarEvent):
            return self.scalar(event) if event.implicit[0] else event.value
        if isinstance(event, yaml.SequenceStartEvent):
            return self.sequence(events, path)
        return self.mapping(events, path)

    def sequence(self, events: Iterator[Any], path: KeyPath) -> list[Any]:
        items: list[Any] = []
        while not isinstance(event := next(events), yaml.SequenceEndEvent):
            here = (*path, len(items))
            self.lines[here] = _line(event)
            items.append(self.value(event, events, here))
        return items

    def mapping(self, events: Iterator[Any], path: KeyPath) -> dict[str, Any]:
        entries: dict[str, Any] = {}
        while not isinstance(event := next(events), yaml.MappingEndEvent):
            if not isinstance(event, yaml.ScalarEvent) or event.anchor is not None or event.tag is not None:
                raise self.error(event, "a key that is not plain text")
            here = (*path, event.value)
            if event.value in entries:
                hint = f"first given on line {self.lines[here]}: keep one of them"
                self.problems.append(self.error(event, f"key {dotted(here)!r} given twice", hint))
                shadow = _Builder(self.file)  # read to its end, and forgotten but for its own problems
                shadow.value(next(events), events, here)
                self.problems += shadow.problems
                continue
            self.lines[here] = _line(event)
            entries[event.value] = self.value(next(events), events, here)
        return entries

    def scalar(self, event: Any) -> Any:
        text: str = event.value
        if _NULL.fullmatch(text):
            return None
        if _TRUE.fullmatch(text):
            return True
        if _FALSE.fullmatch(text):
            return False
        if _INTEGER.fullmatch(text) or _FLOAT.fullmatch(text):
            if len(text) > DIGITS_LIMIT:
                raise self.error(event, f"a number of {len(text)} characters, at most {DIGITS_LIMIT}")
            return int(text) if _INTEGER.fullmatch(text) else float(text)
        if match := _INFINITE.fullmatch(text):
            return float(match[1] + "inf")
        return float("nan") if _NAN.fullmatch(text) else text
