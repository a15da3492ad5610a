"""Near-duplicate documents: found by the windows of words that they share, and kept on one side of a split.

Documents are split into words and punctuation marks, without regard to white space. Two documents that share a window
of :data:`WINDOW` of them are near-duplicates; a document that is shorter counts as one window. A held-out text that
shares no window with the training text measures what a model has learnt, not what it has memorised.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Mapping
from functools import lru_cache

import numpy as np

WINDOW = 30
_WORDS = re.compile(r"\w+|[^\w\s]")
_FACTOR = np.uint64(6364136223846793005)


@lru_cache(maxsize=1 << 20)  # the same words come again: three times as fast
def _word_hash(word: str) -> int:
    return zlib.crc32(word.encode())


def window_hashes(text: str, size: int = WINDOW) -> np.ndarray:
    """Return the distinct hashes of all windows of ``size`` words in ``text``, sorted: uint64, (windows,)."""
    words = np.fromiter(map(_word_hash, _WORDS.findall(text)), np.uint64)
    if not len(words):
        return words
    count = max(1, len(words) - size + 1)
    hashes = np.zeros(count, np.uint64)
    for offset in range(min(size, len(words))):
        hashes = hashes * _FACTOR + words[offset : offset + count]  # modulo 2^64
    return np.unique(hashes)


def all_windows(texts: Iterable[str]) -> np.ndarray:
    """Return the distinct hashes of the windows of all ``texts``, sorted: uint64, (windows,)."""
    found = [window_hashes(text) for text in texts]
    return np.unique(np.concatenate(found)) if found else np.array([], np.uint64)


def shares_window(text: str, windows: np.ndarray) -> bool:
    """Return whether a window of ``text`` is among ``windows``, which are sorted."""
    return bool(len(_places(window_hashes(text), windows)))


def _places(found: np.ndarray, windows: np.ndarray) -> np.ndarray:
    """Return where in the sorted ``windows`` the hashes ``found`` stand that are among them.

    By bisection: ``windows`` has millions of entries and is asked for every document.
    """
    if not len(windows):
        return np.array([], np.intp)
    places = np.searchsorted(windows, found).clip(max=len(windows) - 1)
    return places[windows[places] == found]


def overlaps(held_out: Mapping[str, Iterable[str]], training: Iterable[str]) -> dict[str, float]:
    """Return for each held-out text the share of its windows that the training text has too.

    Args:
        held_out: name -> documents for evaluation.
        training: documents for training or calibration; read once, one at a time.
    """
    windows = {name: all_windows(texts) for name, texts in held_out.items()}
    seen = {name: np.zeros(len(hashes), bool) for name, hashes in windows.items()}
    for text in training:
        found = window_hashes(text)
        for name, hashes in windows.items():
            seen[name][_places(found, hashes)] = True
    return {name: float(marks.mean()) if len(marks) else 0.0 for name, marks in seen.items()}


def check_apart(held_out: Mapping[str, Iterable[str]], training: Iterable[str]) -> str:
    """Return a line with the measured :func:`overlaps`, all of which must be zero.

    Raises:
        ValueError: if a held-out text shares a window with the training text.
    """
    found = overlaps(held_out, training)
    line = ", ".join(f"{share:.2%} of {name}" for name, share in found.items())
    line = f"{WINDOW}-word windows of held-out text that the training text has too: {line}"
    if any(found.values()):
        raise ValueError(f"{line}; split by near_duplicates.held_out_names, or name other text")
    return line


def clusters(documents: Mapping[str, str]) -> list[list[str]]:
    """Return the names of ``documents`` in clusters: two that share a window are in one cluster, transitively.

    Returns:
        lists of names, in the order of ``documents``, which map names to texts.
    """
    names = list(documents)
    parents = list(range(len(names)))

    def root(number: int) -> int:
        while parents[number] != number:
            parents[number] = parents[parents[number]]
            number = parents[number]
        return number

    first: dict[int, int] = {}
    for number, text in enumerate(documents.values()):
        for window in window_hashes(text).tolist():
            parents[root(number)] = root(first.setdefault(window, number))
    found: dict[int, list[str]] = {}
    for number, name in enumerate(names):
        found.setdefault(root(number), []).append(name)
    return list(found.values())


def held_out_names(documents: Mapping[str, str], fraction: float) -> frozenset[str]:
    """Return the names of the documents to hold out: whole clusters of near-duplicates.

    Clusters are taken in the order of a stable hash of their first name, as long as they fit into ``fraction`` of all
    characters; so a cluster larger than that is for training.
    """
    room = fraction * sum(map(len, documents.values()))
    chosen: list[str] = []
    for cluster in sorted(clusters(documents), key=lambda names: zlib.crc32(names[0].encode())):
        size = sum(len(documents[name]) for name in cluster)
        if 0 < size <= room:
            chosen += cluster
            room -= size
    return frozenset(chosen)
