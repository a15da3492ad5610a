"""Texts of a benchmark that prunes a language model: one to calibrate on, and two that are held out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from prox24_lightning.io.near_duplicates import check_apart
from prox24_lightning.io.texts import TextSource, token_sequences


@dataclass(frozen=True)
class Sequences:
    """Token ids, each (sequences, length).

    Attributes:
        calibration: of the first source.
        held_out: column of the table -> text that calibration does not hold: "stdlib" of the same source, "libraries"
            of the other.
        apart: how far calibration and held-out text were checked to be apart, in words.
    """

    calibration: Tensor
    held_out: dict[str, Tensor]
    apart: str


def draw_sequences(
    tokenizer: Any,
    data: TextSource,
    other: TextSource,
    *,
    sequences: int,
    eval_sequences: int,
    length: int,
    seed: int,
    column: str,
) -> Sequences:
    """Draw the sequences, and print how far the texts are apart; ``column`` is a format of the columns' names."""
    calibration = list(data.texts("calibration"))
    evaluation = {"stdlib": list(data.texts("evaluation")), "libraries": list(other.texts("evaluation"))}
    apart = check_apart(evaluation, calibration)
    print(apart)
    held_out = {
        column.format(name): token_sequences(tokenizer, texts, eval_sequences, length, seed=seed)
        for name, texts in evaluation.items()
    }
    return Sequences(token_sequences(tokenizer, calibration, sequences, length, seed=seed), held_out, apart)
