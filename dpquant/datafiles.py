"""The published on-disk forms of data sets, read as arrays: IDX, CIFAR, npz, images. Nothing in a file is run."""

from __future__ import annotations

import codecs
import gzip
import io
import itertools
import pickle
import tarfile
import tokenize
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from emulation.errors import InputError

Bytes = npt.NDArray[np.uint8]
_DAMAGED = (
    OSError, EOFError, ValueError, KeyError, zlib.error, zipfile.BadZipFile, tarfile.TarError,
    SyntaxError, tokenize.TokenError,  # numpy reads the header of an array as Python
)  # fmt: skip


def find_file(root: Path, *names: str) -> Path | None:
    """The first of ``names``, plain or with ``.gz``, that lies in ``root``."""
    for name in names:
        for candidate in (root / name, root / f"{name}.gz"):
            if candidate.is_file():
                return candidate
    return None


def read_idx(path: Path) -> Bytes:
    """The array of unsigned bytes in an IDX file (gzip or not), in its own shape.

    Raises:
        InputError: unreadable, no IDX of unsigned bytes, or fewer or more bytes than its header says.
    """
    data = read_bytes(path)
    if len(data) < 4 or data[:2] != b"\0\0" or data[2] != 8 or not 1 <= data[3] <= 4:
        found = data[:4].hex() or "nothing"
        raise InputError(
            f"magic={found} is not that of an IDX file of unsigned bytes", hint="0000080N was expected", file=path
        )
    header = 4 + 4 * data[3]
    if len(data) < header:
        raise InputError("ends inside its header", hint="get the file again", file=path)
    shape = [int(n) for n in np.frombuffer(data, ">u4", count=data[3], offset=4)]
    expected = int(np.prod(shape, dtype=object))
    if len(data) - header != expected:
        message = f"holds {len(data) - header:,} bytes of data where its header says {expected:,} (shape={shape})"
        raise InputError(message, hint="it is cut short or damaged: get it again", file=path)
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


def read_cifar_binary(data: bytes, path: Path, label_bytes: int) -> tuple[Bytes, Bytes]:
    """Images [N, 3, 32, 32] and labels [N] of a binary CIFAR batch; of several label bytes the last (finest) counts."""
    row = label_bytes + 3072
    if not data or len(data) % row:
        raise InputError(f"holds {len(data):,} bytes, which is no whole number of {row}-byte images", file=path)
    table = np.frombuffer(data, np.uint8).reshape(-1, row)
    return table[:, label_bytes:].reshape(-1, 3, 32, 32), table[:, label_bytes - 1]


def read_cifar_python(data: bytes, path: Path) -> tuple[Bytes, Bytes]:
    """Images [N, 3, 32, 32] and labels [N] of a pickled CIFAR batch, unpickled as plain data only."""
    try:
        batch = _PlainUnpickler(io.BytesIO(data), encoding="bytes").load()
        images = np.asarray(batch[b"data"], np.uint8).reshape(-1, 3, 32, 32)
        labels = np.asarray(batch[b"fine_labels" if b"fine_labels" in batch else b"labels"], np.uint8)
    except (pickle.UnpicklingError, AttributeError, IndexError, TypeError, ImportError, *_DAMAGED) as error:
        raise InputError(f"is not a CIFAR batch ({_one_line(error)})", file=path) from error
    if len(images) != len(labels):
        raise InputError(f"holds {len(images)} images but {len(labels)} labels", file=path)
    return images, labels


def read_members(path: Path, names: tuple[str, ...]) -> dict[str, bytes]:
    """The wanted files (by base name) inside a tar archive, read without unpacking anything."""
    found = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                stream = archive.extractfile(member) if member.isfile() else None
                if stream is not None and Path(member.name).name in names:
                    found[Path(member.name).name] = stream.read()
    except _DAMAGED as error:
        raise InputError(f"cannot be read as an archive ({_one_line(error)})", file=path) from error
    return found


def read_npz(path: Path) -> dict[str, npt.NDArray[Any]]:
    """Every array of an ``.npz`` file, none of them pickled objects."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (TypeError, AttributeError, *_DAMAGED) as error:
        raise InputError(f"cannot be read as .npz ({_one_line(error)})", file=path) from error


def decode_jpegs(data: Bytes, offsets: npt.NDArray[np.int64], path: Path) -> Bytes:
    """Images [N, 3, H, W] from JPEG files laid end to end, ``offsets`` [N + 1] between them."""
    try:
        from PIL import Image
    except ImportError as error:
        hint = 'install it with: pip install "dpquant[vision]"'
        raise InputError("holds JPEG images, which need Pillow", hint=hint, file=path) from error
    raw = data.tobytes()
    images = []
    try:
        for start, end in itertools.pairwise(offsets):
            with Image.open(io.BytesIO(raw[int(start) : int(end)])) as image:
                images.append(np.asarray(image.convert("RGB")))
        return np.ascontiguousarray(np.stack(images).transpose(0, 3, 1, 2))
    except _DAMAGED as error:
        raise InputError(f"image {len(images)} cannot be read as JPEG ({_one_line(error)})", file=path) from error


def decode_images(paths: Sequence[Path], size: int, boxes: Sequence[tuple[int, int, int, int]] | None = None) -> Bytes:
    """Images [N, 3, size, size] of image files, cut to their boxes (left, top, right, bottom), and resized."""
    try:
        from PIL import Image
    except ImportError as error:
        hint = 'install it with: pip install "dpquant[vision]"'
        raise InputError("images in folders need Pillow", hint=hint) from error
    images = np.empty((len(paths), 3, size, size), np.uint8)
    for index, path in enumerate(paths):
        try:
            with Image.open(path) as image:
                whole = image.convert("RGB")
        except (SyntaxError, *_DAMAGED) as error:
            raise InputError(f"cannot be read as an image ({_one_line(error)})", file=path) from error
        box = None if boxes is None else boxes[index]
        if box is not None and not (0 <= box[0] < box[2] <= whole.width and 0 <= box[1] < box[3] <= whole.height):
            raise InputError(f"box {box} is not inside the image of {whole.width}x{whole.height}", file=path)
        whole = whole if box is None else whole.crop(box)  # resize(box=...) would blend what is around it in
        images[index] = np.asarray(whole.resize((size, size), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    return images


def read_bytes(path: Path) -> bytes:
    """A whole file, unpacked where its name ends in ``.gz``."""
    try:
        return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except FileNotFoundError as error:
        raise InputError("does not exist", file=path) from error
    except _DAMAGED as error:
        raise InputError(f"cannot be read ({_one_line(error)})", hint="get the file again", file=path) from error


class _PlainUnpickler(pickle.Unpickler):
    """Builds containers, numbers, strings and NumPy arrays; every other name in the file is refused."""

    def find_class(self, module: str, name: str) -> object:
        if (module, name) == ("_codecs", "encode"):
            return codecs.encode
        if module in ("numpy", "numpy.core.multiarray", "numpy._core.multiarray"):
            arrays = {"ndarray": np.ndarray, "dtype": np.dtype, "_reconstruct": np.zeros(0).__reduce__()[0]}
            if name in arrays:
                return arrays[name]
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _one_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
