"""The command line: answers on stdout, talk on stderr, one-line errors with a hint, and an exit code that says how."""

import csv
import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dpquant import cli
from dpquant.cli import main
from dpquant.commands import train as train_command
from dpquant.config import shipped_configs
from dpquant.rundir import load_run
from emulation.errors import InputError
from emulation.formats import FORMATS, NumberFormat
from hwmodels.profile import find_profile, list_profiles, load_profile

Capture = pytest.CaptureFixture[str]
ESTIMATE = ["estimate", "--model", "resnet18", "--input", "3x32x32", "--batch-size", "64", "--hardware", "h100,b200"]


def answer(capsys: Capture, *words: str, code: int = 0) -> Any:
    """What a command prints as JSON, strictly parsed."""
    capsys.readouterr()
    assert main([*words, "--json"]) == code
    return json.loads(capsys.readouterr().out, parse_constant=pytest.fail)


def shown(capsys: Capture, *words: str, code: int = 0) -> str:
    capsys.readouterr()
    assert main(words) == code
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines()), default=0) <= 80
    return out


def refused(capsys: Capture, *words: str) -> tuple[str, str]:
    """The error and the hint of a command that must end with exit code 2."""
    capsys.readouterr()
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    hints = [line for line in lines if line.startswith("hint: ")]
    assert "Traceback" not in captured.err
    return errors[0].removeprefix("error: "), hints[0].removeprefix("hint: ") if hints else ""


# --- the door


def test_alone_says_what_to_do_first(capsys: Capture) -> None:
    out = shown(capsys)
    for command in ("dpquant estimate", "dpquant train digits", "dpquant privacy", "--help"):
        assert command in out


