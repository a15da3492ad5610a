"""Text that ships with Python: what is read, in which order, and how it is split."""

from __future__ import annotations

import sys

import pytest

from recipes.stdlib_text import in_validation, read_documents, stdlib_documents


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


def test_split_is_stable_and_close_to_the_fraction():
    names = [f"package{i}/module.py" for i in range(4000)]
    held_out = [name for name in names if in_validation(name, 0.25)]
    assert 900 < len(held_out) < 1100
    assert in_validation("asyncio/tasks.py", 0.5) is False
    assert in_validation("asyncio/queues.py", 0.5) is True


def test_split_grows_with_the_fraction():
    names = [f"m{i}" for i in range(500)]
    small = {name for name in names if in_validation(name, 0.1)}
    assert small < {name for name in names if in_validation(name, 0.3)}
