"""Training files of ``PythonSources`` and the held-out texts of the benchmarks have no window of words in common."""

from __future__ import annotations

import sys

import pytest

from prox24_lightning.io.near_duplicates import WINDOW, overlaps
from recipes import source_text, stdlib_text
from recipes.calibration_text import LibraryDocs, PythonDocs
from recipes.source_text import PythonSources
from recipes.stdlib_text import Document


def words(prefix: str, count: int = 100) -> str:
    return " ".join(f"{prefix}{number}" for number in range(count))


@pytest.fixture
def libraries(tmp_path, monkeypatch):
    """Three small libraries and a small standard library; the trained ones hold copies of held-out passages."""
    copied, documented = words("copied", WINDOW), words("documented", WINDOW)
    files = {
        "stdlib/plain.py": words("plain"),
        "stdlib/vendored.py": f"{words('vendored')} {copied}",
        "trained/own.py": words("own"),
        "trained/copies.py": f"{words('mine')} {copied}",
        "trained/quotes.py": f"{words('its')} {documented}",
        "held/source.py": f"{copied} {words('held')}",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        (path.parent / "__init__.py").touch()
    documents = (Document("held_doc.py", "held_doc", (f"{documented} {words('doc')}",)),)
    monkeypatch.setattr(source_text, "stdlib_documents", lambda: documents)
    monkeypatch.setattr(source_text, "stdlib_held_out", lambda fraction: frozenset({"held_doc.py"}))
    monkeypatch.setattr(source_text.sysconfig, "get_path", lambda name: str(tmp_path / "stdlib"))
    monkeypatch.syspath_prepend(str(tmp_path))
    yield PythonSources(libraries=("trained",), held_out=("held",)), documents
    for name in ("trained", "held"):
        sys.modules.pop(name, None)


def test_files_that_share_passages_with_held_out_text_are_not_trained_on(libraries):
    source, documents = libraries
    training = list(source.texts("calibration"))
    assert training == [words("plain"), words("own")]
    held_out = {"sources": source.texts("evaluation"), "docs": [document.text for document in documents]}
    assert overlaps(held_out, training) == {"sources": 0.0, "docs": 0.0}
    assert "none of them near-duplicates of evaluation text" in source.describe()


def test_docs_of_python_are_split_by_content():
    docs = PythonDocs()
    evaluation, calibration = (docs.texts(split) for split in ("evaluation", "calibration"))
    assert overlaps({"docs": evaluation}, calibration) == {"docs": 0.0}
    assert sum(map(len, evaluation)) > 300_000


def test_docs_of_libraries_share_nothing_with_those_of_python_nor_between_splits():
    docs = LibraryDocs(packages=("numpy",))
    evaluation, calibration = (docs.texts(split) for split in ("evaluation", "calibration"))
    assert evaluation
    training = [*calibration, *(document.text for document in stdlib_text.stdlib_documents())]
    assert overlaps({"libraries": evaluation}, training) == {"libraries": 0.0}
