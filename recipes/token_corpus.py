"""Text to one long array of tokens: in batches, compact, and kept on disk for the next run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from prox24_lightning.io.texts import Split, TextSource
from prox24_lightning.utils.checksum import checksum
from prox24_lightning.utils.files import replacing

CHARACTERS_A_BATCH = 2_000_000
"""Documents are tokenised together until they hold as many characters: enough for all cores, little for memory."""


def token_stream(tokenizer: Any, texts: Iterable[str], *, label: str = "text", progress: bool = True) -> np.ndarray:
    """All documents in order, joined by the end-of-text token if the tokenizer has one: uint16 or int32, (tokens,).

    Args:
        tokenizer: of transformers; a fast one uses all cores.
        label: of the progress bar.
        progress: show it.

    Raises:
        ValueError: if there is no text.
    """
    documents = list(texts)
    dtype = np.uint16 if len(tokenizer) <= 2**16 else np.int32
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    joint = np.array([] if end is None else [end], dtype)
    parts: list[np.ndarray] = []
    columns = (TextColumn("{task.description}"), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not progress, transient=True) as bar:
        task = bar.add_task(f"tokenising {label}", total=sum(map(len, documents)))
        for batch in _batches(documents):
            # Documents are cut later, so the tokenizer's warning about the model's maximum length does not apply.
            encoded = tokenizer(batch, add_special_tokens=False, return_attention_mask=False, verbose=False)
            for ids in encoded["input_ids"]:
                parts += [np.array(ids, dtype), joint]
            bar.advance(task, sum(map(len, batch)))
    if not parts:
        raise ValueError(f"{label} holds no documents to train on or to score; name another source")
    return np.concatenate(parts)


def source_tokens(
    tokenizer: Any, source: TextSource, split: Split, *, cache: Path | None = None, progress: bool = True
) -> np.ndarray:
    """The tokens of one split of ``source``; with ``cache``, a folder, they are made once and mapped from disk after.

    What is on disk is known by the source's description, the split and the tokenizer's name and size.
    """
    label = source.describe()
    if cache is None:
        return token_stream(tokenizer, source.texts(split), label=label, progress=progress)
    identity = [label, split, str(tokenizer.name_or_path), len(tokenizer)]
    path = cache / f"{checksum([identity])[:24]}.npy"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        stream = token_stream(tokenizer, source.texts(split), label=label, progress=progress)
        with replacing(path) as temporary:
            np.save(temporary, stream)
    return np.load(path, mmap_mode="r")


def cut(stream: np.ndarray, length: int, *, seed: int, label: str) -> tuple[np.ndarray, np.ndarray]:
    """Sequences of ``length`` tokens as a view (sequences, length), and their shuffled order.

    Neighbours in the stream come from one document; a run that reads them in order learns one file at a time.

    Raises:
        ValueError: if there is not one whole sequence.
    """
    count = len(stream) // length
    if count == 0:
        raise ValueError(f"{label} holds {len(stream)} tokens, less than one sequence of {length}; lower length")
    order = np.random.default_rng(seed).permutation(count)
    return stream[: count * length].reshape(count, length), order


def _batches(documents: list[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document)
        if size >= CHARACTERS_A_BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
