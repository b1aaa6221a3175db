"""The command line: finds the command, turns wrong input into one-line errors, and says how it ended by exit code."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from dpquant import __version__
from dpquant.render import Output
from emulation.errors import InputError, suggestion

COMMANDS = ("estimate", "formats", "hardware", "privacy", "train", "sweep", "report", "audit", "completion")

DONE, FAILED, WRONG_INPUT, INTERRUPTED = 0, 1, 2, 130

_FIRST_STEPS = """\
dpquant {version}: train privately in FP4/FP8, and know what it buys on real chips

What a chip and a format would give, no device needed:
  dpquant estimate --model resnet18 --input 3x32x32 --hardware h100,b200

Train privately on the digits that ship with it, about a minute on two cores:
  dpquant train digits

What a planned run would spend:
  dpquant privacy digits

All commands: dpquant --help"""

_HELP = """\
which chip, which format, what speedup, what energy, does it fit, and why?
  dpquant estimate --help
what would my run spend, and which noise does it need?
  dpquant privacy --help

Answers go to stdout, messages to stderr. Exit codes: 0 done, 1 the asked
condition failed, 2 wrong input, 130 interrupted."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are `InputError`s with the nearest allowed name."""

    def __init__(self, *args: Any, **options: Any) -> None:
        options.setdefault("allow_abbrev", False)
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*args, **options)

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print with its usage."""
        raise InputError(message, hint=f"see {self.prog} --help")

    def _check_value(self, action: argparse.Action, value: object) -> None:
        if action.choices is not None and value not in action.choices:
            what = "/".join(action.option_strings) or action.metavar or action.dest
            raise InputError(f"unknown {what} {value!r}", hint=suggestion(str(value), map(str, action.choices)))


def build_parser() -> Parser:
    """The whole command line; torch is imported by none of it."""
    # suppressed: given before a subcommand, an option is not undone by the default of the one behind it
    common = Parser(add_help=False, argument_default=argparse.SUPPRESS)
    form = common.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON on stdout and nothing else there")
    form.add_argument("--csv", action="store_true", help="print tables as CSV, with full precision")
    common.add_argument("--quiet", "-q", action="store_true", help="no messages on stderr but errors")
    common.add_argument("--debug", action="store_true", help="show a traceback with every error")
    description = "Private training in FP4/FP8, and what it would buy on real chips."
    parser = Parser(prog="dpquant", description=description, epilog=_HELP, parents=[common])
    parser.add_argument("--version", action="version", version=f"dpquant {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    for name in COMMANDS:
        module = importlib.import_module(f"dpquant.commands.{name}")
        command = commands.add_parser(
            name, help=module.SUMMARY, description=module.SUMMARY, epilog=module.EXAMPLES, parents=[common]
        )
        module.add_arguments(command, common)
        command.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0 done, 1 the asked condition failed (or a defect), 2 wrong input, 130 interrupted.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    try:
        return _run(words)
    except SystemExit as stop:  # --help and --version
        return int(stop.code or 0)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader, such as head, has seen enough
        with contextlib.suppress(OSError, ValueError):  # what is left to flush goes nowhere
            stdout = sys.stdout.fileno()
            os.dup2(os.open(os.devnull, os.O_WRONLY), stdout)
        return DONE
    except Exception as error:
        if debug:
            raise
        return _report(error)


def _run(words: list[str]) -> int:
    for stream in (sys.stdout, sys.stderr):  # a terminal that cannot show a character shows a question mark
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    if not words:
        print(_FIRST_STEPS.format(version=__version__))
        return DONE
    parser = build_parser()
    args, unknown = parser.parse_known_args(words)
    if unknown:
        raise _unknown_argument(parser, words, unknown)
    if args.command is None:
        raise InputError("no command given", hint="see dpquant --help")
    form = next((form for form in ("json", "csv") if form in args), "text")
    code: int = args.run(args, Output(form, "quiet" in args))
    sys.stdout.flush()
    return code


def _unknown_argument(parser: argparse.ArgumentParser, words: list[str], unknown: list[str]) -> InputError:
    """The error for words that no option or argument took, with the nearest option of the very command."""
    first = next((word for word in unknown if word.startswith("-")), unknown[0])
    for word in words:  # down to the innermost subcommand that was given
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction) and word in action.choices:
                parser = action.choices[word]
    name = first.split("=")[0]
    if not name.startswith("-"):
        return InputError(f"unexpected argument {first!r}", hint=f"see {parser.prog} --help")
    options = [option for option in parser._option_string_actions if option.startswith("--")]
    near = suggestion(name, options)
    hint = near if near.startswith("did") else f"see {parser.prog} --help"
    return InputError(f"unknown option {name}", hint=hint)


def _report(error: Exception) -> int:
    """Say what went wrong, one line and a hint for each problem."""
    if isinstance(error, InputError):
        for one in getattr(error, "errors", (error,)):
            print(f"error: {one}", file=sys.stderr)
            if one.hint:
                print(f"hint: {one.hint}", file=sys.stderr)
        return WRONG_INPUT
    line = " ".join(str(error).split()) or "no message"
    if isinstance(error, OSError):
        print(f"error: {line}", file=sys.stderr)
    else:
        print(f"error: unexpected {type(error).__name__}: {line[:300]}", file=sys.stderr)
        print("hint: this is a defect; --debug shows where it happened", file=sys.stderr)
    return FAILED


if __name__ == "__main__":
    sys.exit(main())
