"""Text of the user's own: files, folders, JSONL and data sets, for calibration and for evaluation."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
from tiny_language import tiny_tokenizer

from prox24_lightning.io.documents import read_documents
from prox24_lightning.io.own_text import OwnText
from prox24_lightning.io.texts import token_sequences


def lines(*rows):
    return "\n".join(json.dumps(row) for row in rows)


def test_a_folder_is_read_file_by_file(tmp_path):
    (tmp_path / "b.txt").write_text("one\n\ntwo")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.md").write_text("three")
    (tmp_path / "c.jsonl").write_text(lines({"text": "four\n\nstill four"}, {"text": " "}) + "\n\n")
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    assert read_documents(str(tmp_path), "calibration") == ["one", "two", "four\n\nstill four", "three"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '{"text": "one"}\n{"body": "two", "id": 3}',
            r'line 2 of .*jsonl has no text in a field "text"; its fields are body, id',
        ),
        ('{"text": 3}', 'line 1 of .* has no text in a field "text"'),
        ('["one"]', "it is no object"),
        ('{"text": "one"', "line 1 of .* is no JSON: .* at column"),
        ("", "holds no text"),
    ],
)
def test_jsonl_that_holds_no_text(tmp_path, content, message):
    (tmp_path / "own.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_documents(str(tmp_path / "own.jsonl"), "calibration")


def test_a_folder_without_text(tmp_path):
    (tmp_path / "model.bin").write_text("no text")
    with pytest.raises(ValueError, match=r"holds no text: of a folder, files that end in \.txt, .* are read"):
        read_documents(str(tmp_path), "calibration")


def test_another_text_is_for_evaluation(tmp_path):
    (tmp_path / "a.txt").write_text("w1 w2 w3\n\nw4 w5 w6")
    (tmp_path / "b.txt").write_text("w7 w8 w9\n\nw4 w5 w6")
    text = OwnText(str(tmp_path / "a.txt"), str(tmp_path / "b.txt"))
    assert list(text.texts("calibration")) == ["w1 w2 w3", "w4 w5 w6"]
    assert list(text.texts("evaluation")) == ["w7 w8 w9", "w4 w5 w6"]
    assert text.describe() == "calibration a.txt, evaluation b.txt"
    assert text.overlap() == 0.5, "what both have is measured"


def test_without_another_text_a_fifth_is_held_out_by_content(tmp_path):
    documents = [f"w{number} w{number + 1} w{2 * number}" for number in range(20)]
    (tmp_path / "a.txt").write_text("\n\n".join([*documents, documents[0]]))
    text = OwnText(str(tmp_path / "a.txt"))
    calibration, evaluation = (list(text.texts(split)) for split in ("calibration", "evaluation"))
    assert not set(calibration) & set(evaluation)
    assert sorted(calibration + evaluation) == sorted([*documents, documents[0]])
    assert 2 <= len(evaluation) <= 5
    assert text.overlap() == 0
    assert text.describe() == "a.txt, a fifth of its documents held out by content"


def test_one_document_cannot_be_held_out(tmp_path):
    (tmp_path / "a.txt").write_text("w1 w2 w3")
    text = OwnText(str(tmp_path / "a.txt"))
    assert list(text.texts("calibration")) == ["w1 w2 w3"]
    with pytest.raises(ValueError, match=r"a\.txt has 1 document .* name another text for it \(--eval_text\)"):
        text.texts("evaluation")


def test_too_little_text_says_how_many_sequences_there_are():
    message = "my.txt holds 7 tokens, which make 2 sequences of 3, but 5 are asked for"
    with pytest.raises(ValueError, match=message):
        token_sequences(tiny_tokenizer(), ["w1 w2", "w3 w4 w5"], 5, 3, name="my.txt")


@pytest.fixture
def pretended_hub(monkeypatch):
    """The package ``datasets`` with two data sets; what is asked is kept."""
    asked = []
    sets = {"me/books": {"train": "a", "test": "b", "validation": "c"}, "me/news": {"train": "d"}}

    def load_dataset(name, configuration, *, split, streaming):
        asked.append((name, configuration, split, streaming))
        return ({"text": f"{sets[name][split]}{number}"} for number in range(100))

    module = SimpleNamespace(load_dataset=load_dataset, get_dataset_split_names=lambda name, _: list(sets[name]))
    monkeypatch.setitem(sys.modules, "datasets", module)
    return asked


def test_a_data_set_is_fetched_only_when_asked_for(pretended_hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        FileNotFoundError, match="no text me/books: .* a data set of the hub is fetched with --download"
    ):
        OwnText("me/books")
    with pytest.raises(FileNotFoundError, match=r"no text \./books: name a file or a folder$"):
        OwnText("./books", download=False)
    assert pretended_hub == []
    text = OwnText("me/books:en", "me/books", download=True, documents=3)
    assert list(text.texts("calibration")) == ["a0", "a1", "a2"]
    assert list(text.texts("evaluation")) == ["b0", "b1", "b2"]
    assert pretended_hub == [("me/books", "en", "train", True), ("me/books", None, "test", True)]


def test_a_data_set_without_a_split_for_evaluation(pretended_hub):
    with pytest.raises(ValueError, match="me/news has no split test or validation for evaluation, only train"):
        read_documents("me/news", "evaluation", download=True)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="pip install datasets"):
        read_documents("me/books", "evaluation", download=True)
