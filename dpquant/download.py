"""Published data sets fetched by torchvision, where the user asks for it; nothing else downloads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dpquant.data import DataSettings
from emulation.errors import InputError

# data set -> torchvision's class and the arguments of its parts; `load_data` finds the files where it puts them
_PARTS: Mapping[str, tuple[str, tuple[Mapping[str, Any], ...]]] = {
    "mnist": ("MNIST", ({"train": True},)),
    "fashion_mnist": ("FashionMNIST", ({"train": True},)),
    "emnist": ("EMNIST", ({"split": "balanced", "train": True},)),
    "cifar10": ("CIFAR10", ({"train": True},)),
    "cifar100": ("CIFAR100", ({"train": True},)),
    "gtsrb": ("GTSRB", ({"split": "train"}, {"split": "test"})),
}


def download(settings: DataSettings) -> None:
    """Has torchvision put a data set's files into ``settings.root``, unless they are there.

    Raises:
        InputError: no root, a data set that torchvision does not fetch, torchvision missing, or a failed download.
    """
    if settings.name not in _PARTS:
        raise InputError(f"--download does not fetch data set {settings.name!r}", hint=f"it does: {', '.join(_PARTS)}")
    if settings.root is None:
        raise InputError("--download needs data.root: where to put the files", hint="--data-root data")
    try:
        from torchvision import datasets
    except (ImportError, OSError, RuntimeError) as error:  # its kernels refuse a torch that is not theirs
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"--download needs torchvision ({said})", hint="pip install torchvision") from error
    name, parts = _PARTS[settings.name]
    try:
        for part in parts:
            getattr(datasets, name)(settings.root, download=True, **part)
    except (OSError, RuntimeError) as error:
        raise InputError(f"{settings.name} could not be downloaded: {error}") from error
