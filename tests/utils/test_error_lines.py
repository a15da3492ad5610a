"""Errors of the real parser become one line that keeps path, value and reason."""

from __future__ import annotations

from typing import Literal

import pytest
from jsonargparse import ArgumentError, ArgumentParser

from prox24_lightning.utils.errors import first_reason


class Part:
    def __init__(self, size: int = 1, kind: Literal["a", "b"] = "a") -> None:
        if size > 9:
            raise ValueError(f"size={size} is too large;\nat most 9")


def of(part: Part | list[Part] | None = None, steps: int = 1, counts: list[int] | None = None) -> None:
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
        ({"part": {"class_path": HERE, "init_args": {"sise": 2}}}, f"part: {HERE}: Option 'sise' is not accepted"),
        ({"part": {"class_path": HERE, "init_args": {"size": 99}}}, "size=99 is too large; at most 9"),
    ],
)
def test_one_line_with_path_and_reason(value, expected):
    assert reason(value) == expected


def test_other_text_is_kept_on_one_line():
    assert (
        first_reason("the following arguments\n are required: model") == "the following arguments are required: model"
    )
