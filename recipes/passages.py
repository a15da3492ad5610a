"""A text classification task from the text that ships with Python: which package does a docstring come from?"""

from __future__ import annotations

import zlib

from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

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

    The split is by source file: no file gives passages to both parts.

    Args:
        validation: at most this fraction of a package's passages is held out.
        at_most: passages a package, so that no class outweighs the rest.
        shortest: characters; shorter passages say too little and are left out.
        documents: where the passages come from; default: this Python's standard library.

    Raises:
        ValueError: if a package has passages in only one file, or none.
    """
    rows: dict[str, list[dict[str, str]]] = {"train": [], "validation": []}
    for package in PACKAGES:
        files = {
            document.name: [text for text in document.passages if len(text) >= shortest]
            for document in documents or stdlib_documents()
            if document.package == package
        }
        held_out = _held_out(files, validation)
        for part in rows:
            names = [name for name in files if (name in held_out) == (part == "validation")]
            passages = [text for name in names for text in files[name]]
            if not passages:
                raise ValueError(f"package {package!r} has no passages for the {part} part")
            rows[part] += [{"text": text, "label": package} for text in passages[:at_most]]
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
