"""Tokens a second of whole calls of ``generate``, dense and converted, by the program that runs the loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from prox24_lightning.convert.sections import Section

Form = Literal["dense", "converted"]
Host = Literal["accelerate_generation", "transformers", "vllm"]
"""What runs the loop: transformers' ``generate`` with our captured loop inside or with its own, or vLLM."""


@dataclass(frozen=True)
class Generation:
    """One program at one batch size.

    Attributes:
        host: what runs the loop, in words: "transformers, static cache", or "vLLM".
        batch: sequences at a time.
        prompt: tokens of each prompt.
        new: tokens generated for each.
        dense: tokens a second of the dense model, prompt included; None if it was not timed.
        converted: the same of the converted model.
        problem: why a number is missing; "" if none is.
    """

    host: str
    batch: int
    prompt: int
    new: int
    dense: float | None = None
    converted: float | None = None
    problem: str = ""

    def timed(self, form: Form, rate: float) -> Generation:
        """Return the row with the tokens a second of one form."""
        return replace(self, dense=rate) if form == "dense" else replace(self, converted=rate)

    @property
    def speedup(self) -> float | None:
        """Converted over dense; None if one was not timed."""
        return None if self.dense is None or self.converted is None else self.converted / self.dense


def generation_section(rows: Sequence[Generation]) -> Section:
    """Return the rows as a table of text."""
    header = ("generate() of", "batch", "tokens", "dense tokens/s", "converted tokens/s", "x")
    return (
        "Language model, whole calls of generate()",
        header,
        [(row.host, str(row.batch), f"{row.prompt} + {row.new}", *_cells(row)) for row in rows],
    )


def generation_notes(rows: Sequence[Generation]) -> list[str]:
    """Return a sentence for every number that is missing."""
    return [f"generate() of {row.host}, batch {row.batch}, not timed: {row.problem}" for row in rows if row.problem]


def _cells(row: Generation) -> tuple[str, str, str]:
    rates = ("-" if rate is None else f"{rate:,.0f}" for rate in (row.dense, row.converted))
    return (*rates, "-" if row.speedup is None else f"{row.speedup:.2f}")  # type: ignore[return-value]
