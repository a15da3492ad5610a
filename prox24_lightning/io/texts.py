"""Texts, their token sequences, and the perplexity of a language model on them."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from platform import python_version
from typing import Any

import torch
from torch import Tensor
from torchmetrics.text import Perplexity
from typing_extensions import override

from prox24_lightning.io.documents import Split, read_documents
from prox24_lightning.io.near_duplicates import held_out_names


class TextSource(ABC):
    """Documents for calibration and for evaluation; no document serves both."""

    @abstractmethod
    def texts(self, split: Split) -> Iterable[str]:
        """Return the documents of one split, always in the same order."""

    @abstractmethod
    def describe(self) -> str:
        """Return one line for a model card: data, split, version."""


class PlainText(TextSource):
    """A text of the user's for one use: calibration or evaluation.

    Args:
        path: a file, a folder, JSONL or a data set of the hub; see
            :func:`~prox24_lightning.io.documents.read_documents`.
        use: what all of its documents are for.
        download: fetch a data set of the hub.

    Raises:
        FileNotFoundError, ValueError: as :func:`~prox24_lightning.io.documents.read_documents`; ValueError too where
            the text is asked for its other use.
    """

    def __init__(self, path: str | Path, use: Split = "evaluation", download: bool = False) -> None:
        self.path, self.use = Path(path), use
        self._documents = read_documents(str(path), use, download=download)

    @override
    def texts(self, split: Split) -> Iterable[str]:
        if split != self.use:
            raise ValueError(
                f"{self.path} is text for {self.use} only, so that no document serves {split} too; name another "
                f"source for {split}"
            )
        return self._documents

    @override
    def describe(self) -> str:
        return self.path.name


class PythonTopics(TextSource):
    """The reference topics of Python's ``help()``: English text without a download.

    Some 100,000 tokens; a fifth of them is for evaluation, near-duplicates all on one side.
    """

    @override
    def texts(self, split: Split) -> Iterable[str]:
        from pydoc_data.topics import topics

        # Some texts stand under several names.
        named = {text: name for name, text in sorted(topics.items(), reverse=True)}
        documents = {name: text for text, name in named.items()}
        held_out = held_out_names(documents, 0.2)
        return [text for name, text in sorted(documents.items()) if (name in held_out) == (split == "evaluation")]

    @override
    def describe(self) -> str:
        return f"help topics of Python {python_version()}"


def token_sequences(
    tokenizer: Any, texts: Iterable[str], count: int, length: int, *, seed: int = 0, name: str = "the text"
) -> Tensor:
    """Return ``count`` sequences of ``length`` tokens: documents shuffled, joined by the end-of-text token, and cut.

    ``name`` of the text is for the error.

    Returns:
        int64 (count, length).

    Raises:
        ValueError: if the texts hold fewer tokens than that, or ``count`` or ``length`` is not positive.
    """
    if count < 1 or length < 2:
        raise ValueError(f"{count} sequences of {length} tokens are asked for; at least 1 of 2 tokens is needed")
    documents = list(texts)
    random.Random(seed).shuffle(documents)
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    joint = [] if end is None else [end]
    ids: list[int] = []
    for document in documents:
        # Documents are cut below, so the tokenizer's warning about the model's maximum length does not apply.
        ids += tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"] + joint
        if len(ids) >= count * length:
            return torch.tensor(ids[: count * length]).view(count, length)
    raise ValueError(
        f"{name} holds {len(ids)} tokens, which make {len(ids) // length} sequences of {length}, but {count} are asked "
        f"for ({count * length} tokens): ask for fewer or shorter sequences, or name a larger text"
    )


@torch.no_grad()
def perplexity(model: Any, ids: Tensor, batch_size: int = 8) -> float:
    """Return exp of the mean next-token loss of a causal language model over ``ids`` (sequences, length)."""
    device = next(model.parameters()).device
    metric = Perplexity().to(device)
    for part in ids.split(batch_size):
        part = part.to(device)
        metric.update(model(input_ids=part).logits[:, :-1].float(), part[:, 1:])
    return float(metric.compute())
