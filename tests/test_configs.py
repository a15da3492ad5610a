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
WHOLE = [path for path in CONFIGS if "data" in yaml.safe_load(path.read_text())]
"""Those that need no other before them."""

each_config = pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
each_whole_config = pytest.mark.parametrize("path", WHOLE, ids=lambda path: path.stem)


def options_of(path):
    """The configs of the command in the header that ends with this one."""
    commands = re.findall(r"^#\s+prox24 fit((?: --config \S+)+)", path.read_text(), flags=re.MULTILINE)
    (options,) = {command for command in commands if command.endswith(f"/{path.name}")}
    return options.split()


def values_of(section):
    return {key: value for key, value in section.items() if not isinstance(value, (dict, list))}


def test_every_recipe_has_a_config():
    assert {"digits", "bytelm", "text_classifier", "causal_lm"} <= {path.stem for path in WHOLE}


@each_config
def test_the_command_in_its_header_takes_the_config(path, capsys, monkeypatch):
    monkeypatch.chdir(path.parents[1])
    with pytest.raises(SystemExit) as stopped:
        main(["fit", *options_of(path), "--print_config"])
    assert stopped.value.code == 0
    printed, written = yaml.safe_load(capsys.readouterr().out), yaml.safe_load(path.read_text())
    assert values_of(written["trainer"]).items() <= printed["trainer"].items()
    assert values_of(written["model"]["init_args"]).items() <= printed["model"]["init_args"].items()


@each_config
def test_compare_takes_the_config_and_finds_what_to_compare(path, monkeypatch):
    monkeypatch.chdir(path.parents[1])
    options = CompareCLI(options_of(path)).config
    classes = [loaded_class(entry) for entry in callback_entries(options)]
    assert classes.count(Prox24) == (path.stem != "causal_lm_teacher")


@each_config
def test_every_value_has_a_comment(path):
    plain = re.compile(r"^\s*(- )?\w+: [^#]+$")
    bare = [line for line in path.read_text().splitlines() if plain.match(line) and "class_path:" not in line]
    assert bare == []


@each_whole_config
@pytest.mark.parametrize("section", ["model", "data"])
def test_every_argument_of_the_recipe_is_in_the_config(path, section):
    entry = yaml.safe_load(path.read_text())[section]
    module, name = entry["class_path"].rsplit(".", 1)
    arguments = set(inspect.signature(getattr(import_module(module), name)).parameters)
    assert arguments == set(entry["init_args"])
