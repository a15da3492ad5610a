"""Calibration and evaluation text for ``prox24 prune``: what ships with Python, installed libraries, or the hub."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from platform import python_version

from prox24_lightning.io.documents import hub_documents
from prox24_lightning.io.near_duplicates import all_windows, held_out_names, shares_window
from prox24_lightning.io.texts import Split, TextSource
from recipes.stdlib_text import read_documents, stdlib_documents, stdlib_held_out


class PythonDocs(TextSource):
    """Docstrings and reference topics of the standard library; works offline, about 500,000 tokens.

    Args:
        held_out: share of the text that is kept for evaluation: whole documents (source files, topics), and
            near-duplicates together.
    """

    def __init__(self, held_out: float = 0.2) -> None:
        self.held_out = held_out

    def texts(self, split: Split) -> Iterable[str]:
        held_out, wanted = stdlib_held_out(self.held_out), split == "evaluation"
        return [document.text for document in stdlib_documents() if (document.name in held_out) == wanted]

    def describe(self) -> str:
        return f"docstrings and topics of Python {python_version()}, {self.held_out:.0%} held out by content"


class LibraryDocs(TextSource):
    """Docstrings of installed libraries: another kind of text than the standard library's, for evaluation.

    Args:
        packages: import names; each must be installed.
        held_out: largest share of the text that is kept for evaluation: whole source files, and near-duplicates
            together. Files that share passages with the standard library are left out of both splits.
    """

    def __init__(self, packages: tuple[str, ...] = ("numpy", "matplotlib"), held_out: float = 0.5) -> None:
        self.packages = packages
        self.held_out = held_out

    def texts(self, split: Split) -> Iterable[str]:
        known = all_windows(document.text for document in stdlib_documents())
        texts: dict[str, str] = {}
        for package in self.packages:
            spec = find_spec(package)
            if spec is None or spec.origin is None:
                raise ValueError(f"data.packages names {package!r}, which is not installed")
            for document in read_documents(Path(spec.origin).parent):
                if not shares_window(document.text, known):
                    texts[f"{package}/{document.name}"] = document.text
        held_out = held_out_names(texts, self.held_out)
        return [text for name, text in texts.items() if (name in held_out) == (split == "evaluation")]

    def describe(self) -> str:
        names = ", ".join(f"{package} {version(package)}" for package in self.packages)
        return f"docstrings of {names}, {self.held_out:.0%} held out by content"


class HubText(TextSource):
    """Text data sets of the hub, by the ``datasets`` library; needs a network. Defaults: C4 and WikiText2.

    Args:
        calibration, evaluation: name of the data set, and its configuration after a colon.
        calibration_split, evaluation_split: which split of each.
        documents: how many documents are read at most; the data sets are streamed.
    """

    def __init__(
        self,
        calibration: str = "allenai/c4:en",
        evaluation: str = "Salesforce/wikitext:wikitext-2-raw-v1",
        calibration_split: str = "train",
        evaluation_split: str = "test",
        documents: int = 20000,
    ) -> None:
        self.sources = {"calibration": (calibration, calibration_split), "evaluation": (evaluation, evaluation_split)}
        self.documents = documents

    def texts(self, split: Split) -> Iterable[str]:
        source, part = self.sources[split]
        return hub_documents(source, split, self.documents, part=part)

    def describe(self) -> str:
        calibration, evaluation = ("{} ({})".format(*self.sources[split]) for split in ("calibration", "evaluation"))
        return f"calibration {calibration}, evaluation {evaluation}"
