"""Text in, token sequences out; and the perplexity of a language model on them."""

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

Split = Literal["calibration", "evaluation"]


class TextSource(ABC):
    """Documents for calibration, and others for evaluation: no document is in both."""

    @abstractmethod
    def texts(self, split: Split) -> Iterable[str]:
        """The documents of one split, always in the same order."""

    @abstractmethod
    def describe(self) -> str:
        """One line for a model card: data, split, version."""


class PlainText(TextSource):
    """A UTF-8 text file, cut at empty lines into documents; all of it is for evaluation.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @override
    def texts(self, split: Split) -> Iterable[str]:
        documents = self.path.read_text(encoding="utf-8").split("\n\n")
        return [document for document in documents if document.strip()] if split == "evaluation" else []

    @override
    def describe(self) -> str:
        return self.path.name


class PythonTopics(TextSource):
    """The reference topics that Python's ``help()`` shows: English that is there without a download.

    Some 100,000 tokens; every fifth topic, in order of the alphabet, is for evaluation.
    """

    @override
    def texts(self, split: Split) -> Iterable[str]:
        from pydoc_data.topics import topics

        wanted = split == "evaluation"
        # Some texts stand under several names.
        return [text for place, text in enumerate(sorted(set(topics.values()))) if (place % 5 == 0) == wanted]

    @override
    def describe(self) -> str:
        return f"help topics of Python {python_version()}"


def token_sequences(tokenizer: Any, texts: Iterable[str], count: int, length: int, *, seed: int = 0) -> Tensor:
    """``count`` sequences of ``length`` tokens: documents shuffled, joined by the end-of-text token, cut in pieces.

    Returns:
        int64 (count, length).

    Raises:
        ValueError: if the texts hold fewer tokens than that.
    """
    documents = list(texts)
    random.Random(seed).shuffle(documents)
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    joint = [] if end is None else [end]
    ids: list[int] = []
    for document in documents:
        # Long documents are cut up below, so the tokenizer's warning about the model's maximum does not apply.
        ids += tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"] + joint
        if len(ids) >= count * length:
            return torch.tensor(ids[: count * length]).view(count, length)
    raise ValueError(
        f"the text holds {len(ids)} tokens, but {count} sequences of {length} need {count * length}; ask for fewer or "
        "shorter sequences, or name a larger data source"
    )


@torch.no_grad()
def perplexity(model: Any, ids: Tensor, batch_size: int = 8) -> float:
    """exp of the mean next-token loss of a causal language model over ``ids`` (sequences, length)."""
    device = next(model.parameters()).device
    metric = Perplexity().to(device)
    for part in ids.split(batch_size):
        part = part.to(device)
        metric.update(model(input_ids=part).logits[:, :-1].float(), part[:, 1:])
    return float(metric.compute())
