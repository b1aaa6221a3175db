"""``dpquant completion``: what a shell needs to complete commands, options and names."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dpquant.render import Column, Output, Table
from emulation.errors import InputError, suggestion

SUMMARY = "Print a completion script for bash, zsh or fish."
EXAMPLES = """\
examples:
  dpquant completion bash > ~/.local/share/bash-completion/completions/dpquant
  dpquant completion zsh > ~/.zfunc/_dpquant   (in fpath, before compinit)
  dpquant completion fish > ~/.config/fish/completions/dpquant.fish"""

SHELLS = ("bash", "zsh", "fish")


@dataclass(frozen=True, kw_only=True)
class Words:
    """What may follow a command: its subcommands and names, its options, and the values of each option with one.

    An option whose value is any text or file has no values; one that takes no value is None.
    """

    names: tuple[str, ...]
    options: Mapping[str, tuple[str, ...] | None]


Vocabulary = Mapping[str, Words]
"""Commands given so far, such as ``hardware show``, -> what may follow."""


def add_arguments(parser: argparse.ArgumentParser, common: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("shell", metavar="SHELL", nargs="?", help="bash, zsh or fish")


def run(args: argparse.Namespace, out: Output) -> int:
    """Run the command; returns its exit code."""
    if args.shell not in SHELLS:
        given = "no shell given" if args.shell is None else f"unknown shell {args.shell!r}"
        raise InputError(given, hint=suggestion(args.shell or "", SHELLS))
    from dpquant.cli import build_parser

    words = vocabulary(build_parser())
    if out.form == "json":
        out.json({"words": {route: [*after.names, *after.options] for route, after in words.items()}})
    elif out.form == "csv":
        rows = [{"command": route, "word": word} for route, w in words.items() for word in (*w.names, *w.options)]
        out.table(Table(columns=[Column(key=key, title=key) for key in ("command", "word")], rows=rows))
    else:
        print({"bash": bash, "zsh": zsh, "fish": fish}[args.shell](words), end="")
    return 0


def vocabulary(parser: argparse.ArgumentParser, route: str = "") -> dict[str, Words]:
    """The whole command line as words, the names of formats, profiles, models and configurations included."""
    names = list(_names().get(route, ()))
    options: dict[str, tuple[str, ...] | None] = {}
    found: dict[str, Words] = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, inner in action.choices.items():
                names.append(name)
                found |= vocabulary(inner, f"{route} {name}".lstrip())
        for option in (text for text in action.option_strings if text.startswith("--")):
            values = tuple(map(str, action.choices or _values().get(option, ())))
            options[option] = None if action.nargs == 0 else values
    return {route: Words(names=tuple(names), options=options), **found}


def _names() -> dict[str, Sequence[str]]:
    """Command -> the names that its argument takes."""
    from dpquant.config import shipped_configs
    from dpquant.sweep import shipped_sweeps
    from emulation.formats import ALIASES, FORMATS
    from hwmodels.profile import list_profiles

    configs, profiles = tuple(shipped_configs()), list_profiles()
    return {
        "formats": (*FORMATS, *ALIASES),
        "completion": SHELLS,
        "hardware show": profiles,
        "hardware validate": profiles,
        "hardware check": profiles,
        "train": configs,
        "privacy": configs,
        "audit": configs,
        "sweep": tuple(shipped_sweeps()),
    }


def _values() -> dict[str, Sequence[str]]:
    """Option -> the names that it takes, where the parser does not list them."""
    from dpquant.models import MODELS
    from dpquant.schedule import SCHEDULERS
    from emulation.formats import FORMATS
    from hwmodels.profile import list_profiles

    formats, profiles = tuple(FORMATS), list_profiles()
    return {
        "--hardware": profiles,
        "--extends": profiles,
        "--format": formats,
        "--baseline": formats,
        "--model": tuple(MODELS),
        "--scheduler": SCHEDULERS,
        "--basis": ("peak", "calibrated"),
        "--device": ("cpu", "cuda"),
        "--compare": ("qtorch",),
        "--data": ("normal", "lognormal", "laplace"),
    }


_ROUTE = """\
  local word route=""
  for word in "${{{words}}}"; do
    case "|{routes}|" in *"|${{route:+$route }}$word|"*) route="${{route:+$route }}$word" ;; esac
  done
  case "$route {previous}" in
{values}
  *)
    case "$route" in
{names}
    esac ;;
  esac
"""


def _route(words: Vocabulary, given: str, previous: str, answer: str) -> str:
    """Where the command line is and what may follow there, for bash and zsh alike."""
    values = [
        f'    "{route} {option}") {answer.format(" ".join(after))} ;;'
        for route, at in words.items()
        for option, after in at.options.items()
        if after is not None
    ]
    names = [f'      "{route}") {answer.format(" ".join((*at.names, *at.options)))} ;;' for route, at in words.items()]
    routes = "|".join(route for route in words if route)
    return _ROUTE.format(
        words=given, previous=previous, routes=routes, values="\n".join(values), names="\n".join(names)
    )


def bash(words: Vocabulary) -> str:
    """A bash script: words by the commands given so far, else file names."""
    where = _route(words, "COMP_WORDS[@]:1:COMP_CWORD-1", "${COMP_WORDS[COMP_CWORD-1]}", 'words="{}"')
    return f"""\
_dpquant() {{
  local words=""
{where}  COMPREPLY=($(compgen -W "$words" -- "${{COMP_WORDS[COMP_CWORD]}}"))
}}
complete -o default -F _dpquant dpquant
"""


def zsh(words: Vocabulary) -> str:
    """A zsh function for a folder in ``fpath``, or to be sourced."""
    where = _route(words, "(@)words[2,CURRENT-1]", "${words[CURRENT-1]}", "answers=({})")
    return f"""\
#compdef dpquant
_dpquant() {{
  local -a answers
{where}  (( $#answers )) && compadd -a answers
  [[ $PREFIX == -* ]] || _files
}}
if [[ $funcstack[1] == _dpquant ]]; then _dpquant "$@"; else compdef _dpquant dpquant; fi
"""


def fish(words: Vocabulary) -> str:
    """A fish script: where the command line is, and a line for the names and each option there."""
    routes = " ".join(f"'{route}'" for route in words if route)
    lines = [
        "function __dpquant_route",
        "  set -l route",
        "  for word in (commandline -opc)[2..]",
        f"    contains -- (string join ' ' -- $route $word) {routes}; and set -a route $word",
        "  end",
        "  string join ' ' -- $route",
        "end",
    ]
    for route, after in words.items():
        at = f'complete -c dpquant -n \'test "$(__dpquant_route)" = "{route}"\''
        if after.names:
            lines.append(f"{at} -a '{' '.join(after.names)}'")
        for option, values in after.options.items():
            takes = "" if values is None else f" -x -a '{' '.join(values)}'" if values else " -r"
            lines.append(f"{at} -l {option.removeprefix('--')}{takes}")
    return "\n".join(lines) + "\n"
