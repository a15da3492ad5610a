"""Every YAML in configs/: the real parser takes it, and it explains itself."""

from __future__ import annotations

import inspect
import re
from importlib import import_module
from pathlib import Path

import pytest
import yaml

from prox24_lightning.callbacks.prox24 import Prox24
from prox24_lightning.cli.compare.command import CompareCLI
from prox24_lightning.cli.compare.config_edit import callback_entries, loaded_class
from prox24_lightning.cli.main import main

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))

each_config = pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)


def test_every_recipe_has_a_config():
    assert {"digits", "bytelm", "text_classifier", "causal_lm"} <= {path.stem for path in CONFIGS}


@each_config
def test_fit_takes_the_config(path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--config", str(path), "--print_config"])
    assert stopped.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["trainer"]["max_steps"] == yaml.safe_load(path.read_text())["trainer"]["max_steps"]


@each_config
def test_compare_takes_the_config_and_finds_what_to_compare(path):
    options = CompareCLI(["--config", str(path)]).config
    classes = [loaded_class(entry) for entry in callback_entries(options)]
    assert classes.count(Prox24) == 1


@each_config
def test_every_value_has_a_comment(path):
    plain = re.compile(r"^\s*(- )?\w+: [^#]+$")
    bare = [line for line in path.read_text().splitlines() if plain.match(line) and "class_path:" not in line]
    assert bare == []


@each_config
@pytest.mark.parametrize("section", ["model", "data"])
def test_every_argument_of_the_recipe_is_in_the_config(path, section):
    entry = yaml.safe_load(path.read_text())[section]
    module, name = entry["class_path"].rsplit(".", 1)
    arguments = set(inspect.signature(getattr(import_module(module), name)).parameters)
    assert arguments == set(entry["init_args"])
