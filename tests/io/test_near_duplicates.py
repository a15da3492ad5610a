"""Near-duplicates are found by the windows of words they share, and stay on one side of a split."""

from __future__ import annotations

import numpy as np
import pytest

from prox24_lightning.io.near_duplicates import (
    WINDOW,
    all_windows,
    check_apart,
    clusters,
    held_out_names,
    overlaps,
    shares_window,
    window_hashes,
)


def words(prefix: str, count: int) -> str:
    return " ".join(f"{prefix}{number}" for number in range(count))


PASSAGE = words("copied", WINDOW)


def test_white_space_does_not_matter_and_one_word_does():
    text = words("w", 40)
    assert np.array_equal(window_hashes(text), window_hashes(text.replace(" ", "\n   ")))
    assert len(window_hashes(text)) == 40 - WINDOW + 1
    assert not shares_window(text.replace("w20", "other"), window_hashes(text))


def test_a_short_text_is_one_window_and_an_empty_one_none():
    assert len(window_hashes("a b c")) == 1
    assert not shares_window("a b c d", window_hashes("a b c"))
    assert len(window_hashes("")) == len(all_windows([])) == 0


def test_the_overlap_is_the_share_of_held_out_windows():
    held_out = f"{words('own', 2 * WINDOW)} {PASSAGE}"
    (share,) = overlaps({"docs": [held_out]}, ["nothing", f"before {PASSAGE} after"]).values()
    assert share == pytest.approx(1 / (2 * WINDOW + 1))
    assert overlaps({"docs": [held_out], "none": []}, ["nothing"]) == {"docs": 0.0, "none": 0.0}


def test_texts_that_share_a_window_are_refused_with_the_measured_share():
    with pytest.raises(ValueError, match=r"that the training text has too: 3.57% of docs, 0.00% of other; split by"):
        check_apart({"docs": [f"{words('own', 27)} {PASSAGE}"], "other": ["else"]}, [PASSAGE])
    assert check_apart({"docs": ["else"]}, [PASSAGE]).endswith("that the training text has too: 0.00% of docs")


def test_clusters_are_transitive():
    other = words("second", WINDOW)
    documents = {"a": f"x {PASSAGE}", "b": words("b", 50), "c": f"{PASSAGE} y {other}", "d": f"z {other}"}
    assert clusters(documents) == [["a", "c", "d"], ["b"]]


def test_a_split_is_close_to_its_fraction_and_no_cluster_is_on_both_sides():
    documents = {f"{group}/{number}": f"{words(f'g{group}n{number}', 60)}" for group in range(100) for number in (0, 1)}
    for group in range(0, 100, 2):
        passage = words(f"shared{group}", WINDOW)
        for number in (0, 1):
            documents[f"{group}/{number}"] += " " + passage
    held_out = held_out_names(documents, 0.2)
    sizes = {name: len(text) for name, text in documents.items()}
    assert sum(sizes[name] for name in held_out) == pytest.approx(0.2 * sum(sizes.values()), rel=0.03)
    assert all((f"{group}/0" in held_out) == (f"{group}/1" in held_out) for group in range(0, 100, 2))
    assert any((f"{group}/0" in held_out) != (f"{group}/1" in held_out) for group in range(1, 100, 2))
    assert held_out_names(dict(reversed(documents.items())), 0.0) == frozenset()


def test_a_cluster_larger_than_the_fraction_is_for_training():
    documents = {"a": words("a", 300) + " " + PASSAGE, "b": PASSAGE, "c": words("c", 40), "d": words("d", 40)}
    assert held_out_names(documents, 0.2) <= {"c", "d"}
