"""Writes docs/configuration.md, every key of a run configuration, from the specification that checks them.

Run: python docs/configuration.py
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dpquant.config import DEFAULTS, SPECIFICATION
from hwmodels.fields import Field, Fields, Flag, Items, Number, OneOf, Table, Text

HEAD = """\
# Run configurations

Every key of the YAML file that `dpquant train`, `privacy` and `audit` take and that a sweep starts from; written from
the code by `python docs/configuration.py`. A key that is misspelt, missing or out of range is refused with its line
before anything starts. `dpquant train` changes some of them from the command line (`dpquant train --help`). A whole
example is in [guides.md](guides.md#train-privately); those that ship are in [configs/runs](../configs/runs).

`training.cuda_graphs` is a key `cuda_graphs` below a key `training`. Exactly one of `schedule.target_speedup`,
`schedule.fraction` and `schedule.layers` is given (with `scheduler: full` none is needed), and one of
`privacy.target_epsilon` and `privacy.noise_multiplier`.

| key | holds | default | meaning |
| --- | --- | --- | --- |
"""
SPEED_ONLY = """
`training.device`, `training.cuda_graphs`, `training.keep_freed_memory` and `data.root` say where and how fast a run
trains, not what: runs that differ in nothing else are the same run to `dpquant sweep`. What the two about speed gain is
in [performance.md](performance.md).
"""


def keys(fields: Fields, defaults: Any, path: str = "") -> Iterator[tuple[str, Field, Any]]:
    """Every key that holds a value, with its specification and its default (``...``: it must be given)."""
    for name, entry in fields.entries.items():
        default = defaults.get(name, ...) if isinstance(defaults, dict) else ...
        if isinstance(entry, Fields):
            yield from keys(entry, default, f"{path}{name}.")
        else:
            yield path + name, entry, default


def holds(entry: Field) -> str:
    """What a key may hold, in words."""
    match entry:
        case Number():
            limits = {"above": entry.above, "at least": entry.minimum, "below": entry.below, "at most": entry.maximum}
            said = [f"{word} {number(limit)}" for word, limit in limits.items() if limit is not None]
            return " ".join(("whole number" if entry.integer else "number", ", ".join(said))).strip()
        case Text():
            return " or ".join(f"`{choice}`" for choice in entry.choices) if entry.choices else "text"
        case Flag():
            return "`true` or `false`"
        case Items():
            return f"list of {holds(entry.item)}"
        case OneOf():
            return " or ".join(holds(option) for option in entry.options)
        case Table():
            return "mapping"
    raise TypeError(f"no words for a {type(entry).__name__}")


def number(limit: float) -> str:
    """A limit as people write it."""
    return "2^63 - 1" if limit == 2**63 - 1 else f"{limit:g}"


def shown(default: Any) -> str:
    """A default as YAML has it."""
    if default is ...:
        return "must be given"
    if default is None or default == {}:
        return "none"
    return f"`{str(default).lower() if isinstance(default, bool) else default}`"


def configuration() -> str:
    """The whole page."""
    rows = (
        f"| `{key}` | {holds(entry)} | {shown(default)} | {entry.doc} |\n"
        for key, entry, default in keys(SPECIFICATION, DEFAULTS)
    )
    return HEAD + "".join(rows) + SPEED_ONLY


if __name__ == "__main__":
    (Path(__file__).parent / "configuration.md").write_text(configuration())