@pytest.mark.parametrize("words", [["--help"], ["hardware", "list"], ["formats"], ["hardware", "check", "h100"]])
def test_torch_is_not_imported(words: list[str]) -> None:
    code = (
        "import sys; from dpquant.cli import main; code = main(sys.argv[1:]);"
        "heavy = {'torch', 'numpy', 'opacus', *eval(sys.argv.pop())} & {*sys.modules};"
        "sys.exit(str(heavy) if heavy else code)"
    ).replace("main(sys.argv[1:])", "main(sys.argv[1:-1])")
    light = "('yaml', 'rich', 'json', 'hwmodels.profile', 'importlib.metadata')" if words == ["--help"] else "()"
    done = subprocess.run([sys.executable, "-c", code, *words, light], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_version(capsys: Capture) -> None:
    assert shown(capsys, "--version").startswith("dpquant 0.")


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_help_with_examples(capsys: Capture, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    out = shown(capsys, command, "--help")
    assert f"dpquant {command}" in out
    assert "examples:" in out
    for option in ("--json", "--csv", "--quiet", "--debug"):
        assert option in out


def test_options_for_all_commands_stand_anywhere(capsys: Capture) -> None:
    places = (["hardware", "list", "--csv"], ["hardware", "--csv", "list"], ["--csv", "hardware", "list"])
    printed = set()
    for words in places:
        assert main(words) == 0
        printed.add(capsys.readouterr().out)
    assert len(printed) == 1
    assert "not allowed with" in refused(capsys, "hardware", "list", "--csv", "--json")[0]


def test_three_questions_are_answered_by_help(capsys: Capture) -> None:
    estimate, privacy = (shown(capsys, command, "--help") for command in ("estimate", "privacy"))
    assert "--max-power 400" in estimate.split("ResNet-50 at batch 4096 under 400 W?")[1].split("?")[0]
    assert "--explain" in estimate.split("why is fp8 slower than bf16 for my model on H100?")[1].split("?")[0]
    assert "--epochs 60" in privacy.split("what epsilon would 60 epochs cost?")[1].split("?")[0]


@pytest.mark.parametrize(
    ("words", "error", "hint"),
    [
        (["estimat"], "'estimat'", "'estimate'"),
        (["hardware", "lst"], "'lst'", "'list'"),
        (["hardware"], "no action", "list, show"),
        (["hardware", "list", "--jsno"], "unknown option --jsno", "--json"),
        (["estimate", "--modle=resnet18"], "unknown option --modle", "--model"),
        (["formats", "--verbose-everything"], "unknown option --verbose-everything", "dpquant formats --help"),
        (["hardware", "show"], "NAME", "--help"),
        (["hardware", "show", "h10"], "'h10'", "h100"),
        (["hardware", "show", "h100", "extra"], "unexpected argument 'extra'", "--help"),
        (["hardware", "check"], "no file", "FILE"),
        (["hardware", "validate", "h100"], "no measurements", "latency_us"),
        (["formats", "fp44"], "'fp44'", "fp4"),
        (["formats", "--codes"], "--codes needs", "dpquant formats"),
        (["formats", "fp4", "--data", "normal"], "give one of", ""),
        (["formats", "--data", "nromal"], "'nromal'", "'normal'"),
        (["formats", "--data", "missing.npy"], "does not exist", ""),
        (["estimate"], "no --model", "resnet18"),
        (["estimate", "--model", "resnet1"], "'resnet1'", "resnet18"),
        (["estimate", "--model", "resnet18", "--input", "3x32y32"], "3x32y32", "3x32x32"),
        (["estimate", "--model", "resnet18", "--input", "3x0x32"], "3x0x32", "3x32x32"),
        (["estimate", "--model", "resnet18", "--input", "32"], "does not fit", "3x224x224"),
        (["estimate", "--model", "resnet18", "--batch-size", "0"], "batch_size=0", "256"),
        (["estimate", "--model", "resnet18", "--batch-size", "many"], "--batch-size", "--help"),
        (["estimate", "--model", "resnet18", "--hardware", "h10"], "'h10'", "h100"),
        (["estimate", "--model", "resnet18", "--hardware", "h100,,"], "empty name", "commas"),
        (["estimate", "--model", "resnet18", "--format", "fp5"], "'fp5'", "fp"),
        (["estimate", "--model", "resnet18", "--clipping", "gost"], "'gost'", "'ghost'"),
        (["estimate", "--model", "resnet18", "--fraction", "1.5"], "--fraction 1.5", ""),
        (["estimate", "--model", "resnet18", "--fraction", "1", "--target-speedup", "2"], "give one", ""),
        (["estimate", "--model", "resnet18", "--target-speedup", "nan"], "--target-speedup nan", ""),
        (["estimate", "--model", "resnet18", "--model-option", "stem"], "not KEY=VALUE", "stem=cifar"),
        (["estimate", "--model", "resnet18", "--model-option", "stem=cifr"], "'cifr'", "cifar"),
        (["estimate", "--model", "resnet18", "--model-option", "stm=cifar"], "stm='cifar'", "stem"),
        (["estimate", "--model", "no_such:thing", "--input", "3"], "no_such", "importable"),
        (["estimate", "--model", "json:dumps", "--input", "3"], "json:dumps", ""),
        (["estimate", "--model", "json:JSONDecoder", "--input", "3"], "not a torch.nn.Module", ""),
        (["estimate", "--model", "json:dumps"], "needs --input", ""),
        (["estimate", "--model", "resnet18", "--hardware", "h100", "--price", "h10=1"], "'h10'", "h100"),
        (["estimate", "--model", "resnet18", "--hardware", "h100", "--price", "h100=x"], "no price", "h100=2.5"),
        (["estimate", "--model", "resnet18", "--max-power", "1"], "at most 1 W", ""),
        (["estimate", "--model", "resnet18", "--hardware", ""], "empty name", "commas"),
        (["estimate", "--model", "resnet18", "--model-option", "num_classes=ten"], "num_classes='ten'", ""),
        (["estimate", "--model", "resnet18", "--pareto", "--by", "phase"], "--by does nothing with --pareto", "--by"),
        (["estimate", "--model", "resnet18", "--sweep", "batch-size=8", "--explain"], "--explain does nothing", ""),
        (["estimate", "--model", "resnet18", "--break-even", "--fraction", "0"], "--fraction does nothing", ""),
        (["privacy"], "no configuration", "--epochs"),
        (["privacy", "digts"], "digts", "digits"),
        (["train"], "CONFIG", "digits"),
        (["train", "digts"], "digts", "digits"),
        (["train", "--resume", "nowhere"], "no run in", "dpquant train"),
        (["train", "--resume", "nowhere", "--epochs", "3"], "--epochs cannot change", ""),
        (["train", "digits", "--scheduler", "dpqant"], "dpqant", "dpquant"),
        (["report"], "no run given", "RUN"),
        (["report", "nowhere"], "no run in", "dpquant train"),
        (["privacy", "nowhere"], "nowhere", "digits"),
    ],
)
def test_wrong_input(capsys: Capture, words: list[str], error: str, hint: str) -> None:
    found = refused(capsys, *words)
    assert error in found[0]
    assert hint in found[1]


def test_several_problems_are_all_said(capsys: Capture, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("model: {nam: digits_cnn}\nformt: fp8\n")
    assert main(["privacy", str(path)]) == 2
    err = capsys.readouterr().err
    assert err.count("error: ") >= 2
    assert f"{path}:1: " in err


def test_defects_are_one_line_unless_debugged(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(args: object, out: object) -> int:
        raise RuntimeError("two\nlines")

    monkeypatch.setattr("dpquant.commands.formats.run", broken)
    assert main(["formats"]) == 1
    assert "error: unexpected RuntimeError: two lines\n" in capsys.readouterr().err
    with pytest.raises(RuntimeError):
        main(["formats", "--debug"])
    with pytest.raises(InputError):
        main(["hardware", "show", "nothing", "--debug"])


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (BrokenPipeError(), 0), (OSError(28, "x"), 1)])
def test_exit_codes(capsys: Capture, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int) -> None:
    def ends(args: object, out: object) -> int:
        raise error

    monkeypatch.setattr("dpquant.commands.formats.run", ends)
    assert main(["formats"]) == code


def test_a_reader_that_has_gone_is_no_failure_and_no_columns_are_eighty() -> None:
    """`dpquant formats | true`: rich would end with 1; and with COLUMNS=0 it would print nothing."""
    command = [sys.executable, "-m", "dpquant", "hardware", "list"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()  # long before there is anything to write
        assert (process.stderr.read(), process.wait()) == (b"", 0)
    done = subprocess.run(command, env={**os.environ, "COLUMNS": "0"}, capture_output=True, text=True, check=True)
    assert "b200" in done.stdout


@pytest.mark.parametrize("name", ["ledger.jsonl", "records.jsonl", "run.json"])
def test_a_report_replaces_nothing_of_a_run_and_no_device(capsys: Capture, tmp_path: Path, name: str) -> None:
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / name).write_text("{}")
    assert main(["report", str(tmp_path), "--html", str(tmp_path / name)]) == 2
    assert "belongs to a run" in capsys.readouterr().err
    assert (tmp_path / name).read_text() == "{}"
    for other in (Path(os.devnull), tmp_path):
        assert main(["report", str(tmp_path), "--html", str(other)]) == 2
        assert "is no regular file" in capsys.readouterr().err
    assert Path(os.devnull).is_char_device()


def test_a_name_leads_out_of_no_folder() -> None:
    assert train_command._fresh_folder("../../etc/x").parent == Path("runs")


WORDS = [
    *cli.COMMANDS, "list", "show", "check", "h100", "fp8", "digits", "nowhere", "--json", "--csv", "--quiet", "--debg",
    "--hardware", "--format", "--epochs", "--", "-", "", "=", "--=", "--codes", "--data", "--delta", "0", "-1", "nan",
    "1e400", "9" * 50, "ü", "\udcff", "--batch-size", "--by", "--input",
]  # fmt: skip


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    words=st.lists(st.sampled_from(WORDS) | st.text(st.characters(exclude_characters="\x00"), max_size=8), max_size=5)
)
def test_no_words_end_in_a_traceback(capsys: Capture, words: list[str]) -> None:
    if "--debug" in words or ("train" in words and "digits" in words):
        return  # shows tracebacks; would train
    code = main(words)
    captured = capsys.readouterr()
    assert code in (0, 1, 2)
    assert "Traceback" not in captured.err
    assert "defect" not in captured.err, (words, captured.err)
    assert code == 0 or captured.err or "check" in words


JUNK = [
    "nan", ".inf", "-1", "0", "1e999", "null", "[]", "{}", "true", "&a", "*a", "!!python/object:os.system", "\t",
    "\r\n", "9" * 80, "9" * 400, "ü", "- -", "?", ":", "\x00", "\x85", "'", "#", "<<:", "---",
]  # fmt: skip


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    profile=st.booleans(),
    changes=st.lists(st.tuples(st.floats(0, 1), st.sampled_from(JUNK), st.integers(0, 8)), min_size=1, max_size=3),
)
def test_no_damaged_yaml_ends_in_a_traceback(
    capsys: Capture, tmp_path: Path, profile: bool, changes: list[tuple[float, str, int]]
) -> None:
    source = find_profile("h100") if profile else shipped_configs()["digits"]
    text = source.read_text(encoding="utf-8")
    for place, junk, drop in changes:
        start = round(place * len(text))
        text = text[:start] + junk + text[start + drop :]
    path = tmp_path / "damaged.yaml"
    path.write_bytes(text.encode("utf-8"))
    (tmp_path / "spec.yaml").write_text("base: damaged.yaml\nseeds: [0]\n")
    words = ["hardware", "check", str(path)] if profile else ["sweep", str(tmp_path / "spec.yaml"), "--dry-run"]
    code = main(words)
    captured = capsys.readouterr()
    assert code in (0, 1, 2)
    assert "defect" not in captured.err, captured.err
    assert "Traceback" not in captured.err


