"""Data sets that lie in folders, read as arrays: an image or a text per file, a folder per class, and GTSRB."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dpquant import datafiles
from emulation.errors import InputError

Labelled = tuple[npt.NDArray[Any], npt.NDArray[np.int64]]

_IMAGES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".gif", ".webp")
_TESTS = ("test", "val", "validation")


def read_image_folders(root: Path, size: int) -> tuple[Labelled, Labelled]:
    """Images [N, 3, size, size] and labels of ``root/train/CLASS/*`` and of ``root/test`` (or ``val``) alike.

    Classes are numbered in the order of their names.

    Raises:
        InputError: a part or its images are missing, a class is not among the training data's, an unreadable image.
    """
    return _by_class(root, _IMAGES, lambda paths: datafiles.decode_images(paths, size))


def read_text_folders(root: Path, length: int) -> tuple[Labelled, Labelled]:
    """Token ids [N, length] and labels of ``root/train/CLASS/*.txt`` and ``root/test/CLASS/*.txt``.

    Tokens are the text's first bytes plus one; what is missing at its end is 0.

    Raises:
        InputError: a part or its texts are missing, a class is not among the training data's.
    """

    def read(paths: Sequence[Path]) -> npt.NDArray[Any]:
        return np.stack([byte_tokens(path.read_bytes(), length) for path in paths])

    return _by_class(root, (".txt",), read)


def byte_tokens(text: bytes, length: int) -> npt.NDArray[np.int64]:
    """The first ``length`` bytes plus one, zeros after the text's end."""
    tokens = np.zeros(length, np.int64)
    start = np.frombuffer(text[:length], np.uint8).astype(np.int64) + 1
    tokens[: len(start)] = start
    return tokens


def read_gtsrb(root: Path, size: int) -> tuple[Labelled, Labelled]:
    """GTSRB's images [N, 3, size, size], cut to their signs, and labels, in either of its published layouts.

    Training: ``Final_Training/Images/00000/*.ppm`` with a ``GT-00000.csv`` each, or ``Training/00000/*.ppm``. Test:
    ``Final_Test/Images/*.ppm``, whose classes are in ``GT-final_test.csv``, there, above, or in ``root``.

    Raises:
        InputError: a part is missing, a table without its columns, an unreadable image.
    """
    folders = (root, root / "GTSRB", root / "gtsrb", root / "gtsrb" / "GTSRB")
    training = _first([f / part for f in folders for part in ("Final_Training/Images", "Training")], root)
    test = _first([f / "Final_Test" / "Images" for f in folders], root)
    tables = [folder / "GT-final_test.csv" for folder in (test, test.parent, *folders)]
    rows: list[tuple[Path, int, _Box]] = []
    for folder in sorted(f for f in training.iterdir() if f.is_dir() and f.name.isdigit()):
        rows += _sign_rows(folder, folder / f"GT-{folder.name}.csv")
    test_rows = _sign_rows(test, _first(tables, root))
    if not rows or not test_rows:
        raise InputError(f"data set 'gtsrb': no images in '{test if rows else training}'")
    return _signs(rows, size), _signs(test_rows, size)


_Box = tuple[int, int, int, int]


def _sign_rows(folder: Path, table: Path) -> list[tuple[Path, int, _Box]]:
    """Every image of a folder by its table: path, class, and the box its sign is in."""
    try:
        with table.open(encoding="utf-8", newline="") as stream:
            found = list(csv.DictReader(stream, delimiter=";"))
        return [
            (
                folder / row["Filename"],
                int(row["ClassId"]),
                (int(row["Roi.X1"]), int(row["Roi.Y1"]), int(row["Roi.X2"]) + 1, int(row["Roi.Y2"]) + 1),
            )
            for row in found
        ]
    except (KeyError, TypeError, ValueError) as error:
        columns = "Filename, Roi.X1, Roi.Y1, Roi.X2, Roi.Y2, ClassId"
        raise InputError(f"is no table of GTSRB's ({error})", hint=f"columns {columns}", file=table) from error
    except OSError as error:
        raise InputError("cannot be read", hint="it comes with GTSRB's images", file=table) from error


def _signs(rows: Sequence[tuple[Path, int, _Box]], size: int) -> Labelled:
    images = datafiles.decode_images([path for path, _, _ in rows], size, [box for _, _, box in rows])
    return images, np.array([label for _, label, _ in rows], np.int64)


def _first(candidates: Sequence[Path], root: Path) -> Path:
    found = next((path for path in candidates if path.exists()), None)
    if found is None:
        raise InputError(f"data set 'gtsrb': {candidates[0].name} is not in root='{root}'")
    return found


def _by_class(
    root: Path, endings: Sequence[str], read: Callable[[Sequence[Path]], npt.NDArray[Any]]
) -> tuple[Labelled, Labelled]:
    train = root / "train"
    test = next((root / name for name in _TESTS if (root / name).is_dir()), root / _TESTS[0])
    for part in (train, test):
        if not part.is_dir():
            raise InputError(f"folder {part.name!r} is not in root='{root}'")
    classes = sorted(folder.name for folder in train.iterdir() if folder.is_dir() and _files(folder, endings))
    found = []
    for part in (train, test):
        folders = sorted(folder for folder in part.iterdir() if folder.is_dir())
        files = [(path, folder.name) for folder in folders for path in _files(folder, endings)]
        if not files:
            raise InputError(f"no {' or '.join(endings)} files in folders of '{part}'")
        if unknown := [name for _, name in files if name not in classes]:
            raise InputError(f"class {unknown[0]!r} of '{part}' is none of the training data's")
        labels = np.array([classes.index(name) for _, name in files], np.int64)
        found.append((read([path for path, _ in files]), labels))
    return found[0], found[1]


def _files(folder: Path, endings: Sequence[str]) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in endings)
