"""Text that ships with Python: what is read, in which order, and how it is split."""

from __future__ import annotations

import sys

import pytest

from prox24_lightning.io.near_duplicates import overlaps
from recipes.stdlib_text import read_documents, stdlib_documents, stdlib_held_out


@pytest.fixture
def library(tmp_path):
    """A folder that looks like a standard library."""
    files = {
        "zoo.py": '"""Zoo."""\nclass A:\n    """An animal."""\n    def f(self):\n        """Feed it."""\n',
        "bees/hive.py": 'raise SystemExit("imported!")\ndef f():\n    """Hum."""\n',
        "bees/test/check.py": '"""Of a test folder."""\n',
        "site-packages/other.py": '"""Of another package."""\n',
        "silent.py": "x = 1\n",
        "broken.py": "def (\n",
        "latin.py": b'"""\xe9"""\n',
        "escapes.py": '"""Digits: \\d."""\n',
        "pydoc_data/topics.py": 'topics = {"while": "Loops.", "assert": "Asserts."}\n',
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return tmp_path


def test_documents_are_sorted_and_leave_out_tests_and_other_packages(library):
    names = [document.name for document in read_documents(library)]
    assert names == ["bees/hive.py", "escapes.py", "zoo.py", "topics/assert", "topics/while"]


def test_passages_come_in_order_of_appearance(library):
    zoo = next(document for document in read_documents(library) if document.name == "zoo.py")
    assert zoo.passages == ("Zoo.", "An animal.", "Feed it.")
    assert zoo.text == "Zoo.\n\nAn animal.\n\nFeed it."


def test_package_is_the_first_part_of_the_path(library):
    packages = {document.name: document.package for document in read_documents(library)}
    assert packages["bees/hive.py"] == "bees"
    assert packages["zoo.py"] == "zoo"
    assert packages["topics/while"] == "topics"


def test_a_folder_without_docstrings_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no docstring found below"):
        read_documents(tmp_path)


def test_the_real_library_is_read_without_importing_it():
    documents = stdlib_documents()
    assert sum(len(document.text) for document in documents) > 1_000_000
    assert "tkinter" not in sys.modules
    assert "email/message.py" in {document.name for document in documents}


@pytest.mark.parametrize("fraction", [0.1, 0.2])
def test_the_split_keeps_near_duplicates_on_one_side_and_comes_close_to_the_fraction(fraction):
    held_out = stdlib_held_out(fraction)
    parts = {held: [d.text for d in stdlib_documents() if (d.name in held_out) == held] for held in (True, False)}
    assert overlaps({"held out": parts[True]}, parts[False]) == {"held out": 0.0}
    sizes = {held: sum(map(len, texts)) for held, texts in parts.items()}
    assert sizes[True] / sum(sizes.values()) == pytest.approx(fraction, rel=0.05)
