"""Documents of a text: a file, a folder of files, JSONL, or a data set of the hub."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal

Split = Literal["calibration", "evaluation"]

TEXT_FILES = (".txt", ".md", ".rst", ".jsonl")
"""Endings of the files that are read in a folder."""


def read_documents(name: str, split: Split, *, download: bool = False, documents: int = 20000) -> list[str]:
    """Return the documents of a text.

    Args:
        name: a UTF-8 file, cut at empty lines into documents; a ``.jsonl`` file, a document a line in the field "text";
            a folder of such files; or a data set of the hub (``owner/name``, ``owner/name:configuration``).
        split: what the documents are for, which chooses the split of a data set.
        download: fetch a data set of the hub. False opens no connection and takes files and folders alone.
        documents: documents of a data set that are read at most.

    Raises:
        FileNotFoundError: if there is no such file, or the name could be a data set's and ``download`` is False.
        ValueError: if the text is empty or damaged.
        ImportError: if ``datasets`` is not installed.
    """
    path = Path(name)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in TEXT_FILES and file.is_file())
        if not files:
            raise ValueError(f"{name} holds no text: of a folder, files that end in {', '.join(TEXT_FILES)} are read")
        found = [document for file in files for document in _file_documents(file)]
    elif path.is_file():
        found = _file_documents(path)
    elif download:
        found = hub_documents(name, split, documents)
    else:
        hub = not path.suffix and name.count("/") <= 1 and name[:1] not in ("/", ".", "~")
        hint = "; a data set of the hub is fetched with --download" if hub else ""
        raise FileNotFoundError(f"there is no text {name}: name a file or a folder{hint}")
    found = [document for document in found if document.strip()]
    if not found:
        raise ValueError(f"{name} holds no text")
    return found


def hub_documents(name: str, split: Split, documents: int, *, part: str | None = None) -> list[str]:
    """Return the first documents of a data set of the hub, which is streamed.

    Args:
        name: ``owner/name``, or ``owner/name:configuration``.
        split: "calibration" takes the split "train", "evaluation" the first of "test" and "validation".
        documents: how many are read at most.
        part: the split by its own name instead.

    Raises:
        ImportError: if ``datasets`` is not installed.
        ValueError: if the data set has no such split, or no column "text".
    """
    try:
        from datasets import get_dataset_split_names, load_dataset
    except ImportError as error:
        raise ImportError("reading a data set of the hub needs the package datasets: pip install datasets") from error
    repository, _, configuration = name.partition(":")
    wanted: Sequence[str] = (part,) if part else ("train",) if split == "calibration" else ("test", "validation")
    there = list(get_dataset_split_names(repository, configuration or None))
    chosen = next((one for one in wanted if one in there), None)
    if chosen is None:
        raise ValueError(
            f"{name} has no split {' or '.join(wanted)} for {split}, only {', '.join(there)}: name another text for it"
        )
    rows = load_dataset(repository, configuration or None, split=chosen, streaming=True)
    return [_text_of(row, f"{name} ({chosen})") for row in islice(rows, documents)]


def _file_documents(path: Path) -> list[str]:
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}): convert it") from error
    if path.suffix != ".jsonl":
        return content.split("\n\n")
    found = []
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number} of {path} is no JSON: {error.msg} at column {error.colno}") from error
        found.append(_text_of(row, f"line {number} of {path}"))
    return found


def _text_of(row: Any, where: str) -> str:
    text = row.get("text") if isinstance(row, dict) else None
    if not isinstance(text, str):
        fields = f"its fields are {', '.join(map(str, row))}" if isinstance(row, dict) else "it is no object"
        raise ValueError(f'{where} has no text in a field "text"; {fields}: rename the field that holds the text')
    return text
