"""``prox24 recipes``: the files that users start from, out of the repository and out of a wheel."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


def test_recipes_and_configs_are_copied(prox24, tmp_path):
    code, out, _ = prox24("recipes", tmp_path / "start")
    assert code == 0
    assert "prox24 fit --config configs/digits.yaml" in out
    for name in ("recipes/digits.py", "recipes/__init__.py", "configs/digits.yaml", "configs/prune/hub_c4.yaml"):
        assert (tmp_path / "start" / name).read_bytes() == (REPOSITORY / name).read_bytes()


def test_files_that_are_there_are_refused_and_kept(prox24, tmp_path):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "digits.yaml").write_text("mine")
    code, _, err = prox24("recipes", tmp_path)
    assert code == 2
    assert "holds configs/digits.yaml already" in err
    assert "--overwrite" in err
    assert (tmp_path / "configs" / "digits.yaml").read_text() == "mine"
    assert not (tmp_path / "recipes").exists()


def test_overwrite_replaces_them_and_leaves_other_files(prox24, tmp_path):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "digits.yaml").write_text("old")
    (tmp_path / "configs" / "mine.yaml").write_text("mine")
    assert prox24("recipes", tmp_path, "--overwrite", "true")[0] == 0
    assert (tmp_path / "configs" / "digits.yaml").read_bytes() == (REPOSITORY / "configs/digits.yaml").read_bytes()
    assert (tmp_path / "configs" / "mine.yaml").read_text() == "mine"


def test_a_folder_that_cannot_be_made_is_refused(prox24, tmp_path):
    (tmp_path / "file").write_text("")
    code, _, err = prox24("recipes", tmp_path / "file" / "start")
    assert code == 2
    assert "is a file" in err


def run(*words, **options):
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel of the repository's files as they are, built from a copy so that no build folder stays."""
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("prox24_lightning", "recipes", "configs"):
        run("cp", "-r", REPOSITORY / name, copy / name)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        (copy / name).write_bytes((REPOSITORY / name).read_bytes())
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", out, copy)
    [path] = out.glob("*.whl")
    return path


@pytest.mark.slow
def test_the_wheel_holds_kernels_and_recipes_but_no_package_of_that_name(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"prox24_lightning"}
    for sources in ("prox24_lightning/convert/kernels", "recipes", "configs"):
        for path in (REPOSITORY / sources).rglob("*"):
            if path.suffix in (".cu", ".yaml") or (path.suffix == ".py" and sources == "recipes"):
                file = path.relative_to(REPOSITORY).as_posix()
                assert file.removeprefix("prox24_lightning/") in {
                    name.removeprefix("prox24_lightning/").removeprefix("cli/_recipes/") for name in names
                }


@pytest.mark.slow
def test_who_installed_the_wheel_runs_a_recipe(wheel, tmp_path):
    site, work = tmp_path / "site", tmp_path / "work"
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", site, wheel)
    environment = {**os.environ, "PYTHONPATH": str(site)}
    prox24 = (sys.executable, "-m", "prox24_lightning.cli.main")
    where = run(sys.executable, "-c", "import prox24_lightning as p; print(p.__file__)", env=environment, cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(site)
    run(*prox24, "recipes", work, env=environment, cwd=tmp_path)
    options = ["--trainer.max_steps=2", "--trainer.limit_val_batches=1", "--trainer.accelerator=cpu"]
    small = ["--model.channels=4", "--model.hidden=8"]
    run(*prox24, "fit", "--config", "configs/digits.yaml", *options, *small, env=environment, cwd=work)
    assert list(work.rglob("*.ckpt")), "the recipe has run and saved its end"
