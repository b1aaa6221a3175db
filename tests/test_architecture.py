"""Imports go one way, and what must be light stays light: read from the syntax trees, seen in fresh interpreters."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "emulation": {"emulation"},
    "hwmodels": {"hwmodels", "emulation.formats", "emulation.errors"},
    "dpquant": {"dpquant", "hwmodels", "emulation"},
}


def imported(source: str) -> set[str]:
    """Every module that a source text imports, `from a import b` counted as `a` and `a.b`."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide their direction"
            names.add(f"{node.module}")
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def violations(package: str, source: str) -> list[str]:
    """Imports of the project's own packages in ``source`` that ``package`` may not have."""
    own = [name for name in imported(source) if name.split(".")[0] in MAY_IMPORT]
    allowed = MAY_IMPORT[package]
    return sorted(
        name
        for name in own
        if not any(name == a or name.startswith(a + ".") for a in allowed)
        # `from emulation import formats` names the package itself on the way to a module that is allowed
        and not any(a.startswith(name + ".") and a in own for a in allowed)
    )


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_go_one_way(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    found = {str(f.relative_to(ROOT)): v for f in files if (v := violations(package, f.read_text()))}
    assert not found


def test_the_guard_sees_a_violation() -> None:
    assert violations("hwmodels", "from emulation import layers") == ["emulation", "emulation.layers"]
    assert violations("hwmodels", "def f():\n    import dpquant.engine") == ["dpquant.engine"]
    assert violations("emulation", "import hwmodels") == ["hwmodels"]
    assert violations("hwmodels", "from emulation import formats\nfrom emulation.errors import InputError") == []


@pytest.mark.parametrize(
    "statement",
    [
        "import emulation, hwmodels, dpquant",
        "import emulation.formats",
        "import hwmodels; hwmodels.list_profiles()",
        "from dpquant.cli import main; main(['hardware', 'list'])",
    ],
)
def test_needs_no_torch(statement: str, tmp_path: Path) -> None:
    code = f"import sys; {statement}; sys.exit('torch was imported' if 'torch' in sys.modules else 0)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_every_public_name_resolves(package: str) -> None:
    module = __import__(package)
    assert all(getattr(module, name) is not None for name in module.__all__)
    with pytest.raises(AttributeError):
        module.no_such_name  # noqa: B018
