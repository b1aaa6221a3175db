"""Data sets as tensors: read from their published files, standardised by public constants, checked."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import TensorDataset

from dpquant import datafiles, datafolders
from emulation.errors import InputError, suggestion

Arrays = tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]
"""Training images [N, C, H, W] and labels [N], test images and labels."""


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Which data set, and where its files lie.

    Args:
        name: a name of `DATASETS`.
        root: the folder of its files, or one file; None for what ships with the package, or where Debian puts it.
        split: EMNIST's part (``balanced``, ``letters``, ``digits``, ``mnist``, ``bymerge``, ``byclass``).
        size: pixels of a side that images in folders are resized to (default 32), or bytes of a text (default 128).
    """

    name: str
    root: str | None = None
    split: str | None = None
    size: int | None = None


@dataclass(frozen=True, kw_only=True)
class Splits:
    """Training and test data, each of (image float32 [C, H, W] or token ids int64 [T], label int64) pairs."""

    train: TensorDataset
    test: TensorDataset
    classes: int
    vocabulary: int | None = None
    """How many token ids there are, where the data set's form says it."""

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one image, [C, H, W], or of one sequence, [T]."""
        return tuple(self.train.tensors[0].shape[1:])


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """How one data set is read and scaled.

    ``mean`` and ``std`` (per channel, of pixels scaled to [0, 1]) are figures published with or long used for the data
    set, never computed from the data at hand: a statistic of private data would itself need privacy.
    """

    read: Callable[[DataSettings, Path], Arrays]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    pixel_max: float
    classes: int | None
    """None where the labels themselves say it (``npz``, EMNIST)."""
    default_root: str | None
    how_to_get: str
    tokens: bool = False
    """Whether it holds token ids, which nothing scales."""
    vocabulary: int | None = None
    """Of token ids, how many there are; None: the model is told."""


def data_source(name: str) -> DataSource:
    """Where a data set comes from.

    Raises:
        InputError: a name that is none of ``DATASETS``.
    """
    if name not in DATASETS:
        raise InputError(f"unknown data set name={name!r}", hint=suggestion(name, DATASETS))
    return DATASETS[name]


def load_data(settings: DataSettings) -> Splits:
    """Read, check and standardise a data set.

    Raises:
        InputError: unknown data set, missing files (with how to get them), a damaged file, NaN or infinity in the
            images, labels out of range.
    """
    source = data_source(settings.name)
    where = settings.root if settings.root is not None else source.default_root
    if where is None:
        raise InputError(f"data set {settings.name!r} needs root: where its files lie", hint=source.how_to_get)
    root = Path(where).expanduser()
    if source.read is not _read_digits and not root.exists():
        raise InputError(f"data set {settings.name!r}: root='{root}' does not exist", hint=source.how_to_get)
    arrays = source.read(settings, root)
    labels = np.concatenate([arrays[1].ravel(), arrays[3].ravel()])
    classes = source.classes if source.classes is not None else int(labels.max(initial=0)) + 1
    train = _tensors(arrays[0], arrays[1], source, classes, f"{settings.name} training data")
    test = _tensors(arrays[2], arrays[3], source, classes, f"{settings.name} test data")
    return Splits(train=train, test=test, classes=classes, vocabulary=source.vocabulary)


def _tensors(
    inputs: npt.NDArray[Any], labels: npt.NDArray[Any], source: DataSource, classes: int, what: str
) -> TensorDataset:
    """One part, checked and standardised."""
    kind = "sequences" if source.tokens else "images"
    if inputs.ndim != (2 if source.tokens else 4) or labels.ndim != 1 or len(inputs) != len(labels):
        raise InputError(f"{what}: {kind} of shape {list(inputs.shape)} do not go with labels {list(labels.shape)}")
    if len(inputs) == 0:
        raise InputError(f"{what}: holds no {kind}")
    if not np.issubdtype(labels.dtype, np.integer):
        raise InputError(f"{what}: labels are {labels.dtype}, not integers")
    if labels.min() < 0 or labels.max() >= classes:
        found = int(labels.min() if labels.min() < 0 else labels.max())
        raise InputError(f"{what}: label {found} is outside 0 to {classes - 1}")
    data = _token_ids(inputs, what) if source.tokens else _standardised(inputs, source, what)
    return TensorDataset(data, torch.from_numpy(labels.astype(np.int64)))


def _token_ids(inputs: npt.NDArray[Any], what: str) -> torch.Tensor:
    if not np.issubdtype(inputs.dtype, np.integer) or inputs.min() < 0:
        raise InputError(f"{what}: token ids are whole numbers from 0", hint=f"and these are {inputs.dtype}")
    return torch.from_numpy(inputs.astype(np.int64))


def _standardised(images: npt.NDArray[Any], source: DataSource, what: str) -> torch.Tensor:
    if not (np.issubdtype(images.dtype, np.integer) or np.issubdtype(images.dtype, np.floating)):
        raise InputError(f"{what}: images are {images.dtype}, not numbers")
    pixels = torch.from_numpy(np.ascontiguousarray(images).astype(np.float32))
    if not bool(torch.isfinite(pixels).all()):
        bad = int((~torch.isfinite(pixels)).flatten(1).any(1).nonzero()[0])
        raise InputError(f"{what}: image {bad} holds NaN or infinity", hint="remove or repair it before training")
    channels = images.shape[1]
    mean, std = (torch.tensor(t if len(t) == channels else t[:1]).view(1, -1, 1, 1) for t in (source.mean, source.std))
    scale = 1.0 if np.issubdtype(images.dtype, np.floating) else source.pixel_max
    return pixels.div_(scale).sub_(mean).div_(std)


def _read_digits(settings: DataSettings, root: Path) -> Arrays:
    """The 1,797 UCI digits inside the package; the last 297 in the file's order are the test part."""
    packed = files("dpquant").joinpath("digits.csv.gz").read_bytes()
    rows = np.loadtxt(gzip.decompress(packed).decode().splitlines(), delimiter=",", dtype=np.uint8)
    images, labels = rows[:, :64].reshape(-1, 1, 8, 8), rows[:, 64]
    return images[:1500], labels[:1500], images[1500:], labels[1500:]


