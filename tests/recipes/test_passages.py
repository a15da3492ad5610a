"""The docstring classification task."""

from __future__ import annotations

from collections import Counter

import pytest

from prox24_lightning.io.near_duplicates import overlaps
from recipes.passages import PACKAGES, package_passages
from recipes.stdlib_text import Document, stdlib_documents


def documents(files_per_package: int = 6, passages: int = 10) -> tuple[Document, ...]:
    return tuple(
        Document(
            f"{package}/m{i}.py", package, tuple(f"{package} m{i} {j} ".ljust(50 + j, "x") for j in range(passages))
        )
        for package in PACKAGES
        for i in range(files_per_package)
    )


def test_no_file_is_in_both_parts():
    parts = package_passages(documents=documents())
    files = {part: {" ".join(text.split()[:2]) for text in parts[part]["text"]} for part in parts}
    assert files["train"].isdisjoint(files["validation"])
    assert len(files["train"] | files["validation"]) == 6 * len(PACKAGES)


def test_held_out_part_stays_within_its_fraction():
    parts = package_passages(validation=0.4, documents=documents())
    assert set(Counter(parts["validation"]["label"]).values()) == {20}
    assert set(Counter(parts["train"]["label"]).values()) == {40}


def test_passages_a_package_are_capped():
    parts = package_passages(at_most=15, documents=documents())
    assert set(Counter(parts["train"]["label"]).values()) == {15}


def test_short_passages_are_left_out():
    parts = package_passages(shortest=55, documents=documents())
    assert min(len(text) for text in parts["train"]["text"]) >= 55


def test_labels_name_their_packages():
    parts = package_passages(documents=documents())
    names = parts["train"].features["label"].names
    assert names == list(PACKAGES)
    assert all(row["text"].startswith(names[row["label"]]) for row in parts["train"])


def test_a_package_without_two_files_is_refused():
    with pytest.raises(ValueError, match="package 'asyncio' has no passages for the validation part"):
        package_passages(documents=documents(files_per_package=1))


def test_this_python_has_enough_of_every_package():
    parts = package_passages(documents=stdlib_documents())
    for part, least in (("train", 50), ("validation", 5)):
        counts = Counter(parts[part]["label"])
        assert len(counts) == len(PACKAGES)
        assert min(counts.values()) >= least


def test_no_passage_is_trained_on_whose_near_duplicate_is_held_out():
    parts = package_passages(documents=stdlib_documents())
    assert overlaps({"validation": parts["validation"]["text"]}, parts["train"]["text"]) == {"validation": 0.0}
