"""Markdown tables keep their columns, whatever the cells hold."""

from __future__ import annotations

import pytest

from prox24_lightning.utils.markdown import markdown_table


def test_a_table():
    table = markdown_table(("layer", "loss"), [("up", 0.123456), ("down", 2)])
    assert table.splitlines() == ["| layer | loss |", "| --- | --- |", "| up | 0.1235 |", "| down | 2 |"]


def test_cells_cannot_break_the_table():
    assert markdown_table(("a",), [("x | y\nz",)]).splitlines()[-1] == "| x \\| y z |"


def test_a_row_of_another_length_is_refused():
    with pytest.raises(ValueError, match="has 1 cells, but the table has 2 columns"):
        markdown_table(("a", "b"), [("x",)])