def _read_mnist(settings: DataSettings, root: Path) -> Arrays:
    """MNIST's and Fashion-MNIST's four IDX files."""
    train = _read_idx_pair(settings, root, "train")
    return (*train, *_read_idx_pair(settings, root, "t10k"))


def _read_emnist(settings: DataSettings, root: Path) -> Arrays:
    """EMNIST's IDX files of one split; its images are stored transposed, the labels of ``letters`` start at 1."""
    split = settings.split or "balanced"
    allowed = ("balanced", "letters", "digits", "mnist", "bymerge", "byclass")
    if split not in allowed:
        raise InputError(f"unknown EMNIST split={split!r}", hint=suggestion(split, allowed))
    first = 1 if split == "letters" else 0
    parts: list[npt.NDArray[Any]] = []
    for part in ("train", "test"):
        images, labels = _read_idx_pair(settings, root, f"emnist-{split}-{part}")
        parts += [images.transpose(0, 1, 3, 2), labels.astype(np.int64) - first]
    return parts[0], parts[1], parts[2], parts[3]


_TORCHVISION = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "emnist": "EMNIST"}


def _read_idx_pair(settings: DataSettings, root: Path, prefix: str) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    arrays = []
    for kind, digit, dims in (("images", 3, 3), ("labels", 1, 1)):
        name = f"{prefix}-{kind}-idx{digit}-ubyte"
        path = datafiles.find_file(root, name, f"{prefix}-{kind}.idx{digit}-ubyte")
        downloaded = root / _TORCHVISION[settings.name] / "raw"
        path = path or datafiles.find_file(downloaded, name)
        if path is None:
            message = f"data set {settings.name!r}: {name} (or .gz) is not in root='{root}'"
            raise InputError(message, hint=DATASETS[settings.name].how_to_get)
        array = datafiles.read_idx(path)
        if array.ndim != dims:
            raise InputError(f"holds {array.ndim} dimensions where {kind} have {dims}", file=path)
        arrays.append(array)
    if len(arrays[0]) != len(arrays[1]):
        message = f"holds {len(arrays[0]):,} {prefix} images but {len(arrays[1]):,} labels"
        raise InputError(message, hint="do the files belong together?", file=root)
    return arrays[0][:, None], arrays[1]


