"""Data sets: each published form read from tiny files, and every kind of damage named in one line."""

import gzip
import io
import pickle
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dpquant.data import DATASETS, DataSettings, Splits, load_data
from emulation.errors import InputError

RNG = np.random.default_rng(0)


def idx(array: np.ndarray, kind: int = 8) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, kind, array.ndim, *array.shape) + array.tobytes()


def images(count: int, *shape: int) -> np.ndarray:
    return RNG.integers(0, 256, (count, *shape), dtype=np.uint8)


def write_mnist(folder: Path, *, packed: bool = False, prefixes: tuple[str, str] = ("train", "t10k")) -> np.ndarray:
    first = images(6, 28, 28)
    for prefix, array in zip(prefixes, (first, images(4, 28, 28)), strict=True):
        labels = np.arange(len(array), dtype=np.uint8) + 1
        for name, data in ((f"{prefix}-images-idx3-ubyte", array), (f"{prefix}-labels-idx1-ubyte", labels)):
            content = idx(data)
            path = folder / (name + ".gz" if packed else name)
            path.write_bytes(gzip.compress(content) if packed else content)
    return first


def pixels(splits: Splits) -> torch.Tensor:
    return splits.train.tensors[0]


def test_digits_ship_with_the_package() -> None:
    splits = load_data(DataSettings(name="digits"))
    assert splits.input_shape == (1, 8, 8)
    assert (len(splits.train), len(splits.test), splits.classes) == (1500, 297, 10)
    assert pixels(splits).dtype == torch.float32
    assert splits.train.tensors[1].dtype == torch.int64
    whole = torch.cat([splits.train.tensors[0], splits.test.tensors[0]]) * 0.4 + 0.3
    assert torch.allclose((whole * 16).round(), whole * 16, atol=1e-4)
    assert int((whole * 16).round().max()) == 16
    assert torch.bincount(splits.test.tensors[1]).min() > 20


def test_digits_are_scikit_learns() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    theirs = datasets.load_digits()
    splits = load_data(DataSettings(name="digits"))
    ours = torch.cat([splits.train.tensors[0], splits.test.tensors[0]])
    assert torch.allclose(ours[:, 0] * 0.4 + 0.3, torch.from_numpy(theirs.images / 16).float(), atol=1e-6)
    assert torch.cat([splits.train.tensors[1], splits.test.tensors[1]]).tolist() == theirs.target.tolist()


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
@pytest.mark.parametrize("packed", [False, True])
def test_idx_files(tmp_path: Path, name: str, packed: bool) -> None:
    raw = write_mnist(tmp_path, packed=packed)
    splits = load_data(DataSettings(name=name, root=str(tmp_path)))
    assert splits.input_shape == (1, 28, 28)
    source = DATASETS[name]
    expected = (raw.astype(np.float32) / 255 - source.mean[0]) / source.std[0]
    assert np.allclose(pixels(splits)[:, 0].numpy(), expected, atol=1e-5)
    assert splits.train.tensors[1].tolist() == [1, 2, 3, 4, 5, 6]
    assert splits.test.tensors[1].tolist() == [1, 2, 3, 4]


def test_emnist_is_turned_upright_and_letters_start_at_zero(tmp_path: Path) -> None:
    raw = write_mnist(tmp_path, packed=True, prefixes=("emnist-letters-train", "emnist-letters-test"))
    splits = load_data(DataSettings(name="emnist", root=str(tmp_path), split="letters"))
    expected = (raw.astype(np.float32).transpose(0, 2, 1) / 255 - 0.1736) / 0.3317
    assert np.allclose(pixels(splits)[:, 0].numpy(), expected, atol=1e-5)
    assert splits.train.tensors[1].tolist() == [0, 1, 2, 3, 4, 5]
    with pytest.raises(InputError, match="split='leters'") as caught:
        load_data(DataSettings(name="emnist", root=str(tmp_path), split="leters"))
    assert "letters" in str(caught.value.hint)


