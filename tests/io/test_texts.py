"""Text for a perplexity: a file of the user's, and what ships with Python."""

from __future__ import annotations

import pytest
from tiny_language import tiny_tokenizer

from prox24_lightning.io.near_duplicates import overlaps
from prox24_lightning.io.texts import PlainText, PythonTopics, token_sequences


def test_a_file_is_cut_at_empty_lines_and_is_all_for_evaluation(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("w1 w2\nw3\n\n\n\nw4 w5\n", encoding="utf-8")
    text = PlainText(path)
    assert list(text.texts("evaluation")) == ["w1 w2\nw3", "w4 w5\n"]
    with pytest.raises(ValueError, match=r"book\.txt is text for evaluation only"):
        text.texts("calibration")
    assert text.describe() == "book.txt"
    calibration = PlainText(path, use="calibration")
    assert list(calibration.texts("calibration")) == list(text.texts("evaluation"))
    with pytest.raises(ValueError, match=r"book\.txt is text for calibration only"):
        calibration.texts("evaluation")
    ids = token_sequences(tiny_tokenizer(), text.texts("evaluation"), 1, 6)
    assert sorted(ids[0].tolist()) == [1, 3, 4, 5, 6, 7]
    with pytest.raises(ValueError, match="the text holds 7 tokens, which make 1 sequences of 6, but 2 are asked for"):
        token_sequences(tiny_tokenizer(), text.texts("evaluation"), 2, 6)


def test_topics_of_python_are_split():
    topics = PythonTopics()
    evaluation, calibration = (set(topics.texts(split)) for split in ("evaluation", "calibration"))
    assert not evaluation & calibration
    assert overlaps({"topics": evaluation}, calibration) == {"topics": 0.0}
    assert 3 < sum(map(len, calibration)) / sum(map(len, evaluation)) < 6
    assert sum(map(len, evaluation)) > 50_000
    assert topics.describe().startswith("help topics of Python 3.")


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "holds no text"), (b"\n\n \n\n", "holds no text"), (b"caf\xe9 w1", "is not UTF-8 text .* at byte 3")],
)
def test_a_file_without_text_is_refused_when_it_is_named(tmp_path, content, message):
    path = tmp_path / "book.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        PlainText(path)


def test_a_file_that_does_not_exist_is_refused_when_it_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no text .*gone\.txt: name a file or a folder$"):
        PlainText(tmp_path / "gone.txt")


@pytest.mark.parametrize(("count", "length"), [(0, 8), (1, 1), (-1, 8)])
def test_no_sequences_of_nothing(count, length):
    with pytest.raises(ValueError, match=f"{count} sequences of {length} tokens are asked for"):
        token_sequences(tiny_tokenizer(), ["w1 w2 w3"], count, length)
