"""A text classification task from the text that ships with Python: which package does a docstring come from?"""

from __future__ import annotations

import zlib

from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from prox24_lightning.io.near_duplicates import all_windows, shares_window
from recipes.stdlib_text import Document, stdlib_documents

# Packages with many docstrings that every Python from 3.10 on has; Debian's leaves out tkinter and idlelib.
PACKAGES = (
    "asyncio",
    "email",
    "encodings",
    "http",
    "importlib",
    "logging",
    "multiprocessing",
    "unittest",
    "urllib",
    "xml",
)


def package_passages(
    validation: float = 0.25, at_most: int = 400, shortest: int = 40, documents: tuple[Document, ...] | None = None
) -> DatasetDict:
    """Docstrings labelled by their package, as ``{"train", "validation"}`` with columns ``text`` and ``label``.

    The split is by source file: no file gives passages to both parts. Of the passages to train on, those that share a
    window of words with a held-out one are left out: many files repeat each other's docstrings.

    Args:
        validation: at most this fraction of a package's passages is held out.
        at_most: passages a package, so that no class outweighs the rest.
        shortest: characters; shorter passages are left out.
        documents: where the passages come from; default: this Python's standard library.

    Raises:
        ValueError: if a package has passages in only one file, or none.
    """
    found: dict[str, dict[str, list[str]]] = {"train": {}, "validation": {}}
    for package in PACKAGES:
        files = {
            document.name: [text for text in document.passages if len(text) >= shortest]
            for document in documents or stdlib_documents()
            if document.package == package
        }
        held_out = _held_out(files, validation)
        for part, packages in found.items():
            names = [name for name in files if (name in held_out) == (part == "validation")]
            packages[package] = [text for name in names for text in files[name]]
    windows = all_windows(text for passages in found["validation"].values() for text in passages)
    rows: dict[str, list[dict[str, str]]] = {"train": [], "validation": []}
    for part, packages in found.items():
        for package, passages in packages.items():
            kept = [text for text in passages if part == "validation" or not shares_window(text, windows)]
            if not kept:
                raise ValueError(f"package {package!r} has no passages for the {part} part")
            rows[part] += [{"text": text, "label": package} for text in kept[:at_most]]
    features = Features({"text": Value("string"), "label": ClassLabel(names=list(PACKAGES))})
    return DatasetDict({part: Dataset.from_list(rows[part], features=features) for part in rows})


def _held_out(files: dict[str, list[str]], fraction: float) -> set[str]:
    """Files in the order of a stable hash, as long as they fit into the fraction of all passages."""
    budget = fraction * sum(map(len, files.values()))
    chosen = set()
    for name in sorted(files, key=lambda name: zlib.crc32(name.encode())):
        if 0 < len(files[name]) <= budget:
            chosen.add(name)
            budget -= len(files[name])
    return chosen