# --- formats


def test_formats_lists_every_one(capsys: Capture) -> None:
    rows = answer(capsys, "formats")["rows"]
    assert [row["name"] for row in rows] == list(FORMATS)
    by_name = {row["name"]: row for row in rows}
    e4m3 = by_name["float8_e4m3fn"]
    assert (e4m3["bits"], e4m3["max"], e4m3["epsilon"], e4m3["codes"]) == (8, 448.0, 0.125, 256)
    assert {"h100", "h200", "b200"} <= set(e4m3["native_on"])
    assert "a100" not in e4m3["native_on"]
    assert by_name["nvfp4"]["bits_per_element"] == 4.5
    out = shown(capsys, "formats")
    assert all(name in out for name in FORMATS)


def test_formats_shows_every_code(capsys: Capture) -> None:
    values = answer(capsys, "formats", "fp4")["values"]
    assert [v["value"] for v in values] == [0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]
    out = shown(capsys, "formats", "float8_e4m3fn", "--codes")
    assert "7e         448" in out
    assert len(answer(capsys, "formats", "float8_e5m2")["values"]) == 256
    assert len(answer(capsys, "formats", "bfloat16", "--codes")["values"]) == 65536
    assert answer(capsys, "formats", "bfloat16")["values"] == []


def test_csv_has_every_key(capsys: Capture) -> None:
    for words in (["formats"], ["hardware", "list"]):
        assert main([*words, "--csv"]) == 0
        captured = capsys.readouterr()
        rows = list(csv.DictReader(io.StringIO(captured.out)))
        assert len(rows) == len(answer(capsys, *words)["rows"])
        assert "name" in rows[0]
        assert "trust" in captured.err or "NAME" in captured.err or "Native" in captured.err


