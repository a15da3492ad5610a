"""Text of the user's own: files, folders, JSONL and data sets of the hub, for calibration and for evaluation."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from typing_extensions import override

from prox24_lightning.io.documents import Split, read_documents
from prox24_lightning.io.near_duplicates import held_out_names, overlaps
from prox24_lightning.io.texts import TextSource

HELD_OUT = 0.2
"""Share of the documents that is kept for evaluation where no other text is named."""


class OwnText(TextSource):
    """Text for calibration, and for evaluation another text or a fifth of the same, near-duplicates all on one side.

    Args:
        text: for calibration; what :func:`~prox24_lightning.io.documents.read_documents` reads.
        evaluation: for evaluation; None holds a fifth of the documents of ``text`` out.
        download: fetch data sets of the hub. False opens no connection and takes files and folders alone.
        documents: documents of a data set that are read at most.

    Raises:
        FileNotFoundError: if there is no such file, or the name could be a data set's and ``download`` is False.
        ValueError: if a text is empty, damaged, or has too few documents for a fifth of them to be held out.
    """

    def __init__(
        self, text: str, evaluation: str | None = None, *, download: bool = False, documents: int = 20000
    ) -> None:
        self.text, self.evaluation = text, evaluation
        read = read_documents(text, "calibration", download=download, documents=documents)
        held_out: list[str] = []
        if evaluation is not None:
            held_out = read_documents(evaluation, "evaluation", download=download, documents=documents)
        else:
            names = held_out_names({str(number): document for number, document in enumerate(read)}, HELD_OUT)
            held_out = [document for number, document in enumerate(read) if str(number) in names]
            read = [document for number, document in enumerate(read) if str(number) not in names]
        self._documents: dict[Split, list[str]] = {"calibration": read, "evaluation": held_out}

    @override
    def texts(self, split: Split) -> Iterable[str]:
        if split == "evaluation" and not self._documents[split]:
            raise ValueError(
                f"{self.text} has {len(self._documents['calibration'])} document (documents end at empty lines), so no "
                "fifth of them can be held out for evaluation: name another text for it (--eval_text), or none "
                "(--eval_sequences 0)"
            )
        return self._documents[split]

    @override
    def describe(self) -> str:
        name = Path(self.text).name or self.text
        if self.evaluation is None:
            return f"{name}, a fifth of its documents held out by content"
        return f"calibration {name}, evaluation {Path(self.evaluation).name or self.evaluation}"

    def overlap(self) -> float:
        """Return the share of the evaluation text's passages (30 words) that the calibration text has too."""
        held_out = self._documents["evaluation"]
        return overlaps({"evaluation": held_out}, self._documents["calibration"])["evaluation"]