def cifar_rows(name: str, count: int) -> tuple[np.ndarray, np.ndarray, bytes, bytes]:
    """Images, labels, and one batch in the binary and in the Python form."""
    batch, labels = images(count, 3, 32, 32), np.arange(count, dtype=np.uint8)
    flat = batch.reshape(count, 3072)
    if name == "cifar10":
        columns = [labels[:, None]]
        content: dict[bytes, Any] = {b"data": flat, b"labels": labels.tolist()}
    else:
        columns = [labels[:, None] // 5, labels[:, None]]
        content = {b"data": flat, b"fine_labels": labels.tolist(), b"coarse_labels": (labels // 5).tolist()}
    return batch, labels, np.concatenate([*columns, flat], 1).tobytes(), pickle.dumps(content, protocol=2)


@pytest.mark.parametrize("archive", [False, True])
@pytest.mark.parametrize("form", ["bin", "py"])
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar(tmp_path: Path, name: str, form: str, archive: bool) -> None:
    ten = name == "cifar10"
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"] if ten else ["train", "test"]
    folder = tmp_path / ("cifar-10-batches-bin" if ten else "cifar-100-binary")
    folder = folder if form == "bin" else tmp_path / ("cifar-10-batches-py" if ten else "cifar-100-python")
    folder.mkdir()
    rows = {n: cifar_rows(name, 2) for n in names}
    for n, (_, _, binary, pickled) in rows.items():
        (folder / (f"{n}.bin" if form == "bin" else n)).write_bytes(binary if form == "bin" else pickled)
    root = tmp_path
    if archive:
        root = tmp_path / "archive"
        root.mkdir()
        stem = "cifar-10" if ten else "cifar-100"
        with tarfile.open(root / f"{stem}-{'binary' if form == 'bin' else 'python'}.tar.gz", "w:gz") as tar:
            tar.add(folder, arcname=folder.name)
    splits = load_data(DataSettings(name=name, root=str(root)))
    source = DATASETS[name]
    mean, std = (np.array(t, np.float32).reshape(3, 1, 1) for t in (source.mean, source.std))
    expected = (np.concatenate([rows[n][0] for n in names[:-1]]).astype(np.float32) / 255 - mean) / std
    assert np.allclose(pixels(splits).numpy(), expected, atol=1e-5)
    assert splits.train.tensors[1].tolist() == [0, 1] * (len(names) - 1)
    assert splits.test.tensors[1].tolist() == [0, 1]


def test_python_batch_runs_no_code(tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
            return eval, (f"open({str(tmp_path / 'owned')!r}, 'w')",)

    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        (tmp_path / name).write_bytes(pickle.dumps({b"data": Attack(), b"labels": []}, protocol=2))
    with pytest.raises(InputError, match=r"data_batch_1: is not a CIFAR batch \(it asks for .*eval\)"):
        load_data(DataSettings(name="cifar10", root=str(tmp_path)))
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("layout", ["NCHW", "NHWC", "NHW"])
def test_npz(tmp_path: Path, layout: str) -> None:
    raw = images(5, 3, 6, 6) if layout != "NHW" else images(5, 1, 6, 6)
    stored = {"NCHW": raw, "NHWC": raw.transpose(0, 2, 3, 1), "NHW": raw[:, 0]}[layout]
    path = tmp_path / "set.npz"
    np.savez(path, x_train=stored, y_train=np.arange(5)[:, None], x_test=stored[:2], y_test=np.arange(2))
    splits = load_data(DataSettings(name="npz", root=str(path)))
    assert np.allclose(pixels(splits).numpy(), (raw.astype(np.float32) / 255 - 0.5) / 0.5, atol=1e-6)
    assert splits.classes == 5


def test_npz_of_jpegs(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    raw = np.repeat(np.repeat(images(4, 4, 4, 3), 8, 1), 8, 2)
    files = []
    for array in raw:
        buffer = io.BytesIO()
        image.fromarray(array).save(buffer, "JPEG", quality=100, subsampling=0)
        files.append(buffer.getvalue())
    offsets = np.cumsum([0, *map(len, files)])
    arrays = {"jpeg": np.frombuffer(b"".join(files), np.uint8), "offsets": offsets}
    is_test = np.array([False, False, False, True])
    np.savez(tmp_path / "c.npz", **arrays, labels=np.arange(4, dtype=np.uint8), is_test=is_test)
    splits = load_data(DataSettings(name="cifar10", root=str(tmp_path / "c.npz")))
    assert splits.input_shape == (3, 32, 32)
    mean, std = (torch.tensor(t).view(3, 1, 1) for t in (DATASETS["cifar10"].mean, DATASETS["cifar10"].std))
    back = (pixels(splits) * std + mean) * 255
    assert (back - torch.from_numpy(raw[:3].transpose(0, 3, 1, 2).astype(np.float32))).abs().mean() < 3
    np.savez(tmp_path / "d.npz", **(arrays | {"offsets": offsets[:-1] + 3}), labels=np.arange(3), is_test=is_test[1:])
    with pytest.raises(InputError, match="image 0 cannot be read as JPEG"):
        load_data(DataSettings(name="cifar10", root=str(tmp_path / "d.npz")))


def change_idx(folder: Path, change: Callable[[bytes], bytes], name: str = "train-images-idx3-ubyte") -> None:
    (folder / name).write_bytes(change((folder / name).read_bytes()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b[:-1], r"train-images-idx3-ubyte: holds 4,703 bytes of data where its header says 4,704"),
        (lambda b: b + b"\0", "4,705 bytes"),
        (lambda b: b"\x89PNG" + b[4:], "magic=89504e47 is not that of an IDX file"),
        (lambda b: b[:9], "ends inside its header"),
        (lambda b: b"", "magic=nothing"),
        (lambda b: b"\0\0\x0d\x03" + b[4:], "magic=00000d03"),
        (lambda b: b"\0\0\x08\x03" + b"\xff" * 12, "header says"),
        (lambda b: idx(np.zeros((6, 784), np.uint8)), "holds 2 dimensions where images have 3"),
        (lambda b: idx(np.zeros((5, 28, 28), np.uint8)), "holds 5 train images but 6 labels"),
        (lambda b: idx(np.zeros((0, 28, 28), np.uint8)), "0 train images but 6 labels"),
    ],
)
def test_damaged_idx(tmp_path: Path, change: Callable[[bytes], bytes], message: str) -> None:
    write_mnist(tmp_path)
    change_idx(tmp_path, change)
    with pytest.raises(InputError, match=message) as caught:
        load_data(DataSettings(name="mnist", root=str(tmp_path)))
    assert "\n" not in str(caught.value)


def test_damaged_gzip(tmp_path: Path) -> None:
    write_mnist(tmp_path, packed=True)
    change_idx(tmp_path, lambda b: b[:-20], "train-images-idx3-ubyte.gz")
    with pytest.raises(InputError, match=r"train-images-idx3-ubyte\.gz: cannot be read"):
        load_data(DataSettings(name="mnist", root=str(tmp_path)))


def test_label_out_of_range(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    change_idx(tmp_path, lambda b: b[:-1] + b"\x0a", "t10k-labels-idx1-ubyte")
    with pytest.raises(InputError, match="mnist test data: label 10 is outside 0 to 9"):
        load_data(DataSettings(name="mnist", root=str(tmp_path)))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_in_the_data(tmp_path: Path, bad: float) -> None:
    data = RNG.random((5, 1, 4, 4)).astype(np.float32)
    data[3, 0, 1, 1] = bad
    labels = np.arange(5)
    np.savez(tmp_path / "x.npz", x_train=data, y_train=labels, x_test=data[:2], y_test=labels[:2])
    with pytest.raises(InputError, match="npz training data: image 3 holds NaN or infinity"):
        load_data(DataSettings(name="npz", root=str(tmp_path / "x.npz")))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"a": np.zeros(3)}, "holds the arrays a, which is no form known here"),
        ({"images": np.zeros((3, 1, 4, 4)), "labels": np.zeros(2, int), "is_test": np.zeros(3, bool)}, "3 images, 2"),
        ({"images": np.zeros((3, 4)), "labels": np.zeros(3, int), "is_test": np.zeros(3, bool)}, r"shape \[3, 4\]"),
        ({"images": np.zeros((3, 4, 4)), "labels": np.zeros(3), "is_test": np.eye(3)[0]}, "labels are float64"),
        ({"images": np.zeros((3, 4, 4)), "labels": np.zeros(3, int), "is_test": np.ones(3)}, "holds no images"),
        ({"images": np.zeros((3, 4, 4)), "labels": np.zeros(3, int) - 1, "is_test": np.eye(3)[0]}, "label -1 is out"),
        ({"images": np.zeros((3, 4, 4), "U1"), "labels": np.zeros(3, int), "is_test": np.eye(3)[0]}, "not numbers"),
        ({"images": np.array([object()]), "labels": np.zeros(1, int)}, "cannot be read as .npz"),
    ],
)
def test_wrong_npz(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    np.savez(tmp_path / "x.npz", **arrays)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=message):
        load_data(DataSettings(name="npz", root=str(tmp_path / "x.npz")))


@pytest.mark.parametrize("name", [n for n in DATASETS if n != "digits"])
def test_missing_files_say_how_to_get_them(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=r"root=.*does not exist") as caught:
        load_data(DataSettings(name=name, root=str(tmp_path / "none")))
    assert caught.value.hint == DATASETS[name].how_to_get
    if name in ("npz", "tokens"):
        return
    with pytest.raises(InputError, match="is not in root=") as caught:
        load_data(DataSettings(name=name, root=str(tmp_path)))
    assert caught.value.hint == DATASETS[name].how_to_get


def test_fashion_mnist_names_the_debian_package() -> None:
    assert "dataset-fashion-mnist" in DATASETS["fashion_mnist"].how_to_get


def test_unknown_data_set() -> None:
    with pytest.raises(InputError, match="name='digit'") as caught:
        load_data(DataSettings(name="digit"))
    assert "digits" in str(caught.value.hint)


def test_root_is_asked_for() -> None:
    with pytest.raises(InputError, match="'cifar10' needs root"):
        load_data(DataSettings(name="cifar10"))


@pytest.mark.parametrize("content", [b"", b"\x80\x02N.", b"garbage", b"\x80\x02}q\x00."])
def test_wrong_python_batch(tmp_path: Path, content: bytes) -> None:
    for name in ("train", "test"):
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match="train: is not a CIFAR batch"):
        load_data(DataSettings(name="cifar100", root=str(tmp_path)))


@pytest.mark.parametrize("content", [b"", b"x" * 3074])
def test_wrong_binary_batch(tmp_path: Path, content: bytes) -> None:
    for name in ("train.bin", "test.bin"):
        (tmp_path / name).write_bytes(content * 2 + b"x" if content else b"")
    with pytest.raises(InputError, match=r"train\.bin: holds .* no whole number"):
        load_data(DataSettings(name="cifar100", root=str(tmp_path)))


def test_wrong_archive(tmp_path: Path) -> None:
    (tmp_path / "cifar-10-binary.tar.gz").write_bytes(b"no archive")
    with pytest.raises(InputError, match="cannot be read as an archive"):
        load_data(DataSettings(name="cifar10", root=str(tmp_path)))
