"""``--download``: what is asked of torchvision, and that what it leaves is found. Nothing is fetched here."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from test_data import write_mnist

from dpquant.cli import main
from dpquant.data import DataSettings, load_data
from dpquant.download import _PARTS, download
from emulation.errors import InputError

Calls = list[tuple[str, str, dict[str, Any]]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """A torchvision that writes down what it is asked for, and leaves Fashion-MNIST's files where the real one does."""
    asked: Calls = []

    def data_set(name: str) -> Any:
        def fetch(root: str, **options: Any) -> None:
            asked.append((name, root, options))
            if name == "FashionMNIST":
                folder = Path(root) / name / "raw"
                folder.mkdir(parents=True, exist_ok=True)
                write_mnist(folder, packed=True)

        return fetch

    module = ModuleType("torchvision")
    module.datasets = SimpleNamespace(**{name: data_set(name) for name, _ in _PARTS.values()})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchvision", module)
    return asked


def test_every_part_is_asked_for_and_found(calls: Calls, tmp_path: Path) -> None:
    settings = DataSettings(name="fashion_mnist", root=str(tmp_path))
    download(settings)
    assert calls == [("FashionMNIST", str(tmp_path), {"download": True, "train": True})]
    assert len(load_data(settings).train) == 6
    download(DataSettings(name="gtsrb", root="x"))
    assert [call[2]["split"] for call in calls[1:]] == ["train", "test"]


def test_what_cannot_be_downloaded(calls: Calls) -> None:
    with pytest.raises(InputError, match="does not fetch data set 'digits'"):
        download(DataSettings(name="digits", root="x"))
    with pytest.raises(InputError, match=r"needs data\.root"):
        download(DataSettings(name="mnist"))


def test_without_torchvision(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    assert main(["train", "cifar10", "--download", "--data-root", "nowhere"]) == 2
    assert "needs torchvision" in capsys.readouterr().err


def test_the_command_downloads_first(calls: Calls, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "fashion_mnist", "--download", "--data-root", str(tmp_path), "--out", str(tmp_path / "run")]
    assert main(words) == 2  # six images are fewer than a batch
    assert "larger than the data (6 training examples)" in capsys.readouterr().err
    assert len(calls) == 1