def _read_cifar(settings: DataSettings, root: Path) -> Arrays:
    """CIFAR-10 or -100: a folder or archive of binary or Python batches, or an ``.npz``."""
    if root.suffix == ".npz":
        return _read_npz(settings, root)
    ten = settings.name == "cifar10"
    train_names = tuple(f"data_batch_{i}" for i in range(1, 6)) if ten else ("train",)
    test_name = "test_batch" if ten else "test"
    label_bytes = 1 if ten else 2
    names = (*train_names, test_name)
    batches: dict[str, tuple[npt.NDArray[Any], npt.NDArray[Any]]] = {}
    for name, (content, path) in _cifar_batches(settings, root, names).items():
        stem = name.removesuffix(".bin")
        if name.endswith(".bin"):
            batches[stem] = datafiles.read_cifar_binary(content, path, label_bytes)
        else:
            batches[stem] = datafiles.read_cifar_python(content, path)
    if missing := [name for name in names if name not in batches]:
        message = f"data set {settings.name!r}: batch {missing[0]!r} is not in root='{root}'"
        raise InputError(message, hint=DATASETS[settings.name].how_to_get)
    images = np.concatenate([batches[n][0] for n in train_names])
    labels = np.concatenate([batches[n][1] for n in train_names])
    return images, labels, *batches[test_name]


def _cifar_batches(settings: DataSettings, root: Path, names: tuple[str, ...]) -> dict[str, tuple[bytes, Path]]:
    """The bytes of each batch and the file they came from, whichever of the published forms is there."""
    wanted = (*names, *(f"{n}.bin" for n in names))
    stem, inner = ("cifar-10", "cifar-10-batches") if settings.name == "cifar10" else ("cifar-100", "cifar-100")
    if root.is_file():
        return {n: (content, root) for n, content in datafiles.read_members(root, wanted).items()}
    for folder in (
        root,
        root / f"{inner}-bin",
        root / f"{inner}-binary",
        root / f"{inner}-py",
        root / f"{inner}-python",
    ):
        found = {n: (datafiles.read_bytes(folder / n), folder / n) for n in wanted if (folder / n).is_file()}
        if found:
            return found
    for archive in (root / f"{stem}-binary.tar.gz", root / f"{stem}-python.tar.gz"):
        if archive.is_file():
            return {n: (content, archive) for n, content in datafiles.read_members(archive, wanted).items()}
    return {}


def _read_npz(settings: DataSettings, root: Path) -> Arrays:
    """An ``.npz`` in one of three forms.

    ``x_train, y_train, x_test, y_test``; or ``images, labels, is_test``; or ``jpeg, offsets, labels, is_test``. Images
    are [N, C, H, W], [N, H, W, C] (C of 1 or 3) or [N, H, W].
    """
    arrays = datafiles.read_npz(root)
    if {"x_train", "y_train", "x_test", "y_test"} <= set(arrays):
        parts = [arrays[n] for n in ("x_train", "y_train", "x_test", "y_test")]
        return _channels_first(parts[0], root), parts[1].ravel(), _channels_first(parts[2], root), parts[3].ravel()
    if "jpeg" in arrays and "offsets" in arrays:
        arrays["images"] = datafiles.decode_jpegs(arrays["jpeg"], arrays["offsets"], root)
    if not {"images", "labels", "is_test"} <= set(arrays):
        message = f"holds the arrays {', '.join(sorted(arrays))}, which is no form known here"
        hint = "x_train, y_train, x_test, y_test; or images, labels, is_test; or jpeg, offsets, labels, is_test"
        raise InputError(message, hint=hint, file=root)
    images, labels, is_test = _channels_first(arrays["images"], root), arrays["labels"], arrays["is_test"].astype(bool)
    if not len(images) == len(labels) == len(is_test):
        message = f"holds {len(images)} images, {len(labels)} labels and {len(is_test)} is_test marks"
        raise InputError(message, file=root)
    return images[~is_test], labels[~is_test], images[is_test], labels[is_test]


def _channels_first(images: npt.NDArray[Any], path: Path) -> npt.NDArray[Any]:
    if images.ndim == 3:
        return images[:, None]
    if images.ndim == 4 and images.shape[1] not in (1, 3) and images.shape[3] in (1, 3):
        return images.transpose(0, 3, 1, 2)
    if images.ndim == 4:
        return images
    raise InputError(f"images have shape {list(images.shape)}", hint="[N, C, H, W] was expected", file=path)


def _read_tokens(settings: DataSettings, root: Path) -> Arrays:
    """An ``.npz`` of token ids ``x_train``, ``x_test`` [N, T] and labels ``y_train``, ``y_test``."""
    arrays = datafiles.read_npz(root)
    names = ("x_train", "y_train", "x_test", "y_test")
    if missing := [name for name in names if name not in arrays]:
        raise InputError(f"holds no array {missing[0]!r}", hint=", ".join(names), file=root)
    return arrays["x_train"], arrays["y_train"].ravel(), arrays["x_test"], arrays["y_test"].ravel()


