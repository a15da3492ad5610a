"""Errors of the real parser become one line that keeps path, value and reason, and names what was probably meant."""

from __future__ import annotations

from typing import Literal

import pytest
from jsonargparse import ArgumentError, ArgumentParser

from prox24_lightning.utils.errors import first_reason


class Part:
    def __init__(
        self, size: int = 1, kind: Literal["a", "b"] = "a", share: int | float = 1, table: dict[str, int] | None = None
    ) -> None:
        if size > 9:
            raise ValueError(f"size={size} is too large;\nat most 9")


class Plain:
    """Takes nothing."""


def of(
    part: list[Part] | Part | None = None,
    plain: list[Plain] | None = None,
    either: bool | Part | None = None,
    steps: int = 1,
    counts: list[int] | None = None,
) -> None:
    """Signature of the parser."""


def reason(value: dict) -> str:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_function_arguments(of)
    with pytest.raises((ArgumentError, ValueError)) as caught:
        parser.instantiate(parser.parse_object(value))
    return first_reason(str(caught.value))


HERE = f"{__name__}.Part"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"steps": "many"}, "steps: expected int, got many"),
        ({"counts": "x"}, "counts: expected list or null, got x"),
        (
            {"part": {"class_path": HERE, "init_args": {"kind": "c"}}},
            f"part: {HERE}: kind: expected one of 'a', 'b', got c",
        ),
        (
            {"part": [{"class_path": HERE, "init_args": {"share": "x"}}]},
            f"part: {HERE}: share: expected int or float, got x",
        ),
        (
            {"part": {"class_path": HERE, "init_args": {"table": {"a": "x"}}}},
            f"part: {HERE}: table: expected int, got x",
        ),
        (
            {"either": {"class_path": HERE, "init_args": {"share": "x"}}},
            f"either: {HERE}: share: expected int or float, got x",
        ),
        (
            {"part": {"class_path": HERE, "init_args": {"sise": 2}}},
            f"part: {HERE}: no option 'sise'; did you mean 'size'?",
        ),
        (
            {"part": {"class_path": HERE, "init_args": {"weight": 2}}},
            f"part: {HERE}: no option 'weight'; options: size, kind, share, table",
        ),
        (
            {"part": {"class_path": HERE, "init_arg": {"size": 2}}},
            f"part: {HERE}: no option 'init_arg'; did you mean 'init_args'?",
        ),
        (
            {"part": [{"class_path": f"{__name__}.Parts"}]},
            f"part: {HERE}s: module '{__name__}' has no attribute 'Parts'; did you mean 'Part'?",
        ),
        (
            {"part": [{"class_path": "no_such.Part"}]},
            "part: no_such.Part: No module named 'no_such', neither installed nor in this folder",
        ),
        (
            {"plain": [{"class": "m.Plain", "init_args": {"note": "x" * 90}}]},
            f"plain: expected the class_path of a Plain, got {{'class': 'm.Plain', 'init_args': {{'note': '{'x' * 15}…",
        ),
        ({"part": {"class_path": HERE, "init_args": {"size": 99}}}, "size=99 is too large; at most 9"),
    ],
)
def test_one_line_with_path_and_reason(value, expected):
    assert reason(value) == expected


def test_other_text_is_kept_on_one_line():
    assert (
        first_reason("the following arguments\n are required: model") == "the following arguments are required: model"
    )


def test_a_value_that_does_not_fit_is_named_without_those_around_it():
    """Eight other entries of the list are valid."""
    entries = [{"class_path": HERE, "init_args": {"size": size}} for size in range(8)]
    line = reason({"part": [*entries, {"class_path": HERE, "init_args": {"share": "banana"}}]})
    assert line == f"part: {HERE}: share: expected int or float, got banana"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a:\n  b\n  c: 1\n", "not YAML: mapping values are not allowed"),
        ("a: [1, 2\nb: 1\n", "while parsing a flow sequence in line 1, column 4"),
        ("- a\n- b\n", "expected lines 'key: value', got - a - b"),
        ("", "expected lines 'key: value', got an empty file"),
    ],
)
def test_text_that_is_no_config(text, expected):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_function_arguments(of)
    with pytest.raises(ArgumentError) as caught:
        parser.parse_string(text)
    assert expected in first_reason(str(caught.value))
