"""``dpquant completion``: what a shell needs to complete commands, options and names."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence

from dpquant.render import Output
from emulation.errors import InputError, suggestion

SUMMARY = "Print a completion script for bash, zsh or fish."
EXAMPLES = """\
examples:
  dpquant completion bash > ~/.local/share/bash-completion/completions/dpquant
  dpquant completion zsh > ~/.zfunc/_dpquant      (~/.zfunc in fpath, then compinit)
  dpquant completion fish > ~/.config/fish/completions/dpquant.fish"""

SHELLS = ("bash", "zsh", "fish")


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
        out.json({"words": {" ".join(path): list(after) for path, after in words.items()}})
    else:
        print({"bash": bash, "zsh": zsh, "fish": fish}[args.shell](words), end="")
    return 0


def vocabulary(parser: argparse.ArgumentParser, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], tuple[str, ...]]:
    """Commands given so far -> the words that may follow: subcommands, long options, and names an argument takes."""
    from emulation.formats import ALIASES, FORMATS
    from hwmodels.profile import list_profiles

    names = {("hardware", "show"): list_profiles, ("hardware", "validate"): list_profiles}
    words: list[str] = [option for option in parser._option_string_actions if option.startswith("--")]
    found: dict[tuple[str, ...], tuple[str, ...]] = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, inner in action.choices.items():
                words.append(name)
                found |= vocabulary(inner, (*path, name))
        elif not action.option_strings and action.choices:
            words += map(str, action.choices)
    if path == ("formats",):
        words += [*FORMATS, *ALIASES]
    elif path == ("completion",):
        words += SHELLS
    elif path in names:
        words += names[path]()
    elif path in (("train",), ("privacy",), ("audit",)):
        from dpquant.config import shipped_configs

        words += shipped_configs()
    elif path == ("sweep",):
        from dpquant.sweep import shipped_sweeps

        words += shipped_sweeps()
    return {path: tuple(words), **found}


def bash(words: Mapping[tuple[str, ...], Sequence[str]]) -> str:
    """A bash script: words by the commands given so far, else file names."""
    cases = "\n".join(f'    "{" ".join(path)}") words="{" ".join(after)}" ;;' for path, after in words.items())
    commands = " ".join(sorted({name for path in words for name in path}))
    return f"""\
_dpquant() {{
  local word path="" words=""
  for word in "${{COMP_WORDS[@]:1:COMP_CWORD-1}}"; do
    case " {commands} " in *" $word "*) path="${{path:+$path }}$word" ;; esac
  done
  case "$path" in
{cases}
  esac
  COMPREPLY=($(compgen -W "$words" -- "${{COMP_WORDS[COMP_CWORD]}}"))
}}
complete -o default -F _dpquant dpquant
"""


def zsh(words: Mapping[tuple[str, ...], Sequence[str]]) -> str:
    """The bash script, which zsh's own bashcompinit runs."""
    return "#compdef dpquant\nautoload -U +X bashcompinit && bashcompinit\n" + bash(words)


def fish(words: Mapping[tuple[str, ...], Sequence[str]]) -> str:
    """A fish script: one line per place in the command line."""
    lines = []
    for path, after in words.items():
        seen = " ".join(f"; and __fish_seen_subcommand_from {name}" for name in path)
        inner = " ".join(other[len(path)] for other in words if len(other) > len(path) and other[: len(path)] == path)
        condition = (seen.removeprefix("; and ") or "true") + (
            f"; and not __fish_seen_subcommand_from {inner}" if inner else ""
        )
        lines.append(f"complete -c dpquant -n '{condition}' -a '{' '.join(after)}'")
    return "\n".join(lines) + "\n"
