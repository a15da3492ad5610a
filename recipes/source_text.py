"""The source code of Python and of installed libraries: tens of millions of tokens where models are trained."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from importlib.util import find_spec
from pathlib import Path
from platform import python_version

from prox24_lightning.io.texts import Split, TextSource
from recipes.stdlib_text import in_validation

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

    Args:
        libraries: import names whose files are trained on, with the standard library's; those not installed are
            left out, and :meth:`describe` says which were read.
        held_out: import names whose files are for evaluation only, so that no copied passage is in both.
        held_out_share: share of the standard library's files that is left out as well: the files whose docstrings
            :class:`~recipes.calibration_text.PythonDocs` keeps for evaluation by the same share.
    """

    def __init__(
        self,
        libraries: tuple[str, ...] = LIBRARIES,
        held_out: tuple[str, ...] = HELD_OUT,
        held_out_share: float = 0.2,
    ) -> None:
        if both := sorted(set(libraries) & set(held_out)):
            raise ValueError(f"libraries and held_out both name {both}; a library is for training or for evaluation")
        self.libraries = libraries
        self.held_out = held_out
        self.held_out_share = held_out_share

    def texts(self, split: Split) -> Iterable[str]:
        if split == "evaluation":
            return [text for name in self.held_out for _, text in _sources(_folder(name, required=True))]
        standard = _sources(Path(sysconfig.get_path("stdlib")))
        found = [text for name, text in standard if not in_validation(name, self.held_out_share)]
        for library in self.libraries:
            found += [text for _, text in _sources(_folder(library))]
        return found

    def describe(self) -> str:
        trained = ", ".join(_named(library) for library in self.libraries if _folder(library) is not None)
        held_out = ", ".join(_named(library) for library in self.held_out)
        return (
            f"source files of Python {python_version()} without {self.held_out_share:.0%} of them, and of {trained}; "
            f"for evaluation {held_out}"
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
