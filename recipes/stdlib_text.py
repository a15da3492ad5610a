"""The English that ships with Python itself: docstrings of the standard library and the language reference.

Every machine that can run this package has it, so a recipe can train on real text without a download. Files are
parsed with :mod:`ast` and never imported, in sorted order, so one Python version always gives the same documents.
"""

from __future__ import annotations

import ast
import sysconfig
import warnings
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from prox24_lightning.io.near_duplicates import held_out_names

_LEFT_OUT = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data", "__pycache__"})


@dataclass(frozen=True)
class Document:
    """One source file's docstrings, or one topic of the language reference.

    ``name`` is the path inside the standard library (``asyncio/tasks.py``, ``topics/assert``), ``package`` its first
    component without ``.py``, ``passages`` the docstrings in order of appearance.
    """

    name: str
    package: str
    passages: tuple[str, ...]

    @property
    def text(self) -> str:
        return "\n\n".join(self.passages)


@lru_cache(maxsize=1)
def stdlib_documents() -> tuple[Document, ...]:
    """The documents of this Python's standard library; read once a process, which takes some seconds."""
    return read_documents(Path(sysconfig.get_path("stdlib")))


def read_documents(root: Path) -> tuple[Document, ...]:
    """Every document below ``root``: source files sorted by name, then the topics of the reference.

    Raises:
        ValueError: if the folder holds no Python file with a docstring.
    """
    documents = []
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        parts = path.relative_to(root).parts
        if not _LEFT_OUT.intersection(parts):
            passages = _docstrings(path)
            if passages:
                documents.append(Document("/".join(parts), parts[0].removesuffix(".py"), passages))
    documents += [Document(f"topics/{name}", "topics", (text,)) for name, text in _reference_topics(root)]
    if not documents:
        raise ValueError(f"no docstring found below {root}; is the source of the standard library installed?")
    return tuple(documents)


@lru_cache
def held_out_documents(documents: tuple[Document, ...], fraction: float) -> frozenset[str]:
    """Return the names of the documents that are held out: ``fraction`` of the text, near-duplicates together.

    Computed once a process for each set of documents, which takes some seconds.
    """
    return held_out_names({document.name: document.text for document in documents}, fraction)


def stdlib_held_out(fraction: float) -> frozenset[str]:
    """Return :func:`held_out_documents` of the standard library."""
    return held_out_documents(stdlib_documents(), fraction)


def _docstrings(path: Path) -> tuple[str, ...]:
    tree = _parse(path)
    if tree is None:
        return ()
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, owners))
    return tuple(text for text in found if text)


def _reference_topics(root: Path) -> list[tuple[str, str]]:
    """The language reference that ``help("topic")`` shows: one assignment of a dictionary name -> text."""
    path = root / "pydoc_data" / "topics.py"
    tree = _parse(path) if path.is_file() else None
    for node in tree.body if tree else ():
        if isinstance(node, ast.Assign):
            return sorted(ast.literal_eval(node.value).items())
    return []


def _parse(path: Path) -> ast.Module | None:
    try:
        # Old files of the library hold escapes like "\d" that newer parsers warn about.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):  # samples of broken source that some distributions ship
        return None
