"""Data sets in folders: GTSRB in both layouts, images and texts by class, and what is wrong with them named."""

from pathlib import Path

import numpy as np
import pytest
import torch

from dpquant.data import DATASETS, DataSettings, load_data
from dpquant.datafolders import byte_tokens
from emulation.errors import InputError

Image = pytest.importorskip("PIL.Image")

HEADER = "Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId\n"


def save(path: Path, colour: tuple[int, int, int], size: tuple[int, int] = (30, 20)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def framed(path: Path, inside: tuple[int, int, int]) -> None:
    """A black image of 30x20 whose box (5, 4) to (24, 15), ends included, has one colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", (30, 20))
    image.paste(inside, (5, 4, 25, 16))
    image.save(path)


def write_gtsrb(root: Path, training: str = "GTSRB/Final_Training/Images", table: str = "GT-final_test.csv") -> None:
    for label, colour in ((0, (255, 0, 0)), (7, (0, 255, 0))):
        folder = root / training / f"{label:05d}"
        framed(folder / "00000_00000.ppm", colour)
        (folder / f"GT-{label:05d}.csv").write_text(f"{HEADER}00000_00000.ppm;30;20;5;4;24;15;{label}\n")
    framed(root / "GTSRB" / "Final_Test" / "Images" / "00000.ppm", (0, 0, 255))
    (root / table).write_text(f"{HEADER}00000.ppm;30;20;5;4;24;15;42\n")


def colours(images: torch.Tensor, name: str) -> list[list[float]]:
    """Each image's colour, which has to be the same all over, as shares of 255."""
    source = DATASETS[name]
    mean, std = (torch.tensor(t).view(1, 3, 1, 1) for t in (source.mean, source.std))
    raw = images * std + mean
    assert torch.allclose(raw, raw[..., :1, :1].expand_as(raw), atol=1e-6)
    return [[round(float(v), 3) for v in row] for row in raw[:, :, 0, 0]]


@pytest.mark.parametrize("training", ["GTSRB/Final_Training/Images", "GTSRB/Training"])
@pytest.mark.parametrize("table", ["GT-final_test.csv", "GTSRB/Final_Test/Images/GT-final_test.csv"])
def test_gtsrb_is_cut_to_its_signs(tmp_path: Path, training: str, table: str) -> None:
    write_gtsrb(tmp_path, training, table)
    splits = load_data(DataSettings(name="gtsrb", root=str(tmp_path)))
    assert (splits.input_shape, splits.classes) == ((3, 32, 32), 43)
    assert splits.train.tensors[1].tolist() == [0, 7]
    assert splits.test.tensors[1].tolist() == [42]
    assert colours(splits.train.tensors[0], "gtsrb") == [[1, 0, 0], [0, 1, 0]]
    assert colours(splits.test.tensors[0], "gtsrb") == [[0, 0, 1]]


def test_gtsrb_as_torchvision_lays_it_out(tmp_path: Path) -> None:
    write_gtsrb(tmp_path / "gtsrb", "GTSRB/Training")
    assert len(load_data(DataSettings(name="gtsrb", root=str(tmp_path), size=16)).train) == 2


def test_wrong_gtsrb(tmp_path: Path) -> None:
    write_gtsrb(tmp_path)
    table = tmp_path / "GT-final_test.csv"
    table.write_text(f"{HEADER}00000.ppm;30;20;5;4;30;15;42\n")
    with pytest.raises(InputError, match=r"box \(5, 4, 31, 16\) is not inside the image of 30x20"):
        load_data(DataSettings(name="gtsrb", root=str(tmp_path)))
    table.write_text("Filename;ClassId\n00000.ppm;1\n")
    with pytest.raises(InputError, match="is no table of GTSRB's"):
        load_data(DataSettings(name="gtsrb", root=str(tmp_path)))
    table.unlink()
    with pytest.raises(InputError, match=r"GT-final_test.csv is not in root="):
        load_data(DataSettings(name="gtsrb", root=str(tmp_path)))


@pytest.mark.parametrize("test", ["test", "val"])
def test_image_folders(tmp_path: Path, test: str) -> None:
    save(tmp_path / "train" / "cat" / "b.png", (255, 0, 0))
    save(tmp_path / "train" / "cat" / "a.bmp", (0, 255, 0), (7, 90))
    save(tmp_path / "train" / "ant" / "x.ppm", (0, 0, 255))
    (tmp_path / "train" / "cat" / "notes.md").write_text("no image")
    save(tmp_path / test / "cat" / "t.png", (255, 255, 255))
    splits = load_data(DataSettings(name="image_folders", root=str(tmp_path), size=24))
    assert (splits.input_shape, splits.classes) == ((3, 24, 24), 2)
    assert splits.train.tensors[1].tolist() == [0, 1, 1]
    assert splits.test.tensors[1].tolist() == [1]
    assert colours(splits.train.tensors[0], "image_folders") == [[0, 0, 1], [0, 1, 0], [1, 0, 0]]
    save(tmp_path / test / "dog" / "t.png", (0, 0, 0))
    with pytest.raises(InputError, match=r"class 'dog' of .* is none of the training data's"):
        load_data(DataSettings(name="image_folders", root=str(tmp_path)))


def test_a_damaged_image_is_named(tmp_path: Path) -> None:
    for part in ("train", "test"):
        save(tmp_path / part / "a" / "1.png", (0, 0, 0))
    (tmp_path / "test" / "a" / "1.png").write_bytes(b"\x89PNG\r\n\x1a\ncut short")
    with pytest.raises(InputError, match=r"1\.png: cannot be read as an image"):
        load_data(DataSettings(name="image_folders", root=str(tmp_path)))


def test_text_folders_are_bytes(tmp_path: Path) -> None:
    for part, name, text in (("train", "neg/1", "bad"), ("train", "pos/1", "çok güzel"), ("test", "pos/9", "")):
        path = tmp_path / part / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    splits = load_data(DataSettings(name="text_folders", root=str(tmp_path), size=6))
    assert (splits.input_shape, splits.classes, splits.vocabulary) == ((6,), 2, 257)
    assert splits.train.tensors[0].tolist() == [[99, 98, 101, 0, 0, 0], [b + 1 for b in "çok güzel".encode()[:6]]]
    assert splits.test.tensors[0].tolist() == [[0] * 6]
    assert byte_tokens(b"\xff", 2).tolist() == [256, 0]


def test_token_ids(tmp_path: Path) -> None:
    path = tmp_path / "t.npz"
    arrays = {"x_train": np.arange(12).reshape(3, 4), "y_train": np.arange(3), "x_test": np.zeros((1, 4), int)}
    np.savez(path, **arrays, y_test=np.zeros(1, int))  # type: ignore[arg-type]
    splits = load_data(DataSettings(name="tokens", root=str(path)))
    assert splits.train.tensors[0].tolist() == np.arange(12).reshape(3, 4).tolist()
    assert (splits.input_shape, splits.classes, splits.vocabulary) == ((4,), 3, None)
    np.savez(path, **arrays)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="holds no array 'y_test'"):
        load_data(DataSettings(name="tokens", root=str(path)))
    np.savez(path, **{**arrays, "x_train": np.zeros((3, 4))}, y_test=np.zeros(1, int))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="token ids are whole numbers"):
        load_data(DataSettings(name="tokens", root=str(path)))
