"""The checker of YAML fields: all problems in one pass, each with its line, and the same limits as its JSON Schema."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwmodels.fields import (
    Anything,
    Field,
    Fields,
    Flag,
    Items,
    Null,
    Number,
    OneOf,
    Table,
    Text,
    json_schema,
    problems,
)
from hwmodels.strict_yaml import Document, parse_yaml

SPEC = Fields(
    entries={
        "count": Number(integer=True, minimum=1, maximum=10, doc="how many"),
        "rate": Number(above=0, below=1, required=False, hint="a share"),
        "mode": Text(choices=("fast", "exact"), required=False),
        "name": Text(pattern=r"[a-z]+", required=False),
        "on": Flag(required=False),
        "list": Items(item=Number(), minimum=1, required=False),
        "table": Table(value=Number(), keys=("fp8", "nvfp4"), minimum=1, required=False),
        "either": OneOf(
            options=(Null(), Number(), Fields(entries={"a": Number()}), Fields(entries={"b": Number()})), required=False
        ),
        "any": Anything(required=False),
    }
)

BARE = "a bare number, without unit, quotes or separators: 3.35e12"


def found(text: str, field: Field = SPEC) -> list[tuple[int | None, str, str | None]]:
    return [(e.line, e.message, e.hint) for e in problems(parse_yaml(text, file="f"), field)]


def test_a_right_file_has_no_problems() -> None:
    text = "count: 3\nrate: 0.5\nmode: fast\nname: abc\non: true\nlist: [1, 2.5]\ntable: {fp8: 1e-5}"
    assert found(f"{text}\neither: {{b: 1}}\nany: [x]") == []


def test_every_problem_is_reported_with_its_line() -> None:
    text = "cuont: 3\nrate: 1.5\nmode: fats\nname: ABC\non: yes\nlist: []\ntable: {fp9: 1, nvfp4: x}\n"
    assert found(f"{text}either: text\nrate: 2\n") == [
        (9, "key 'rate' given twice", "first given on line 2: keep one of them"),
        (1, "unknown key 'cuont'", "did you mean 'count'?"),
        (2, "rate=1.5 is not below 1", "a share"),
        (3, "mode='fats' is unknown", "did you mean 'fast'?"),
        (4, "name='ABC' is not allowed here", "it has to match [a-z]+"),
        (5, "on='yes' is not true or false", "true or false, bare"),
        (6, "list has 0 items, at least 1 are needed", None),
        (7, "unknown name 'fp9' in table", "did you mean 'fp8'?"),
        (7, "table.nvfp4='x' is not a number", BARE),
        (8, "either='text' is not null or a number or a mapping of keys to values", BARE),
        (1, "missing key 'count'", "how many"),
    ]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("0", "count=0 is below 1"),
        ("11", "count=11 is above 10"),
        ("2.0", "count=2.0 is not a whole number"),
        ("true", "count=True is not a whole number"),
        ("", "count=null is not a whole number"),
        ("'3'", "count='3' is not a whole number"),
        ("[1]", "count=a list is not a whole number"),
        ("{a: 1}", "count=a mapping is not a whole number"),
        (".nan", "count=nan is not a whole number"),
    ],
)
def test_numbers(value: str, message: str) -> None:
    assert [m for _, m, _ in found(f"count: {value}")] == [message]


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf", "1e999", "0", "-0.0", "1"])
def test_a_share_is_between_its_limits(value: str) -> None:
    assert len(found(f"count: 1\nrate: {value}")) == 1


def test_the_kind_of_mapping_that_fits_best_is_meant() -> None:
    assert [m for _, m, _ in found("count: 1\neither: {b: x}")] == ["either.b='x' is not a number"]


@pytest.mark.parametrize("text", ["", "[1, 2]", "word", "3"])
def test_a_file_that_is_no_mapping(text: str) -> None:
    assert len(found(text)) == 1
    assert "is not a mapping" in found(text)[0][1]


def test_long_values_are_cut() -> None:
    assert max(len(m) for _, m, _ in found(f"count: {'x' * 500}\n{'k' * 500}: 1")) < 120


def test_limits_of_json_schema() -> None:
    schema = json_schema(SPEC)
    assert schema["required"] == ["count"]
    assert schema["properties"]["count"] == {"type": "integer", "description": "how many", "minimum": 1, "maximum": 10}
    assert schema["properties"]["rate"] == {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}
    assert schema["properties"]["name"]["pattern"] == "^(?:[a-z]+)$"
    assert schema["additionalProperties"] is False


VALUES: Any = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 12)
    | st.floats(-1, 2).filter(lambda x: not x.is_integer())
    | st.sampled_from(["fast", "abc", "ABC"]),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["a", "b", "fp8", "nvfp4"]), inner, max_size=2)
    ),
    max_leaves=4,
)
KEYS = st.sampled_from([*SPEC.entries, "other"])
VALIDATOR = jsonschema.Draft202012Validator(json_schema(SPEC))


@given(st.dictionaries(KEYS, VALUES, max_size=5) | VALUES)
def test_checker_and_json_schema_agree(data: Any) -> None:
    """An independent validator of the printed schema accepts exactly what the checker accepts."""
    document = Document(file="f", data=json.loads(json.dumps(data)), lines={(): 1})
    assert (problems(document, SPEC) == []) == VALIDATOR.is_valid(document.data)
