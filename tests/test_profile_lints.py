"""The usual lies, each planted in a true profile and seen; each can be accepted with a reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from hwmodels.profile import check, load_profile
from hwmodels.profile_lints import LINTS
from hwmodels.strict_yaml import InputErrors

SHIPPED = Path(__file__).parent.parent / "configs" / "hardware"
LIES = {
    # name -> chip, text, what a datasheet reader types instead, the key that is wrong
    "fp8_over_16bit": ("h100", "{value: 1978.9e12, status: published, source: [GKL, AIC, AO]}", "3957.8e12"),
    "fp4_over_fp8": ("b200", "{value: 9000e12, status: published, source: [AIC, GKL, CUT]}", "18000e12"),
    "energy_per_flop": ("h100", "{value: 989.4e12, status: published, source: [GKL, AIC]}", "1978.9e12"),
    "flops_per_byte": ("h100", "{value: 3.35e12, status: published, source: [MLE, AIC, AO]}", "3.35e10"),
    "gb_or_gib": ("h100", "{value: 80e9, status: published, source: [MLE, AIC]}", "85899345920"),
    "rate_per_unit": ("a100", "{value: 312e12, status: published, source: [GKL, AIC]}", "624e12"),
    "idle_over_limit": ("h100", "{value: 126, status: derived, source: AICP", "1260"),
}


def true_text(chip: str) -> str:
    """A shipped profile without its calibration, so that a test may add keys at the end."""
    return (SHIPPED / f"{chip}.yaml").read_text().partition("calibration:\n")[0]


def lied(tmp_path: Path, lint: str) -> Path:
    chip, text, value = LIES[lint]
    source = true_text(chip)
    assert text in source
    told = text[: text.index(":") + 2] + value + text[text.index(", status") :]
    file = tmp_path / f"my_{chip}.yaml"
    file.write_text(source.replace(text, told, 1))
    return file


@pytest.mark.parametrize("lint", LIES)
def test_a_lie_is_seen_on_its_line(tmp_path: Path, lint: str) -> None:
    file = lied(tmp_path, lint)
    found = [error for error in check(file) if f"[{lint}]" in error.message]
    assert found
    line = file.read_text().splitlines()[(found[0].line or 0) - 1]
    assert LIES[lint][2] in line
    assert "accepted" in (found[0].hint or "")


@pytest.mark.parametrize("lint", [lint for lint in LIES if lint != "rate_per_unit"])
def test_a_lie_is_not_loaded(tmp_path: Path, lint: str) -> None:
    with pytest.raises(ValueError, match=lint):
        load_profile(lied(tmp_path, lint))


@pytest.mark.parametrize("lint", LIES)
def test_what_is_true_can_be_accepted(tmp_path: Path, lint: str) -> None:
    file = lied(tmp_path, lint)
    named = {line.split("[")[-1].rstrip("]") for line in map(str, check(file))}
    accepted = "".join(f"  {name}: it is so\n" for name in sorted(named))
    file.write_text(f"{file.read_text()}accepted:\n{accepted}")
    assert check(file) == []
    load_profile(file)


def test_every_lint_is_tested() -> None:
    assert set(LINTS) == {*LIES, "sparse_note"}


@pytest.mark.parametrize(
    ("note", "seen"), [("with sparsity", True), ("2:4", True), ("half of the sparse rate", False), ("dense", False)]
)
def test_notes_on_sparsity(tmp_path: Path, note: str, seen: bool) -> None:
    source = true_text("a100")
    file = tmp_path / "my.yaml"
    old = "{value: 312e12, status: published, source: [GKL, AIC]}"
    file.write_text(source.replace(old, old[:-1] + f', note: "{note}"}}'))
    assert any("[sparse_note]" in str(error) for error in check(file)) == seen


def test_gib_in_words_and_gb_in_numbers(tmp_path: Path) -> None:
    source = true_text("a100")
    file = tmp_path / "my.yaml"
    file.write_text(source.replace("{value: 41943040,", "{value: 40e6,"))
    (error,) = check(file)
    assert error.message == "cache_bytes=4e+07 is not the '40 MiB' of the text beside it [gb_or_gib]"
    assert (error.hint or "").startswith("that is 41943040 bytes")


def test_what_is_accepted_in_vain_is_said(tmp_path: Path) -> None:
    file = tmp_path / "my.yaml"
    file.write_text(true_text("a100") + "accepted:\n  fp4_over_fp8: because\n")
    (error,) = check(file)
    assert error.message == "accepted.fp4_over_fp8: nothing of the kind was found"


def test_lints_speak_beside_broken_fields(tmp_path: Path) -> None:
    """Everything at once: an unknown key, a bandwidth 1000 times off, a key given twice and a sparse rate."""
    source = true_text("h100")
    source = source.replace(LIES["fp8_over_16bit"][1], LIES["fp8_over_16bit"][1].replace("1978.9e12", "3957.8e12"))
    source = source.replace("value: 3.35e12", "value: 3.35e15").replace("matrix_unit:", "matrix_untit:")
    file = tmp_path / "my.yaml"
    file.write_text(source + "vendor: Nvidia\n")
    with pytest.raises(InputErrors):
        load_profile(file)
    text = "\n".join(map(str, check(file)))
    for part in ("unknown key 'matrix_untit'", "=3.35e+15 is above", "given twice", "fp8_over_16bit"):
        assert part in text