def test_formats_ranks_on_data(capsys: Capture, tmp_path: Path) -> None:
    rows = answer(capsys, "formats", "--data", "normal")["rows"]
    db = {row["format"]: float(row["sqnr_db"]) for row in rows}
    assert list(db.values()) == sorted(db.values(), reverse=True)
    assert db["float32"] == math.inf
    assert db["float8_e4m3fn"] > db["nvfp4"] > db["mxfp4_e2m1"] > db["luq_fp4"]
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=1000))
    assert "keeps this data best" in " ".join(shown(capsys, "formats", "--data", str(tmp_path / "x.npy")).split())
    for content, error in ((np.array([1.0, np.nan]), "NaN"), (np.array(["a"]), "no array of numbers")):
        np.save(tmp_path / "x.npy", content)
        assert error in refused(capsys, "formats", "--data", str(tmp_path / "x.npy"))[0]
    np.save(tmp_path / "x.npy", np.zeros(3))
    for damaged in (b"no numbers", (tmp_path / "x.npy").read_bytes().replace(b"{", b"", 1)):
        (tmp_path / "x.npy").write_bytes(damaged)
        assert "cannot be read" in refused(capsys, "formats", "--data", str(tmp_path / "x.npy"))[0]


def test_formats_compares_with_qtorch(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    from emulation import compare

    def made_up(fmt: NumberFormat) -> compare.QtorchDifferences:
        fmt.to_qtorch()
        return compare.QtorchDifferences(
            format=fmt.name,
            count=65536,
            by_cause={"NaN": 254, "tie": 3},
            examples={"NaN": (), "tie": ((1.0, 2.0, 3.0),)},
        )

    monkeypatch.setattr(compare, "qtorch_differences", made_up)  # the real one compiles for a minute
    rows = answer(capsys, "formats", "--compare", "qtorch")["rows"]
    assert "float8_e4m3fn" in {row["format"] for row in rows}
    assert "float8_e4m3fnuz" not in {row["format"] for row in rows}
    assert rows[0]["differing"] == 257
    assert "254" in shown(capsys, "formats", "--compare", "qtorch")
    assert "--compare" in refused(capsys, "formats", "--compare", "torch")[0]


# --- hardware


def test_hardware_list_and_show(capsys: Capture) -> None:
    rows = answer(capsys, "hardware", "list")["rows"]
    assert [row["name"] for row in rows] == list_profiles()
    assert {"a100", "h100", "h200", "b200", "mi300x"} <= set(list_profiles())
    out = shown(capsys, "hardware", "list")
    assert all(name in out for name in list_profiles())
    facts = answer(capsys, "hardware", "show", "H100")
    assert facts["name"] == "h100"
    assert all(row["status"] for row in facts["numbers"])
    assert {row["kernel"] for row in facts["calibration"]} >= {"bfloat16", "fp8"}
    assert all(0 < row["held_out_mape_percent"] < 100 for row in facts["calibration"])
    assert main(["hardware", "show", "h100"]) == 0
    assert "published" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["h100", "b200", "h200_measured", "tpu_v5e"])
def test_hardware_show_csv_has_every_number(capsys: Capture, name: str) -> None:
    facts = answer(capsys, "hardware", "show", name)
    assert main(["hardware", "show", name, "--csv"]) == 0
    captured = capsys.readouterr()
    rows = {row["key"]: row for row in csv.DictReader(io.StringIO(captured.out))}
    profile = load_profile(name)
    assert set(profile.provenance) <= set(rows), "every number that has a source in the YAML"
    assert list(next(iter(rows.values()))) == ["key", "value", "unit", "status", "source", "url", "note"]
    for row in rows.values():
        if row["status"] != "not published":
            assert math.isfinite(float(row["value"]))
            assert row["source"]
    capacity = rows["memory.capacity_bytes"]
    assert (float(capacity["value"]), capacity["unit"]) == (profile.memory.capacity_bytes, "B")
    tags = profile.provenance["memory.capacity_bytes"].sources
    assert capacity["source"] == "; ".join(profile.sources[tag].title for tag in tags)
    for rate in facts["formats"]:
        if rate["timed_as"] == rate["format"]:
            row = rows[f"formats.{rate['format']}.peak_flops_per_s"]
            assert (float(row["value"]), row["unit"]) == (rate["peak_flops_per_s"], "FLOP/s")
    for kernel in facts["calibration"]:
        row = rows[f"calibration.kernels.{kernel['kernel']}.fitted.held_out_mape_percent"]
        assert (float(row["value"]), row["unit"], row["status"]) == (kernel["held_out_mape_percent"], "%", "fitted")
    named = {"launch_s": "s", "memory.bandwidth_bytes_per_s": "B/s", "power.limit_w": "W", "units": ""}
    assert {key: rows[key]["unit"] for key in named} == named
    assert any(key.startswith("calibration.kernels.") for key in rows) == bool(facts["calibration"])


def test_hardware_check(capsys: Capture, tmp_path: Path) -> None:
    assert "no problem found" in shown(capsys, "hardware", "check", "h100", "b200")
    bad = tmp_path / "bad.yaml"
    bad.write_text("extends: h100\nlaunch_s: {value: -1, status: published, source: AIC}\nmemry: {}\n")
    found = answer(capsys, "hardware", "check", str(bad), code=1)
    lines = [problem["line"] for problem in found["problems"]]
    assert 2 in lines
    assert 3 in lines
    assert main(["hardware", "check", str(bad)]) == 1
    out = capsys.readouterr().out
    assert f"{bad}:3: " in out
    assert "memory" in out


