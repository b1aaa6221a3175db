"""Which of eight languages a word is from: a small text data set out of Debian's word lists, as token ids.

    apt-get install wamerican wdanish wdutch wfrench wngerman witalian wportuguese wspanish
    python benchmarks/words.py words.npz

Words of one list only, lower case, accents taken off, 4 to 20 letters; drawn with a fixed seed. Tokens: 1 to 26 for the
letters, 0 after the end; 6,000 training and 1,000 test words a language.
"""

from __future__ import annotations

import random
import sys
import unicodedata
from pathlib import Path

import numpy as np

LISTS = ("american-english", "danish", "dutch", "french", "ngerman", "italian", "portuguese", "spanish")
LENGTH, TRAIN, TEST = 20, 6000, 1000


def words(path: Path) -> set[str]:
    """The plain words of a list."""
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        text = raw.decode("latin-1")
    letters = unicodedata.normalize("NFKD", text.lower().replace("ß", "ss").replace("ø", "o").replace("æ", "ae"))
    plain = "".join(c for c in letters if not unicodedata.combining(c))
    return {w for w in plain.split() if 4 <= len(w) <= LENGTH and w.isascii() and w.isalpha()}


def main(out: str, folder: str = "/usr/share/dict") -> None:
    """Writes the arrays x_train [N, 20], y_train, x_test, y_test."""
    found = [words(Path(folder) / name) for name in LISTS]
    parts: dict[str, list[tuple[str, int]]] = {"train": [], "test": []}
    for label, own in enumerate(found):
        others = set().union(*(other for i, other in enumerate(found) if i != label))
        drawn = random.Random(label).sample(sorted(own - others), TRAIN + TEST)
        parts["train"] += [(word, label) for word in drawn[:TRAIN]]
        parts["test"] += [(word, label) for word in drawn[TRAIN:]]
    arrays = {}
    for part, rows in parts.items():
        tokens = np.zeros((len(rows), LENGTH), np.uint8)
        for row, (word, _) in zip(tokens, rows, strict=True):
            row[: len(word)] = np.frombuffer(word.encode(), np.uint8) - 96
        arrays[f"x_{part}"] = tokens
        arrays[f"y_{part}"] = np.array([label for _, label in rows], np.uint8)
    np.savez_compressed(out, **arrays)  # type: ignore[arg-type]
    print({name: array.shape for name, array in arrays.items()}, "e.g.", parts["train"][0], parts["train"][-1])


if __name__ == "__main__":
    main(*sys.argv[1:])