def _read_folders(
    read: Callable[[Path, int], tuple[datafolders.Labelled, datafolders.Labelled]], size: int
) -> Callable[[DataSettings, Path], Arrays]:
    """A reader of folders whose images are of ``size`` where the settings say nothing, or whose texts are."""

    def arrays(settings: DataSettings, root: Path) -> Arrays:
        try:
            train, test = read(root, size if settings.size is None else settings.size)
        except InputError as error:
            if error.hint is not None or error.file is not None:
                raise
            raise InputError(error.message, hint=DATASETS[settings.name].how_to_get) from error
        return *train, *test

    return arrays


_CIFAR_GET = "get {0} from https://www.cs.toronto.edu/~kriz/cifar.html and set data.root to the folder it lies in"

DATASETS: Mapping[str, DataSource] = {
    "digits": DataSource(
        read=_read_digits,
        mean=(0.3,),
        std=(0.4,),  # round figures: nothing is published for this set
        pixel_max=16.0,
        classes=10,
        default_root="",
        how_to_get="it ships with the package",
    ),
    "mnist": DataSource(
        read=_read_mnist,
        mean=(0.1307,),
        std=(0.3081,),
        pixel_max=255.0,
        classes=10,
        default_root=None,
        how_to_get="get the four files train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz, t10k-... of MNIST and "
        "set data.root to their folder",
    ),
    "fashion_mnist": DataSource(
        read=_read_mnist,
        mean=(0.2860,),
        std=(0.3530,),
        pixel_max=255.0,
        classes=10,
        default_root="/usr/share/datasets/fashion-mnist",
        how_to_get="on Debian: apt-get install dataset-fashion-mnist; elsewhere get the four files from "
        "https://github.com/zalandoresearch/fashion-mnist and set data.root to their folder",
    ),
    "emnist": DataSource(
        read=_read_emnist,
        mean=(0.1736,),
        std=(0.3317,),
        pixel_max=255.0,
        classes=None,
        default_root=None,
        how_to_get="get gzip.zip from https://www.nist.gov/itl/products-and-services/emnist-dataset, unpack it and set "
        "data.root to its folder",
    ),
    "cifar10": DataSource(
        read=_read_cifar,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
        pixel_max=255.0,
        classes=10,
        default_root=None,
        how_to_get=_CIFAR_GET.format("cifar-10-binary.tar.gz or cifar-10-python.tar.gz"),
    ),
    "cifar100": DataSource(
        read=_read_cifar,
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
        pixel_max=255.0,
        classes=100,
        default_root=None,
        how_to_get=_CIFAR_GET.format("cifar-100-binary.tar.gz or cifar-100-python.tar.gz"),
    ),
    "gtsrb": DataSource(
        read=_read_folders(datafolders.read_gtsrb, 32),
        mean=(0.3403, 0.3121, 0.3214),
        std=(0.2724, 0.2608, 0.2669),
        pixel_max=255.0,
        classes=43,
        default_root=None,
        how_to_get="get GTSRB_Final_Training_Images.zip, GTSRB_Final_Test_Images.zip and GTSRB_Final_Test_GT.zip of "
        "GTSRB, unpack them and set data.root to their folder",
    ),
    "image_folders": DataSource(
        read=_read_folders(datafolders.read_image_folders, 32),
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),  # of ImageNet, as for such folders usual
        pixel_max=255.0,
        classes=None,
        default_root=None,
        how_to_get="set data.root to a folder of train/CLASS/IMAGE and test/CLASS/IMAGE",
    ),
    "text_folders": DataSource(
        read=_read_folders(datafolders.read_text_folders, 128),
        mean=(),
        std=(),
        pixel_max=0.0,
        classes=None,
        default_root=None,
        how_to_get="set data.root to a folder of train/CLASS/NAME.txt and test/CLASS/NAME.txt",
        tokens=True,
        vocabulary=257,
    ),
    "tokens": DataSource(
        read=_read_tokens,
        mean=(),
        std=(),
        pixel_max=0.0,
        classes=None,
        default_root=None,
        how_to_get="set data.root to an .npz file of token ids x_train, x_test and labels y_train, y_test",
        tokens=True,
    ),
    "npz": DataSource(
        read=_read_npz,
        mean=(0.5,),
        std=(0.5,),
        pixel_max=255.0,
        classes=None,
        default_root=None,
        how_to_get="set data.root to an .npz file of x_train, y_train, x_test, y_test",
    ),
}