def test_hardware_validate(capsys: Capture, tmp_path: Path) -> None:
    table = tmp_path / "measured.csv"
    lines = ["device,gemm_dtype,m,n,k,latency_us"]
    for m in (128, 1024, 8192):
        lines += [f"h100_sxm,bfloat16,{m},4096,4096,{m / 20 + 10}", f"h100_sxm,fp8,{m},4096,4096,{m / 40 + 15}"]
        lines.append(f"a100_sxm,bfloat16,{m},4096,4096,{m}")
    table.write_text("\n".join(lines) + "\n")
    rows = answer(capsys, "hardware", "validate", "h100", "--data", str(table))["rows"]
    assert [(row["format"], row["n"]) for row in rows] == [("bfloat16", 3), ("fp8", 3)]
    for row in rows:
        assert row["mape_percent"] >= 0
        assert row["rank_correlation"] == pytest.approx(1)
        assert row["roofline_mape_percent"] > 0
    assert "furthest off" in shown(capsys, "hardware", "validate", "h100", "--data", str(table))
    table.write_text("\n".join(lines).replace("fp8", "fp9"))
    error, hint = refused(capsys, "hardware", "validate", "h100", "--data", str(table))
    assert "measured.csv:3: " in error
    assert "fp8" in hint


# --- estimate


@pytest.mark.parametrize(
    "view",
    ["", "--by phase", "--by memory", "--pareto", "--break-even", "--sweep batch-size=16,32", "--cost-model paper"],
)
def test_another_formats_figures_are_called_so_however_quiet(capsys: Capture, view: str) -> None:
    words = f"estimate --model digits_cnn --hardware a100 --format nvfp4 --batch-size 16 {view}".split()
    assert "falls back to bfloat16" in " ".join(shown(capsys, *words, "--quiet").split())
    assert {row["falls_back_to"] for row in answer(capsys, *words)["rows"]} == {"bfloat16"}


def test_estimate_json(capsys: Capture) -> None:
    data = answer(capsys, *ESTIMATE, "--format", "fp8,nvfp4")
    rows = data["rows"]
    assert [(r["hardware"], r["format"]) for r in rows] == [
        (h, f) for h in ("h100", "b200") for f in ("float8_e4m3fn", "nvfp4")
    ]
    for row in rows:
        keys = {"basis", "step_s", "speedup", "energy_joules", "peak_memory_bytes", "bound", "native", "phases"}
        assert keys <= set(row)
        assert sum(row["phases"].values()) == pytest.approx(row["step_s"])
        assert sum(row["layers"].values()) == pytest.approx(row["step_s"])
        assert row["speedup"] == pytest.approx(row["baseline_step_s"] / row["step_s"])
        assert row["bound"] in ("compute", "memory", "launch")
        assert row["max_speedup"] >= row["speedup"] * (1 - 1e-9)
        assert row["fits"]
    by_key = {(r["hardware"], r["format"]): r for r in rows}
    assert by_key["h100", "float8_e4m3fn"]["native"]
    assert not by_key["h100", "nvfp4"]["native"]
    assert by_key["h100", "nvfp4"]["falls_back_to"] == "bfloat16"


def test_estimate_table_marks_the_fastest_and_says_how_far_to_trust_it(capsys: Capture) -> None:
    out = shown(capsys, *ESTIMATE, "--format", "fp8,nvfp4", "--basis", "peak")
    rows = answer(capsys, *ESTIMATE, "--format", "fp8,nvfp4", "--basis", "peak")["rows"]
    best = min(rows, key=lambda r: r["step_s"])
    marked = next(line for line in out.splitlines() if line.startswith("*"))
    assert best["hardware"] in marked
    assert best["format"] in marked
    assert f"Fastest: {best['hardware']} with {best['format']}" in out
    assert "upper bound" in " ".join(out.split())


