"""``dpquant estimate``: which chip, which format, what speedup, what energy, does it fit, and why."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dpquant.render import Output
from emulation.errors import InputError, suggestion

if TYPE_CHECKING:
    from torch import nn

    from hwmodels.profile import HardwareProfile
    from hwmodels.workload import Workload

SUMMARY = "Speedup, energy and memory of a model per chip and format, with no device."
EXAMPLES = """\
examples:
  which chip and format for ResNet-18 on small images?
      dpquant estimate --model resnet18 --model-option stem=cifar \\
          --input 3x32x32 --batch-size 1024 --hardware h100,b200
  which chip is best for ResNet-50 at batch 4096 under 400 W?
      dpquant estimate --model resnet50 --batch-size 4096 --max-power 400
  why is fp8 slower than bf16 for my model on H100?
      dpquant estimate --model my_package.models:MyNet --input 3x64x64 \\
          --hardware h100 --format fp8 --explain
  where does the time go, and the memory?
      dpquant estimate --model gpt2 --hardware b200 --format nvfp4 --by phase
      (or --by layer, or --by memory)
  what is the largest batch that fits, and what does it cost?
      dpquant estimate --model resnet50 --hardware h100 --price h100=2.5 --json
  does the chip reach the speedup that I need?
      dpquant estimate --model vit_b_16 --hardware b200 --target-speedup 1.2"""

# What is compared where no format is named: these, as far as the chip's matrix unit takes them itself.
_USUAL = ("float8_e4m3fn", "float8_e4m3fnuz", "mxfp8_e4m3", "mxfp4_e2m1", "nvfp4")


def add_arguments(parser: argparse.ArgumentParser, common: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    what = parser.add_argument_group("what is trained")
    what.add_argument(
        "--model",
        metavar="NAME",
        help="resnet18, resnet50, gpt2, ...; or package.module:function, which is imported and called",
    )
    what.add_argument(
        "--model-option",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="such as stem=cifar or num_classes=100; may be repeated",
    )
    what.add_argument("--input", metavar="CxHxW", help="shape of one example; default: the model's usual one")
    what.add_argument(
        "--batch-size", type=int, metavar="N", default=256, help="examples of one step (default: %(default)s)"
    )
    what.add_argument(
        "--physical-batch-size",
        type=int,
        metavar="N",
        help="most examples of one pass; default: as many as fit into memory",
    )
    what.add_argument("--method", choices=("dp-sgd", "sgd"), default="dp-sgd", help="default: %(default)s")
    what.add_argument(
        "--clipping",
        choices=("bookkeeping", "hooks", "ghost", "mixed"),
        default="bookkeeping",
        help="default: %(default)s",
    )
    what.add_argument("--optimizer", choices=("sgd", "momentum", "adam"), default="sgd", help="default: %(default)s")
    where = parser.add_argument_group("on what")
    where.add_argument("--hardware", metavar="NAME,...", help="profiles or YAML files; default: all profiles")
    where.add_argument("--hardware-dir", metavar="DIR", help="a folder of your own profiles, looked up first")
    where.add_argument("--max-power", type=float, metavar="W", help="only chips with a power limit of at most this")
    where.add_argument("--price", metavar="NAME=USD,...", help="US dollars per hour, to compare cost")
    where.add_argument(
        "--format",
        metavar="NAME,...",
        help="formats of the quantized layers; default: the 8 and 4 bit ones that a chip takes natively",
    )
    where.add_argument("--baseline", metavar="NAME", default="bfloat16", help="full precision (default: %(default)s)")
    where.add_argument(
        "--basis",
        choices=("peak", "calibrated"),
        help="published peaks, or fitted to measurements; default: calibrated where there is a calibration",
    )
    where.add_argument(
        "--framework",
        choices=("fused", "eager", "graphs"),
        default="fused",
        help="fused kernels, a kernel per operation, or those recorded and replayed (default: %(default)s)",
    )
    how = parser.add_argument_group("how much is quantized")
    how.add_argument(
        "--fraction",
        type=float,
        metavar="SHARE",
        help="this share of the layers, those that gain most first; default: all",
    )
    how.add_argument(
        "--target-speedup",
        type=float,
        metavar="X",
        help="as few layers as reach this speedup; exit code 1 where none does",
    )
    shown = parser.add_argument_group("what is shown")
    shown.add_argument(
        "--by",
        choices=("layer", "phase", "memory"),
        help="where the time goes, or the memory; the parts add up to the whole",
    )
    shown.add_argument(
        "--explain", action="store_true", help="in words: what bounds each step, and what would help most"
    )
    shown.add_argument("--pareto", action="store_true", help="speedup against the number of layers quantized")
    shown.add_argument(
        "--png", metavar="FILE", help="with --pareto: its curves as a picture (.png, .pdf or .svg); needs matplotlib"
    )
    shown.add_argument("--break-even", action="store_true", help="from which batch size on a format pays")
    shown.add_argument("--sweep", metavar="batch-size=N,...", help="the table for several batch sizes")
    shown.add_argument(
        "--cost-model", choices=("own", "paper"), default="own", help="paper: DPQuant's published formula, line by line"
    )


def run(args: argparse.Namespace, out: Output) -> int:
    """Run the command; returns its exit code."""
    from dpquant import estimate_tables, estimates

    estimates.check_targets(args.fraction, args.target_speedup)
    curve = _curve(args)
    if args.png is not None and not args.pareto:
        raise InputError("--png draws the curves of --pareto", hint="give --pareto too")
    profiles = _profiles(args)
    formats = {profile.name: _formats(args, profile, out) for profile in profiles}
    prices = _prices(args.price, profiles)
    workload = _workload(args, out)
    options = {
        name: getattr(args, name)
        for name in ("method", "clipping", "baseline", "basis", "framework", "optimizer", "physical_batch_size")
    }
    if curve is not None:
        from dpquant import curves

        pairs = [(profile, name) for profile in profiles for name in formats[profile.name]]
        if curve == "--pareto":
            return curves.pareto(workload, pairs, options, out, args.png)
        if curve == "--break-even":
            return curves.break_even(workload, pairs, options, out)
        if curve == "--sweep":
            return curves.sweep(workload, pairs, options, _batch_sizes(args.sweep), out)
        return curves.paper(workload, pairs, options, 1.0 if args.fraction is None else args.fraction, out)
    asked = estimates.Asked(share=args.fraction, target_speedup=args.target_speedup, prices=prices, options=options)
    found = list(estimates.rows(workload, profiles, formats, asked))
    if args.hardware is None:
        found.sort(key=lambda row: row.estimate.step_s)
    if not found:
        raise InputError("no chip takes any of these formats", hint="name them with --hardware and --format")
    named = {profile.name: profile for profile in profiles}
    words = [estimates.explain(row, named[row.hardware], workload, asked) if args.explain else None for row in found]
    if out.form == "json":
        out.json({"rows": [row.to_json() | {"explanation": said} for row, said in zip(found, words, strict=True)]})
    elif args.by == "memory":
        estimate_tables.show_memory(found, out)
    elif args.by:
        estimate_tables.show_times(args.by, found, out)
    else:
        estimate_tables.show_rows(found, workload, out)
    if args.explain and out.form != "json":
        for said in words:
            for line in ("", *(said or ())):
                out.note(line)
    return 1 if args.target_speedup is not None and not any(row.reached for row in found) else 0


def _profiles(args: argparse.Namespace) -> list[HardwareProfile]:
    from hwmodels.profile import list_profiles, load_profile

    names = list_profiles(args.hardware_dir) if args.hardware is None else _words(args.hardware, "--hardware")
    found = [load_profile(name, args.hardware_dir) for name in dict.fromkeys(names)]
    if args.max_power is not None:
        found = [p for p in found if p.power is not None and p.power.limit_w <= args.max_power]
        if not found:
            raise InputError(f"no chip of these has a power limit of at most {args.max_power:g} W")
    return found


def _formats(args: argparse.Namespace, profile: HardwareProfile, out: Output) -> list[str]:
    """The formats to compare on a chip: those asked for, or what its matrix unit takes itself."""
    from emulation.formats import get_format

    if not args.format:
        return [name for name in _USUAL if name in profile.formats and profile.formats[name].native] or [args.baseline]
    names = list(dict.fromkeys(get_format(name).name for name in _words(args.format, "--format")))
    if args.hardware is None:
        missing = [name for name in names if name not in profile.formats]
        if missing:
            out.say(f"left out: {', '.join(missing)} on {profile.name}, which has no rate for it")
        return [name for name in names if name in profile.formats]
    for name in names:
        profile.rate(name)
    return names


def _curve(args: argparse.Namespace) -> str | None:
    """The option that shows something else than the table, if one is given; what it would not heed is refused."""
    curves = {"--pareto": args.pareto, "--break-even": args.break_even, "--sweep": args.sweep is not None}
    curves["--cost-model paper"] = args.cost_model == "paper"
    given = [option for option, value in curves.items() if value]
    if not given:
        return None
    if len(given) > 1:
        raise InputError("give one of --pareto, --break-even, --sweep and --cost-model paper")
    heeded = {"fraction"} if given[0] == "--cost-model paper" else set()
    for name in ("by", "explain", "target_speedup", "fraction", "price"):
        value = getattr(args, name)
        if name not in heeded and value is not None and value is not False:
            option = f"--{name.replace('_', '-')}"
            raise InputError(f"{option} does nothing with {given[0]}", hint=f"leave {option} out, or {given[0]}")
    return given[0]


def _words(text: str, option: str) -> list[str]:
    words = [word.strip() for word in text.split(",")]
    if not all(words):
        raise InputError(f"{option} {text!r} holds an empty name", hint="separate names by single commas")
    return words


def _batch_sizes(text: str) -> list[int]:
    name, _, values = text.partition("=")
    try:
        sizes = [int(word) for word in values.split(",")] if name == "batch-size" else []
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1:
        raise InputError(f"--sweep {text!r} is not batch-size=N,N,...", hint="such as batch-size=64,256,1024")
    return sizes


def _prices(text: str | None, profiles: Sequence[HardwareProfile]) -> dict[str, float]:
    prices = {}
    for word in _words(text, "--price") if text else []:
        name, _, value = word.partition("=")
        known = [profile.name for profile in profiles]
        if name not in known:
            raise InputError(f"--price names {name!r}, which is not compared", hint=suggestion(name, known))
        try:
            prices[name] = float(value)
        except ValueError:
            prices[name] = -1.0
        if not 0 < prices[name] < float("inf"):
            raise InputError(f"--price {word!r} holds no price", hint="US dollars per hour, such as h100=2.5")
    return prices


# --- the model


def _workload(args: argparse.Namespace, out: Output) -> Workload:
    from hwmodels.workload import check_batch_size, trace

    if args.model is None:
        from dpquant.models import MODELS

        raise InputError("no --model given", hint=f"one of {', '.join(MODELS)}, or package.module:function")
    check_batch_size(args.batch_size)
    shape = _shape(args.input)
    options = dict(_option(word) for word in args.model_option)
    if ":" in args.model:
        module, example = _imported(args.model, shape, options, out)
    else:
        module, example = _shipped(args.model, shape, options, out)
    return trace(module, example, args.batch_size)


def _shape(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        shape = tuple(int(size) for size in text.lower().split("x"))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1 or max(shape) > 2**20:
        raise InputError(f"--input {text!r} is no shape", hint="sizes joined by x, without the batch: 3x32x32")
    return shape


def _option(word: str) -> tuple[str, Any]:
    key, equals, value = word.partition("=")
    if not equals or not key.isidentifier():
        raise InputError(f"--model-option {word!r} is not KEY=VALUE", hint="such as stem=cifar")
    for kind in (int, float):
        try:
            return key, kind(value)
        except ValueError:
            continue
    return key, {"true": True, "false": False}.get(value.lower(), value)


def _shipped(name: str, shape: tuple[int, ...] | None, options: dict[str, Any], out: Output) -> tuple[nn.Module, Any]:
    """A model of the project on the meta device, its input channels and size as the example has them."""

    import torch

    from dpquant.models import build_model, example_input, options_of

    example = example_input(name, shape)
    takes = options_of(name)
    if example.dim() == 4:
        for key, value in (("in_channels", example.shape[1]), ("image_size", example.shape[-1])):
            if key in takes:
                options.setdefault(key, value)
        if "stem" in takes and "stem" not in options and example.shape[-1] <= 64:
            out.say(f"note: {name} with its ImageNet stem; --model-option stem=cifar for the one of small images")
    with torch.device("meta"):
        return build_model(name, **options), example


def _imported(name: str, shape: tuple[int, ...] | None, options: dict[str, Any], out: Output) -> tuple[nn.Module, Any]:
    """What ``package.module:function`` gives when called: the one place where a name is imported and run."""
    import torch
    from torch import nn

    if shape is None:
        raise InputError(f"--model {name} needs --input", hint="shape of one example, such as 3x32x32")
    module_name, _, function = name.partition(":")
    out.say(f"importing {module_name} and calling {function}({', '.join(f'{k}={v!r}' for k, v in options.items())})")
    sys.path.insert(0, "")
    try:
        made = getattr(importlib.import_module(module_name), function)(**options)
    except Exception as error:
        detail = " ".join(str(error).split())
        raise InputError(
            f"--model {name}: {type(error).__name__}: {detail}", hint="is it importable from here?"
        ) from error
    finally:
        sys.path.remove("")
    if not isinstance(made, nn.Module):
        raise InputError(f"--model {name} gave a {type(made).__name__}, not a torch.nn.Module")
    return made, torch.empty(1, *shape, device="meta")
