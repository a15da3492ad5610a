"""Texts, their token sequences, and the perplexity of a language model on them."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from platform import python_version
from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics.text import Perplexity
from typing_extensions import override

from prox24_lightning.io.near_duplicates import held_out_names

Split = Literal["calibration", "evaluation"]


class TextSource(ABC):
    """Documents for calibration and for evaluation; no document serves both."""

    @abstractmethod
    def texts(self, split: Split) -> Iterable[str]:
        """Return the documents of one split, always in the same order."""

    @abstractmethod
    def describe(self) -> str:
        """Return one line for a model card: data, split, version."""


class PlainText(TextSource):
    """A UTF-8 text file, cut at empty lines into documents, for evaluation only.

    Args:
        path: the file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is empty or not UTF-8; for the split "calibration".
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"there is no text file {path}")
        try:
            text = self.path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}): convert it") from error
        self._documents = [document for document in text.split("\n\n") if document.strip()]
        if not self._documents:
            raise ValueError(f"{path} holds no text")

    @override
    def texts(self, split: Split) -> Iterable[str]:
        if split == "calibration":
            raise ValueError(
                f"{self.path} is text for evaluation only, so that no document serves calibration too; "
                "name another source for calibration"
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


def token_sequences(tokenizer: Any, texts: Iterable[str], count: int, length: int, *, seed: int = 0) -> Tensor:
    """Return ``count`` sequences of ``length`` tokens: documents shuffled, joined by the end-of-text token, and cut.

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
        f"the text holds {len(ids)} tokens, but {count} sequences of {length} need {count * length}; ask for fewer or "
        "shorter sequences, or name a larger data source"
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