@pytest.mark.parametrize("by", ["layer", "phase"])
def test_estimate_parts_add_up(capsys: Capture, by: str) -> None:
    capsys.readouterr()
    assert main([*ESTIMATE, "--format", "fp8", "--by", by, "--csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    for hardware in ("h100", "b200"):
        own = [row for row in rows if row["hardware"] == hardware]
        total = next(row for row in own if row[by] == "total")
        for key in ("step_s", "baseline_s", "share"):
            assert sum(float(row[key]) for row in own if row is not total) == pytest.approx(float(total[key]))
    shown(capsys, *ESTIMATE, "--format", "fp8", "--by", by)


def test_estimate_fraction_and_target(capsys: Capture) -> None:
    quantized = [answer(capsys, *ESTIMATE, "--format", "fp8", "--fraction", f)["rows"][0] for f in ("0", "0.5", "1")]
    assert [row["quantized"] for row in quantized] == [0, round(0.5 * quantized[2]["quantizable"]), 21]
    assert quantized[0]["speedup"] == pytest.approx(1)
    most = answer(capsys, *ESTIMATE, "--format", "fp8", "--basis", "peak")["rows"][0]["max_speedup"]
    target = str((1 + most) / 2)
    reached = answer(capsys, *ESTIMATE, "--format", "fp8", "--basis", "peak", "--target-speedup", target)["rows"][0]
    assert reached["reached"]
    assert float(target) <= reached["speedup"]
    assert 0 < reached["quantized"] < 21
    missed = answer(capsys, *ESTIMATE, "--format", "fp8", "--target-speedup", "50", code=1)["rows"]
    assert [row["reached"] for row in missed] == [False, False]


def test_layers_that_gain_alone_and_lose_together_are_left_in_full_precision(capsys: Capture) -> None:
    """Where launches bound an eager step, each layer quantized adds kernels."""
    words = ("estimate", "--model", "resnet18", "--batch-size", "256", "--framework", "eager")
    for target in ("1.02", "1.1"):
        rows = answer(capsys, *words, "--target-speedup", target)["rows"]
        assert {row["reached"] for row in rows} == {False, True}
        for row in rows:
            assert row["max_speedup"] >= 1
            assert row["speedup"] <= row["max_speedup"] * (1 + 1e-12)
            assert row["reached"] == (row["max_speedup"] >= float(target) * (1 - 1e-12))


def test_estimate_explains(capsys: Capture) -> None:
    out = " ".join(shown(capsys, *ESTIMATE, "--format", "nvfp4", "--explain").split())
    assert "h100, nvfp4: mostly bound by" in out
    assert "h100 computes nvfp4 in bfloat16" in out
    assert "would help" in out


def test_estimate_largest_batch_is_the_largest_that_fits(capsys: Capture) -> None:
    row = answer(capsys, *ESTIMATE, "--format", "fp8")["rows"][0]
    words = ["estimate", "--model", "resnet18", "--input", "3x32x32", "--hardware", "h100", "--format", "fp8"]
    most = row["largest_batch"]
    at = [answer(capsys, *words, "--batch-size", str(n), "--physical-batch-size", str(n)) for n in (most, most + 1)]
    assert [a["rows"][0]["fits"] for a in at] == [True, False]
    said = f"in full precision there; at most {most:,} examples fit into its "
    assert said in " ".join(shown(capsys, *words).replace(", which is faster", "").split())
    parts = answer(capsys, *words, "--batch-size", str(3 * most))["rows"][0]
    assert parts["fits"]
    assert parts["physical_batch_size"] <= most
    assert "examples at a time" in " ".join(shown(capsys, *words, "--batch-size", str(3 * most)).split())


def test_estimate_curves(capsys: Capture) -> None:
    words = ["estimate", "--model", "digits_cnn", "--hardware", "b200,h100", "--format", "fp8", "--basis", "peak"]
    points = answer(capsys, *words, "--pareto")["rows"]
    assert [p["quantized"] for p in points if p["hardware"] == "b200"] == list(range(7))
    assert all(p["drawn"] <= p["best"] * (1 + 1e-9) for p in points)
    even = answer(capsys, *words, "--break-even")["rows"]
    assert [row["hardware"] for row in even] == ["b200", "h100"]
    assert all(row["batch_size"] is None or row["batch_size"] >= 1 for row in even)
    swept = answer(capsys, *words, "--sweep", "batch-size=64,128")["rows"]
    assert [row["batch_size"] for row in swept] == [64, 128, 64, 128]
    direct = answer(capsys, *words, "--batch-size", "128")["rows"]
    assert swept[1]["speedup"] == pytest.approx(direct[0]["speedup"])
    terms = {row["term"]: row["value"] for row in answer(capsys, *words, "--cost-model", "paper")["rows"][:10]}
    assert terms["1 - p + p / r"] == pytest.approx(0.25)
    for curve in (["--pareto"], ["--break-even"], ["--sweep", "batch-size=64"], ["--cost-model", "paper"]):
        shown(capsys, *words, *curve)
    assert "give one" in refused(capsys, *words, "--pareto", "--break-even")[0]
    assert "batch-size=64" in refused(capsys, *words, "--sweep", "batch=3")[1]


def test_estimate_full_precision_is_no_quantization(capsys: Capture) -> None:
    row = answer(capsys, *ESTIMATE, "--format", "bf16")["rows"][0]
    assert (row["speedup"], row["quantized"]) == (1, 0)


def test_estimate_price_and_power(capsys: Capture) -> None:
    rows = answer(capsys, *ESTIMATE, "--format", "fp8", "--price", "h100=3.6")["rows"]
    assert rows[0]["usd_per_million_examples"] == pytest.approx(0.001 * rows[0]["step_s"] / 64 * 1e6)
    assert rows[1]["usd_per_million_examples"] is None
    rows = answer(capsys, "estimate", "--model", "digits_cnn", "--max-power", "400")["rows"]
    assert rows
    assert all(row["power_limit_w"] <= 400 for row in rows)
    assert [row["step_s"] for row in rows] == sorted(row["step_s"] for row in rows)


def test_estimate_says_what_is_cheapest_and_when_full_precision_is_faster(capsys: Capture) -> None:
    words = [*ESTIMATE, "--format", "nvfp4", "--price", "h100=1,b200=1000"]
    out = " ".join(shown(capsys, *words).split())
    assert "cheapest: h100 with nvfp4, $" in out
    assert "in full precision there, which is faster" in out
    assert "none is faster" in " ".join(shown(capsys, *words, "--explain").split())


def test_estimate_memory_adds_up(capsys: Capture) -> None:
    row = answer(capsys, *ESTIMATE, "--format", "fp8")["rows"][0]
    assert sum(row["memory_parts"].values()) == pytest.approx(row["peak_memory_bytes"], abs=1)
    assert row["step_low_s"] < row["step_s"] < row["step_high_s"]
    assert main([*ESTIMATE, "--format", "fp8", "--by", "memory", "--csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    for hardware in ("h100", "b200"):
        *parts, total = [float(r["bytes"]) for r in rows if r["hardware"] == hardware]
        assert sum(parts) == pytest.approx(total)
    out = shown(capsys, *ESTIMATE, "--format", "fp8", "--by", "memory")
    assert "fits into" in out


def test_estimate_own_model(capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = "from torch import nn\ndef net(width=8):\n    return nn.Sequential(nn.Flatten(), nn.Linear(12, width))\n"
    (tmp_path / "own_models.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    words = ["estimate", "--model", "own_models:net", "--input", "3x4", "--hardware", "h100", "--format", "fp8"]
    assert main([*words, "--model-option", "width=16", "--json"]) == 0
    captured = capsys.readouterr()
    assert "importing own_models and calling net(width=16)" in captured.err
    assert json.loads(captured.out)["rows"][0]["quantizable"] == 1


# --- privacy


def test_privacy_of_a_plan(capsys: Capture) -> None:
    plan = answer(capsys, "privacy", "digits")
    keys = {"epsilon", "delta", "accountant", "noise_multiplier", "sample_rate", "steps", "analysis"}
    assert keys <= set(plan)
    assert set(plan["analysis"]) == {"noise_multiplier", "sample_rate", "steps"}
    assert plan["analysis"]["steps"] > 0
    assert plan["target_epsilon"] - 0.2 < plan["epsilon"] <= plan["target_epsilon"]
    assert plan["epsilon_analysis_alone"] < plan["epsilon_training_alone"] < plan["epsilon"]
    assert plan["epsilon_training_alone"] + plan["epsilon_analysis_added"] == pytest.approx(plan["epsilon"])
    out = shown(capsys, "privacy", "digits", "--accountant", "rdp", "--noise-multiplier", "1")
    assert "adding or removing one example" in " ".join(out.split())


def test_privacy_overrides_and_options(capsys: Capture) -> None:
    words = ["--accountant", "rdp", "--noise-multiplier", "1.5"]
    one, two = (answer(capsys, "privacy", "digits", *words, "--epochs", n) for n in ("1", "2"))
    assert two["steps"] == 2 * one["steps"]
    assert two["epsilon"] > one["epsilon"]
    options = ["--dataset-size", "50000", "--batch-size", "1000", "--epochs", "10", "--delta", "1e-5"]
    plain = answer(capsys, "privacy", *options, "--accountant", "rdp", "--noise-multiplier", "1")
    assert (plain["sample_rate"], plain["steps"]) == (0.02, 500)
    assert plain["analysis"] == {"noise_multiplier": None, "sample_rate": None, "steps": 0}
    few = ["--dataset-size", "100", "--batch-size", "10", "--epochs", "1", "--delta", "1e-3"]
    assert "together" in shown(capsys, "privacy", *few, "--accountant", "rdp", "--noise-multiplier", "1")
    solved = answer(capsys, "privacy", *options, "--accountant", "rdp", "--target-epsilon", str(plain["epsilon"]))
    assert solved["noise_multiplier"] == pytest.approx(1, abs=2e-3)
    assert "--delta" in refused(capsys, "privacy", *options[:6])[1]
    assert "larger" in refused(capsys, "privacy", "--dataset-size", "5", *options[2:], "--target-epsilon", "1")[0]
    loose = [*options[:-1], "2e-5", "--target-epsilon", "1"]
    assert refused(capsys, "privacy", *loose) == (
        "delta=2e-05 is not below 1/50000, one over the number of examples",
        "2e-06, say",
    )
    assert "1/1500" in refused(capsys, "privacy", "digits", "--delta", "0.1")[0]


# --- train and report

CONFIG = """\
model: {{name: digits_cnn}}
data: {{name: npz, root: {root}}}
hardware: {{profile: b200, basis: peak}}
format: luq_fp4
schedule: {{scheduler: pls, fraction: 0.5}}
training: {{epochs: 2, batch_size: 8, dataset_size: 32, learning_rate: 0.5, max_grad_norm: 1.0}}
privacy: {{noise_multiplier: 1.0, target_delta: 1e-3, accountant: rdp}}
seed: 0
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny run, trained through the command line."""
    folder = tmp_path_factory.mktemp("train")
    config = write_config(folder)
    assert main(["train", str(config), "--out", str(folder / "run"), "--quiet"]) == 0
    return folder / "run"


def write_config(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 255, (40, 8, 8), dtype=np.uint8), np.arange(40) % 10
    np.savez(folder / "d.npz", x_train=images[:32], y_train=labels[:32], x_test=images[32:], y_test=labels[:8])
    (folder / "tiny.yaml").write_text(CONFIG.format(root=folder / "d.npz"))
    return folder / "tiny.yaml"


def test_train_leaves_a_run_that_report_reads(capsys: Capture, trained: Path) -> None:
    run = load_run(trained)
    assert [record.epoch for record in run.records] == [1, 2]
    assert all(len(record.quantized) == round(len(run.facts.layers) / 2) for record in run.records)
    data = answer(capsys, "report", str(trained))["runs"][0]
    assert data["summary"]["finished"]
    assert [r["epsilon"] for r in data["records"]] == [r.epsilon for r in run.records]
    out = shown(capsys, "report", str(trained))
    assert "Schedule: layers by epoch" in out
    assert "Poisson" in out
    side = shown(capsys, "report", str(trained), str(trained))
    assert "+0.0" in side
    capsys.readouterr()
    assert main(["report", str(trained), "--csv"]) == 0
    assert len(list(csv.DictReader(io.StringIO(capsys.readouterr().out)))) == 2


def test_train_refuses_before_anything_is_written(capsys: Capture, tmp_path: Path) -> None:
    config = write_config(tmp_path)
    for words, error in (
        (["--hardware", "h10"], "h10"),
        (["--format", "fp5"], "fp5"),
        (["--target-speedup", "40"], "out of reach"),
        (["--epochs", "0"], "epochs"),
        (["--data-root", str(tmp_path / "none")], "does not exist"),
        (["--target-epsilon", "-1"], "target_epsilon"),
    ):
        assert error in refused(capsys, "train", str(config), "--out", str(tmp_path / "run"), *words)[0]
    assert not (tmp_path / "run").exists()


def test_train_writes_event_files(capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = write_config(tmp_path)
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "torch.utils.tensorboard", None)
        error, hint = refused(capsys, "train", str(config), "--out", str(tmp_path / "run"), "--tensorboard")
    assert "tensorboard" in error
    assert "dpquant[plots]" in hint
    assert not (tmp_path / "run").exists()

    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert main(["train", str(config), "--out", str(tmp_path / "run"), "--tensorboard", "--quiet"]) == 0
    events = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    names = events.Tags()["scalars"]
    assert {"epsilon", "speedup", "test_accuracy", "layers_quantized"} <= set(names)
    records = load_run(tmp_path / "run").records
    for name in ("epsilon", "test_accuracy", "speedup"):
        written = [(event.step, event.value) for event in events.Scalars(name)]
        assert written == [(r.epoch, pytest.approx(getattr(r, name))) for r in records]


def test_train_says_once_that_cores_are_idle(capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    config = write_config(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def said(name: str, threads: int, cores: int) -> list[str]:
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)), raising=False)
        assert main(["train", str(config), "--out", str(tmp_path / name), "--epochs", "1"]) == 0
        return [line for line in capsys.readouterr().err.splitlines() if " thread" in line]

    note = "note: training on 1 thread of the 8 cores that this process may use (OMP_NUM_THREADS=1)"
    assert said("idle", 1, 8) == [note]
    assert said("busy", 8, 8) == []
    assert said("one", 1, 1) == [], "there is nothing that the user could change"


def test_train_refuses_a_folder_in_use(capsys: Capture, trained: Path) -> None:
    error, hint = refused(capsys, "train", str(trained.parent / "tiny.yaml"), "--out", str(trained))
    assert "not empty" in error
    assert "--resume" in hint


def test_a_run_that_counts_steps_again_says_where_it_ends(
    capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dpquant import engine

    config, path = write_config(tmp_path), tmp_path / "run"
    backward, calls = engine.DPQuantEngine.backward, iter(range(6))

    def stopped(*args: Any) -> Any:
        if next(calls) == 5:  # in the second epoch of four steps
            raise KeyboardInterrupt
        return backward(*args)

    monkeypatch.setattr(engine.DPQuantEngine, "backward", stopped)
    assert main(["train", str(config), "--target-epsilon", "3", "--out", str(path)]) == 130
    monkeypatch.setattr(engine.DPQuantEngine, "backward", backward)
    monkeypatch.setattr(engine, "arithmetic", lambda module, processes: "of another machine")
    capsys.readouterr()
    assert main(["train", "--resume", str(path)]) == 0
    said = capsys.readouterr().err
    assert "ended at step 4 of 8: what was taken again after a stop has spent the rest" in said
    assert load_run(path).records[-1].epsilon <= 3


def test_interrupted_training_can_be_resumed(
    capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: Path
) -> None:
    from dpquant import train as loop

    whole = loop.train

    def stopped(*args: Any) -> Any:
        yield next(iter(whole(*args)))
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "train", stopped)
    config, path = write_config(tmp_path), tmp_path / "run"
    assert main(["train", str(config), "--out", str(path)]) == 130
    assert f"dpquant train --resume {path}" in capsys.readouterr().err
    assert len(load_run(path).records) == 1
    monkeypatch.setattr(loop, "train", whole)
    done = answer(capsys, "train", "--resume", str(path))
    assert done["summary"]["finished"]
    same = ("quantized", "test_accuracy", "test_loss", "epsilon", "speedup")
    for ours, theirs in zip(load_run(path).records, load_run(trained).records, strict=True):
        assert [getattr(ours, key) for key in same] == [getattr(theirs, key) for key in same]


def test_misspelt_runs_have_a_suggestion(capsys: Capture, trained: Path) -> None:
    for words in (["report"], ["privacy"], ["train", "--resume"]):
        error, hint = refused(capsys, *words, str(trained.parent / "rum"))
        assert "no run in" in error
        assert hint == f"did you mean '{trained}'?"


def test_privacy_of_a_run(capsys: Capture, trained: Path) -> None:
    spent = answer(capsys, "privacy", str(trained))
    assert spent["epsilon"] == pytest.approx(load_run(trained).records[-1].epsilon)
    assert "has spent epsilon" in shown(capsys, "privacy", str(trained))
    error, hint = refused(capsys, "privacy", str(trained), "--epochs", "5")
    assert "--epochs cannot change what a run has spent" in error
    planned = answer(capsys, *hint.split(": dpquant ")[1].split(), "--epochs", "5")
    assert planned["steps"] == 20


DOCUMENTED = Path(__file__).parent.parent / "docs" / "command-line.md"
