"""What is built holds what it must, and works from an empty folder on its own."""

import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

import dpquant

ROOT = Path(__file__).parent.parent
PACKAGES = ("dpquant", "emulation", "hwmodels")


def pip(*words: str | Path) -> None:
    """Runs pip offline, without building in an environment of its own."""
    done = subprocess.run([sys.executable, "-m", "pip", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of the working tree."""
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", folder, ROOT)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution of the working tree."""
    folder = tmp_path_factory.mktemp("sdist")
    words = [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", str(folder)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.tar.gz")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the installed wheel and nothing else."""
    folder = tmp_path_factory.mktemp("site")
    pip("install", "--no-deps", "--no-index", "--no-compile", "--target", folder, wheel)
    return folder


def contents(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def package_files() -> set[str]:
    """Every file of the packages that is no by-product."""
    files = (path for package in PACKAGES for path in (ROOT / package).rglob("*") if path.is_file())
    return {str(path.relative_to(ROOT)) for path in files if "__pycache__" not in path.parts}


def run(site: Path, folder: Path, *words: str) -> str:
    """stdout of Python run in ``folder``, its modules from ``site`` and, for dependencies, this environment."""
    environment = {**os.environ, "PYTHONPATH": str(site), "COLUMNS": "80", "NO_COLOR": "1"}
    environment.pop("PYTHONHOME", None)
    done = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, cwd=folder, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_holds_every_file(wheel: Path) -> None:
    held = contents(wheel)
    assert package_files() - held == set()
    configs = {path.relative_to(ROOT) for path in (ROOT / "configs").rglob("*.yaml")}
    homes = {"hardware": "hwmodels", "runs": "dpquant", "sweeps": "dpquant"}
    assert {f"{homes[path.parts[1]]}/{path}" for path in configs} - held == set()
    for name in ("dpquant/digits.csv.gz", "emulation/quantize.c", "hwmodels/hardware.schema.json"):
        assert name in held
    assert {f"{package}/py.typed" for package in PACKAGES} <= held


def test_the_wheel_holds_nothing_else(wheel: Path) -> None:
    others = {name.split("/")[0] for name in contents(wheel)} - set(PACKAGES)
    assert others == {f"dpquant-{dpquant.__version__}.dist-info"}
    assert not [name for name in contents(wheel) if name.endswith((".pyc", ".so", ".ipynb")) or "test" in name]


def test_metadata(wheel: Path) -> None:
    info = f"dpquant-{dpquant.__version__}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        metadata = archive.read(f"{info}/METADATA").decode()
        entry_points = archive.read(f"{info}/entry_points.txt").decode()
        licence = archive.read(f"{info}/licenses/LICENSE").decode()
        assert archive.read(f"{info}/licenses/dpquant/digits.LICENSE")
    assert f"\nVersion: {dpquant.__version__}\n" in metadata
    assert "License-Expression: Apache-2.0" in metadata
    assert "Apache License" in licence
    assert "dpquant = dpquant.cli:main" in entry_points
    for extra in ("vision", "plots", "test"):
        assert f"Provides-Extra: {extra}" in metadata


def test_the_version_is_in_one_place() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["dynamic"] == ["version"]
    assert project["tool"]["hatch"]["version"]["path"] == "dpquant/__init__.py"
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == dpquant.__version__, "CITATION.cff cannot be generated: it must follow"
    assert citation["license"] == project["project"]["license"]


def test_constraints_pin_what_is_asked_for() -> None:
    """Every requirement has an exact version: a new one without would make tests depend on the day."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    asked = [*project["project"]["dependencies"], *project["build-system"]["requires"]]
    asked += [name for extra in project["project"]["optional-dependencies"].values() for name in extra]
    asked.remove("dpquant[plots]")
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in lines if "==" in line}
    names = {name.split(">")[0].split("=")[0].split("<")[0].strip().lower().replace("_", "-") for name in asked}
    assert names - pinned == set()


def test_modules_are_those_of_the_wheel(installed: Path, tmp_path: Path) -> None:
    code = "import emulation, hwmodels, dpquant; print(emulation.__file__, hwmodels.__file__, dpquant.__file__)"
    for file in run(installed, tmp_path, "-c", code).split():
        assert Path(file).is_relative_to(installed)


def test_commands_work_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    table = run(installed, tmp_path, "-m", "dpquant.cli", "hardware", "list", "--csv")
    assert len(table.splitlines()) == 1 + len(list((ROOT / "configs/hardware").glob("*.yaml")))
    assert dpquant.__version__ in run(installed, tmp_path, "-m", "dpquant.cli", "--version")
    assert list(tmp_path.iterdir()) == [], "nothing is written"


@pytest.mark.long
def test_a_plan_and_a_run_work_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    assert "differentially private" in run(installed, tmp_path, "-m", "dpquant.cli", "privacy", "digits")
    words = ["train", "digits", "--epochs", "1", "--scheduler", "static", "--out", "run", "--quiet"]
    run(installed, tmp_path, "-m", "dpquant.cli", *words)
    assert "epsilon" in run(installed, tmp_path, "-m", "dpquant.cli", "report", "run")


def test_the_sdist_builds_the_same_wheel(sdist: Path, wheel: Path, tmp_path: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames()}
    wanted = {"LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff", "constraints.txt", "Makefile", "pyproject.toml"}
    assert wanted - names == set()
    assert {f"examples/{path.name}" for path in (ROOT / "examples").glob("*.py")} <= names
    assert {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")} <= names
    assert "tests/test_packaging.py" in names
    pip("wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", tmp_path, sdist)
    (again,) = tmp_path.glob("*.whl")
    assert contents(again) == contents(wheel)


@pytest.mark.long
def test_the_command_is_installed(wheel: Path, tmp_path: Path) -> None:
    """In an environment of its own: the `dpquant` command, with this environment's packages beneath."""
    words = [sys.executable, "-m", "venv", "--system-site-packages", "--without-pip", str(tmp_path / "venv")]
    subprocess.run(words, check=True)
    python = tmp_path / "venv/bin/python"
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "-q", wheel],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    shown = subprocess.run([tmp_path / "venv/bin/dpquant", "--version"], capture_output=True, text=True, check=False)
    assert shown.stdout.strip() == f"dpquant {dpquant.__version__}"
