"""The YAML loader: numbers are numbers, every value has its line, and what is wrong is an InputError."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import hwmodels.strict_yaml as strict_yaml
from emulation.errors import InputError
from hwmodels.strict_yaml import (
    DEPTH_LIMIT,
    SIZE_LIMIT_BYTES,
    Document,
    InputErrors,
    dotted,
    dump_yaml,
    load_yaml,
    parse_yaml,
    raise_all,
    read_yaml,
)

SCALARS: dict[str, Any] = {
    "1e-5": 1e-5,
    "3.35e12": 3.35e12,
    "1E5": 1e5,
    "1.e3": 1e3,
    ".5": 0.5,
    "-0.0": -0.0,
    "+7": 7,
    "010": 10,
    "989.4e12": 989.4e12,
    ".inf": math.inf,
    "-.Inf": -math.inf,
    "true": True,
    "False": False,
    "null": None,
    "~": None,
    "": None,
    "yes": "yes",
    "on": "on",
    "1:30": "1:30",
    "2024-01-01": "2024-01-01",
    "0x10": "0x10",
    "1_000": "1_000",
    "1e": "1e",
    "e5": "e5",
    ".": ".",
    "80 GB": "80 GB",
    "'1e-5'": "1e-5",
    '"true"': "true",
    "!": "!",
}


@pytest.mark.parametrize("text", [text for text in SCALARS if text != "!"])
def test_a_scalar_is_what_people_mean(text: str) -> None:
    found = parse_yaml(f"key: {text}\n").data["key"]
    assert found == SCALARS[text]
    assert type(found) is type(SCALARS[text])


def test_nan_is_a_number() -> None:
    assert math.isnan(parse_yaml("a: .nan").data["a"])


def test_pyyaml_would_read_it_otherwise() -> None:
    """The reason for this loader, seen once: PyYAML reads 1e-5 as text and drops the first of two equal keys."""
    assert yaml.safe_load("a: 1e-5\nb: 1\nb: 2") == {"a": "1e-5", "b": 2}


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_lines(tmp_path: Path, ending: str) -> None:
    text = ["# a comment", "a: 1", "", "b:", "  - x", "  - {c: 2,", "     d: 3}", "e: |", "  f: 1", "g: end"]
    file = tmp_path / "x.yaml"
    file.write_bytes(b"\xef\xbb\xbf" + ending.join(text).encode())
    data, lines = load_yaml(file)
    assert data == {"a": 1, "b": ["x", {"c": 2, "d": 3}], "e": "f: 1\n", "g": "end"}
    assert lines == {
        (): 1,
        ("a",): 2,
        ("b",): 4,
        ("b", 0): 5,
        ("b", 1): 6,
        ("b", 1, "c"): 6,
        ("b", 1, "d"): 7,
        ("e",): 8,
        ("g",): 10,
    }


def test_equal_keys_are_all_reported_and_the_first_stands(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("a: {c: 1, c: 2}\nb: 1\na: {d: 1, d: 2}\n")
    with pytest.raises(InputErrors) as caught:
        load_yaml(file)
    assert [(e.line, e.message) for e in caught.value.errors] == [
        (1, "key 'a.c' given twice"),
        (3, "key 'a' given twice"),
        (3, "key 'a.d' given twice"),
    ]
    assert caught.value.errors[1].hint == "first given on line 1: keep one of them"
    assert str(caught.value).splitlines()[1] == f"{file}:3: key 'a' given twice"
    document = read_yaml(file)
    assert document.data == {"a": {"c": 1}, "b": 1}
    assert ("a", "d") not in document.lines


def test_many_equal_keys_take_no_square_time() -> None:
    assert len(parse_yaml("a: {b: 1}\n" * 20_000).problems) == 19_999


BOMB = "a: &a [x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [*{chr(97 + i)}, *{chr(97 + i)}]\n" for i in range(20)
)
WRONG = [
    ("a: &x 1", 1, "anchors"),
    ("a: 1\nb: *x", 2, "anchors"),
    ("&x a: 1", 1, "not plain text"),
    (BOMB, 1, "anchors"),
    ("a: 1\nb: {<<: *a}", 2, "anchors"),
    ("a: !!python/object/apply:os.system [ls]", 1, "tag"),
    ("a: !!float 1", 1, "tag"),
    ("a: 1\n---\nb: 1", 2, "second document"),
    ("[" * 40, 1, "nested deeper"),
    ("{a: " * 40, 1, "nested deeper"),
    ("? [1]\n: 2", 1, "not plain text"),
    ("a: [1", 2, "not YAML"),
    ("a: b: c", 1, "not YAML"),
    ("a:\n\t- 1", 2, "not YAML"),
    ("a: 1\n b: 2", 2, "not YAML"),
    ("a: 'x", 1, "not YAML"),
    ("a: 1\nb: \x00", 2, "does not allow"),
    ("a: 1\nb: \x07", 2, "does not allow"),
    ("a: 1\nb: \ud800", 2, "does not allow"),
    ("a: " + "9" * 101, 1, "101 characters"),
    ("%YAML 3.0\n---\na: 1", 1, "not YAML"),
]


@pytest.mark.parametrize(("text", "line", "message"), WRONG)
@pytest.mark.parametrize("loader", ["default", "python"])
def test_what_is_refused(text: str, line: int, message: str, loader: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if loader == "python":
        monkeypatch.setattr(strict_yaml, "_LOADER", yaml.SafeLoader)
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        parse_yaml(text, file="f.yaml")
    assert str(caught.value).startswith("f.yaml:")
    assert "\n" not in str(caught.value)
    assert caught.value.line is not None
    assert abs(caught.value.line - line) <= 1  # the two parsers differ by a line on text that ends too early


def test_tabs_get_a_hint() -> None:
    with pytest.raises(InputError) as caught:
        parse_yaml("a:\n  b: 1\n\tc: 2")
    assert caught.value.line in (2, 3)


def test_nesting_up_to_the_limit() -> None:
    assert parse_yaml("[" * DEPTH_LIMIT + "]" * DEPTH_LIMIT).data


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"a: 1\nb: caf\xe9\n")
    (tmp_path / "utf16.yaml").write_bytes("a: 1".encode("utf-16"))
    (tmp_path / "big.yaml").write_bytes(b"# " + b"x" * SIZE_LIMIT_BYTES)
    expected = {"latin.yaml": (2, "not UTF-8: byte 0xe9"), "utf16.yaml": (1, "not UTF-8: byte 0xff")}
    expected |= {"big.yaml": (None, "larger than"), "none.yaml": (None, "no such file"), ".": (None, "not a file")}
    for name, (line, message) in expected.items():
        with pytest.raises(InputError, match=message) as caught:
            read_yaml(tmp_path / name)
        assert (caught.value.line, str(caught.value.file)) == (line, str(tmp_path / name))
    for name in ("a\0b.yaml", "x" * 5000 + ".yaml"):
        with pytest.raises(InputError):
            read_yaml(name)


def test_an_empty_file_is_null(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("# nothing\n")
    assert load_yaml(tmp_path / "x.yaml") == (None, {(): 1})


def test_document_error_points_at_the_nearest_key() -> None:
    document = parse_yaml("a:\n  b: 1\n", file="f")
    assert str(document.error(("a", "b", 0), "x")) == "f:2: x"
    assert str(document.error(("a", "z"), "x")) == "f:1: x"
    assert str(document.error((), "x")) == "f:1: x"


def test_dotted() -> None:
    assert dotted(("formats", "nvfp4", "layouts", 0)) == "formats.nvfp4.layouts[0]"
    assert dotted(()) == ""


def test_raise_all() -> None:
    raise_all([])
    one, two = InputError("b", file="f", line=2), InputError("a", file="f", line=1)
    with pytest.raises(InputError) as caught:
        raise_all([one])
    assert caught.value is one
    with pytest.raises(InputErrors) as several:
        raise_all([one, two])
    assert several.value.errors == (two, one)
    assert (several.value.message, several.value.line) == ("a", 1)


# YAML forbids control characters in a file and folds its own line breaks even between quotes: JSON escapes those
TEXT = st.text(st.characters(exclude_categories=("Cs", "Cc", "Cf", "Cn", "Zl", "Zp")), max_size=40)
NUMBERS = st.integers(-(10**90), 10**90) | st.floats(allow_nan=False, allow_infinity=False)
PLAIN = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)


@given(PLAIN)
def test_json_is_read_as_json_reads_it(data: Any) -> None:
    """Every JSON document is YAML: an independent parser agrees on the value and the type of every number."""
    text = json.dumps(data, ensure_ascii=False)
    assert json.dumps(parse_yaml(text).data, ensure_ascii=False) == text


@given(PLAIN)
def test_what_yaml_writes_is_read_back(data: Any) -> None:
    assert json.dumps(parse_yaml(dump_yaml(data)).data) == json.dumps(data)


@pytest.mark.parametrize("text", ["0E0", "1e5", "-3E+7", "1.", ".5", "12", "true", "null", "~", "", "1e5x"])
def test_text_that_looks_like_something_else_stays_text(text: str) -> None:
    assert parse_yaml(dump_yaml({"root": text})).data == {"root": text}


def outcome(read: Callable[[], Document]) -> Document | InputError:
    try:
        return read()
    except InputError as error:
        return error


@given(st.text(st.sampled_from("ab:-[]{},&*!|>'\"#%@`?\\ \n\r\t0.e\x85\u2028\ufeff\x00"), max_size=60))
def test_any_text_gives_data_or_an_input_error(text: str) -> None:
    found = outcome(lambda: parse_yaml(text, file="f"))
    if isinstance(found, InputError):
        assert str(found).startswith("f")
        assert "\n" not in str(found)
    else:
        breaks = sum(text.count(character) for character in "\n\r\x85\u2028")
        assert all(1 <= line <= breaks + 1 for line in found.lines.values())


@given(st.binary(max_size=200))
def test_any_bytes_give_data_or_an_input_error(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    file.write_bytes(raw)
    found = outcome(lambda: read_yaml(file))
    if isinstance(found, InputError):
        assert str(found).startswith(str(file))
