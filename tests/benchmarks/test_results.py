"""Result files: a folder for each benchmark, and an index that links the newest."""

from __future__ import annotations

import json
from datetime import date

import pytest

from benchmarks.result_files import RESULTS, index, result_path, write_result


@pytest.mark.parametrize(
    ("name", "part", "file"),
    [
        ("oneshot", "", "oneshot/{}.md"),
        ("recovery/long", "", "recovery/{}_long.md"),
        ("convert/float16", "bars", "convert/{}_float16_bars.md"),
    ],
)
def test_a_result_lies_in_the_folder_of_its_benchmark(tmp_path, name, part, file):
    path = write_result(tmp_path, name, "A title", [{"size": 1, "ms": 0.5}], part=part, quiet=True)
    assert path == tmp_path / file.format(date.today().isoformat())
    assert path.read_text().startswith("# A title\n")
    assert json.loads(result_path(tmp_path, name, ".json", part=part).read_text())["rows"] == [{"size": 1, "ms": 0.5}]


def test_no_cell_is_cut_in_print(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    rows = [{f"a long name of column {column}": f"cell {column} of row {row}" for column in range(9)} for row in (0, 1)]
    write_result(tmp_path, "speed", "A title", rows, note="A note of some words. " * 9)
    lines = capsys.readouterr().out.splitlines()
    for row in (list(rows[0]), *(row.values() for row in rows)):
        assert any(all(cell in line for cell in row) for line in lines), row


def test_the_index_links_the_newest_file_of_every_variant(tmp_path):
    for name in ("2026-01-01", "2026-01-02", "2026-01-01_long"):
        (tmp_path / "speed").mkdir(exist_ok=True)
        (tmp_path / "speed" / f"{name}.md").write_text(f"# Speed {name}\n")
    text = index(tmp_path)
    assert "speed/2026-01-02.md" in text
    assert "speed/2026-01-01_long.md" in text
    assert "speed/2026-01-01.md" not in text


def test_the_index_is_up_to_date():
    assert (RESULTS / "README.md").read_text() == index(), "run `python -m benchmarks.result_files`"
