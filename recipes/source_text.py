"""The source code of Python and of installed libraries: tens of millions of tokens where models are trained."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from importlib.util import find_spec
from pathlib import Path
from platform import python_version

from prox24_lightning.io.near_duplicates import all_windows, shares_window
from prox24_lightning.io.texts import Split, TextSource
from recipes.stdlib_text import stdlib_documents, stdlib_held_out

LIBRARIES = (
    "torch",
    "transformers",
    "sympy",
    "scipy",
    "sklearn",
    "pandas",
    "networkx",
    "lightning",
    "torchmetrics",
    "datasets",
    "triton",
)
HELD_OUT = ("numpy", "matplotlib")

_SHORTEST = 500


class PythonSources(TextSource):
    """Source files with their docstrings and comments; works offline, about 60 million tokens in a full environment.

    Files to train on that share a window of words with any evaluation text are left out, whatever library they are in
    (:mod:`prox24_lightning.io.near_duplicates`): copied modules, licences, boilerplate.

    Args:
        libraries: import names whose files are trained on, with the standard library's; those not installed are
            left out, and :meth:`describe` names those that were read.
        held_out: import names whose files are for evaluation only.
        held_out_share: share of the standard library's text that is left out as well: the files whose docstrings
            :class:`~recipes.calibration_text.PythonDocs` keeps for evaluation by the same share.
        standard_library: train on the standard library's files too.
    """

    def __init__(
        self,
        libraries: tuple[str, ...] = LIBRARIES,
        held_out: tuple[str, ...] = HELD_OUT,
        held_out_share: float = 0.2,
        standard_library: bool = True,
    ) -> None:
        if both := sorted(set(libraries) & set(held_out)):
            raise ValueError(f"libraries and held_out both name {both}; a library is for training or for evaluation")
        self.libraries = libraries
        self.held_out = held_out
        self.held_out_share = held_out_share
        self.standard_library = standard_library

    def texts(self, split: Split) -> Iterable[str]:
        evaluation = [text for name in self.held_out for _, text in _sources(_folder(name, required=True))]
        if split == "evaluation":
            return evaluation
        held_out = stdlib_held_out(self.held_out_share)
        docs = (document.text for document in stdlib_documents() if document.name in held_out)
        windows = all_windows([*evaluation, *docs])
        standard = _sources(Path(sysconfig.get_path("stdlib")) if self.standard_library else None)
        found = [text for name, text in standard if name not in held_out]
        for library in self.libraries:
            found += [text for _, text in _sources(_folder(library))]
        return [text for text in found if not shares_window(text, windows)]

    def describe(self) -> str:
        trained = ", ".join(_named(library) for library in self.libraries if _folder(library) is not None)
        held_out = ", ".join(_named(library) for library in self.held_out)
        standard = f"Python {python_version()} without {self.held_out_share:.0%} of them, and of "
        return (
            f"source files of {standard if self.standard_library else ''}{trained}, "
            f"none of them near-duplicates of evaluation text; for evaluation {held_out}"
        )


def _folder(library: str, required: bool = False) -> Path | None:
    spec = find_spec(library)
    if spec is None or spec.origin is None:
        if required:
            raise ValueError(f"held_out names {library!r}, which is not installed")
        return None
    return Path(spec.origin).parent


def _sources(root: Path | None) -> Iterator[tuple[str, str]]:
    """Name inside ``root`` and text of every source file, sorted; tests and other packages' files left out."""
    if root is None:
        return
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data", "__pycache__"}
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        parts = path.relative_to(root).parts
        if left_out.intersection(parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if len(text) >= _SHORTEST:
            yield "/".join(parts), text


def _named(library: str) -> str:
    distribution = _distributions().get(library, [library])[0]
    try:
        return f"{library} {version(distribution)}"
    except PackageNotFoundError:
        return library


@lru_cache(maxsize=1)
def _distributions() -> Mapping[str, list[str]]:
    return packages_distributions()
