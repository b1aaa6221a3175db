"""Writes docs/reference.md, the public names of the three packages, from their signatures and docstrings.

Run: python docs/reference.py
"""

import importlib
import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

PACKAGES = ("dpquant", "emulation", "hwmodels")
MORE = {  # beside what the packages themselves export
    "dpquant.sensitivity": ("AnalysisSettings",),
    "dpquant.privacy": ("epsilon", "calibrate_noise", "steps_within"),
    "dpquant.clipping": ("private_module", "private_criterion", "PrivateOptimizer"),
    "dpquant.models": ("build_model",),
    "emulation.layers": ("LayerPrecision", "quantizable_layers", "set_rounding"),
    "emulation.formats": ("formats_from",),
    "emulation.compare": ("rank_formats",),
    "hwmodels.planner": ("reach", "fraction"),
    "hwmodels.explore": ("pareto", "break_even", "sweep"),
    "hwmodels.profile": ("check",),
}
HEAD = """\
# Reference

Written from the code by `python docs/reference.py`. The names of a package are imported from it
(`from emulation import Quantizer`), those of a module from the module. Wrong input raises `emulation.InputError`, a
`ValueError` whose `hint` says what would be right.
"""


def signature(name: str, thing: Any) -> str:
    """How a name is called; one argument a line where it does not fit."""
    called = inspect.signature(thing)
    words, keyword_only = [], False
    for parameter in called.parameters.values():
        if parameter.name in ("self", "cls"):
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
            keyword_only = True
            words.append("*")
        word = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "") + parameter.name
        if parameter.annotation is not parameter.empty:
            word += f": {annotation(parameter.annotation)}"
        if parameter.default is not parameter.empty:
            default = repr(parameter.default)
            word += f" = {default if len(default) < 50 else '...'}"
        words.append(word)
    returned = "" if called.return_annotation in (called.empty, None, "None") else annotation(called.return_annotation)
    end = f") -> {returned}" if returned and not inspect.isclass(thing) else ")"
    line = f"{name}({', '.join(words)}{end}"
    return line if len(line) <= 110 else f"{name}(\n" + "".join(f"    {word},\n" for word in words) + end


def annotation(hint: Any) -> str:
    """A type hint without the modules that its names are from."""
    text = hint if isinstance(hint, str) else inspect.formatannotation(hint)
    return re.sub(r"\b(?:[a-z_]+\.)+(?=[A-Z])", "", text)


def described(thing: Any) -> str:
    """A docstring as Markdown: sections become lists."""
    lines = []
    for line in inspect.cleandoc(thing.__doc__ or "").splitlines():
        section = re.fullmatch(r"(Args|Attributes|Returns|Raises|Yields):", line)
        entry = re.fullmatch(r"    (\w[\w, ]*): (.*)", line)
        if section:
            lines += [f"*{section[1]}*", ""]
        elif entry:
            lines.append(f"- `{entry[1]}`: {entry[2]}")
        else:
            lines.append(re.sub(r"^    (?=\S)", "", line) if not line.startswith("        ") else "  " + line.strip())
    return re.sub(r":\w+:`(\w+)`", r"`\1`", "\n".join(lines).replace("``", "`"))


def members(thing: Any) -> list[tuple[str, Any]]:
    """Public methods and properties of a class, in the order of its source."""
    if not inspect.isclass(thing):
        return []
    own = [(name, value) for name, value in vars(thing).items() if not name.startswith("_")]
    found = [(n, v.__func__ if isinstance(v, classmethod | staticmethod) else v) for n, v in own]
    return [(n, v) for n, v in found if (inspect.isfunction(v) or isinstance(v, property)) and v.__doc__]


def entry(name: str, thing: Any) -> str:
    """One name: signature, description, and a line for each member of a class."""
    if not (inspect.isclass(thing) or inspect.isfunction(thing)):
        said = (
            f"A mapping with the keys {', '.join(f'`{k}`' for k in thing)}"
            if isinstance(thing, Mapping)
            else repr(thing)
        )
        return f"### `{name}`\n\n{said}.\n"
    parts = [f"### `{name}`", f"```text\n{signature(name, thing)}\n```", described(thing)]
    lines, whole = [], []
    for member, value in members(thing):
        if inspect.isfunction(value) and "Args:" in (value.__doc__ or ""):
            text = signature(member, value)
            whole += [f"#### `{name}.{member}`", f"```text\n{text}\n```", described(value)]
            continue
        call = member if isinstance(value, property) else signature(member, value)
        doc = inspect.cleandoc((value.fget if isinstance(value, property) else value).__doc__ or "")
        first = re.sub(r":\w+:`(\w+)`", r"`\1`", doc.split("\n\n")[0]).replace("``", "`")
        lines.append(f"- `{' '.join(call.split())}`: " + first.replace("\n", "\n  "))
    if lines:
        parts += ["*Methods and properties*", "\n".join(lines)]
    return "\n\n".join(parts + whole) + "\n"


def exported(package: ModuleType, name: str) -> Any:
    """What a package exports as ``name``; where a callable module has that name too, its function."""
    thing = getattr(package, name)
    return getattr(thing, name) if inspect.ismodule(thing) else thing


def reference() -> str:
    """The whole page."""
    page = [HEAD]
    for package in PACKAGES:
        module = importlib.import_module(package)
        page.append(f"## {package}\n")
        page += [entry(name, exported(module, name)) for name in module.__all__ if not name.startswith("_")]
        for home, names in MORE.items():
            if home.startswith(package + "."):
                page.append(f"## {home}\n")
                page += [entry(name, getattr(importlib.import_module(home), name)) for name in names]
    return "\n".join(page)


if __name__ == "__main__":
    (Path(__file__).parent / "reference.md").write_text(reference())
