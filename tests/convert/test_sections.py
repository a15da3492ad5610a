"""Tables in a narrow terminal: nothing that tells rows apart is lost, and no number is broken."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from prox24_lightning.convert.sections import grouped, print_tables

NAMES = [f"model.layers.{number}.{part}" for number in range(30) for part in ("self_attn.q_proj", "self_attn.k_proj")]


def printed(table, width=80):
    out = io.StringIO()
    print_tables([table], ["a note"], Console(file=out, width=width))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    return lines


def test_names_keep_the_part_that_tells_them_apart():
    rows = grouped([(name, ("Linear", "(4096, 4096)", "dense", f"why {name[-6:]} stays dense here")) for name in NAMES])
    lines = printed(("Layers", ("layers", "kind", "(out, in)", "state", "why"), rows))
    text = "\n".join(lines)
    assert "_attn.q_proj x 30 " in text
    assert "_attn.k_proj x 30 " in text
    assert "why q_proj stays dense here" in " ".join(text.replace("│", " ").split())


def test_names_that_differ_in_the_middle_stay_distinct():
    rows = [(f"model.{part}_model.encoder.layers.*.attention.out_proj x 12", "1") for part in ("vision", "text")]
    lines = [line for line in printed(("Layers", ("layers", "x"), rows), width=40) if "out_proj" in line]
    assert len(set(lines)) == 2


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_wide_table_is_printed_in_parts_with_whole_numbers(width):
    header = ("(out, in)", "tokens", *(f"dense eager {number}" for number in range(8)))
    rows = [(shape, tokens, *("123456.7",) * 8) for shape in ("(4096, 4096)", "(14336, 4096)") for tokens in "18"]
    lines = printed(("Per layer", header, rows), width)
    text = "\n".join(lines)
    assert text.count("123456.7") == 8 * 4
    parts = text.count("┏")
    assert (parts > 1) == (width < 120)
    assert text.count("(14336, 4096)") == 2 * parts, "every part says which row is which"
    assert sum(line.startswith("Per layer") for line in lines) == 1
    assert lines[-1] == "a note"


def test_an_empty_table():
    assert printed(("Layers", ("layers", "kind"), []))
