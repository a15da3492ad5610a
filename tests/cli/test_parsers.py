"""Words of the command line: lists, switches, settings of Prox24, the order of a help text."""

from __future__ import annotations

import re
import signal
from pathlib import Path
from typing import Literal

import pytest
import yaml

from prox24_lightning.cli import main
from prox24_lightning.cli.parsers import CommandParser, readable
from prox24_lightning.cli.prox24_settings import take_settings

MODEL = "lightning.pytorch.demos.boring_classes.BoringModel"


def parser():
    found = CommandParser(prog="prox24 x", exit_on_error=False)
    found.add_argument("--seeds", type=list[int], default=[0])
    found.add_argument("--skip", type=list[str] | None, default=None)
    found.add_argument("--overwrite", type=bool, default=False)
    found.add_argument("--order", type=bool | Literal["stream"], default=False)
    found.add_argument("--smooth", type=bool | None, default=False)
    found.add_argument("--rate", type=float, default=0.0)
    return found


def test_help_is_free_of_markup():
    shown = parser()
    shown.add_argument(
        "--folder", type=Path, help="as in :class:`~prox24_lightning.schedules.Schedule`, ``null`` for none"
    )
    text = " ".join(shown.format_help().split())
    assert "--folder FOLDER as in Schedule, null for none (type: Path" in text
    assert "--seeds ITEM ..." in text


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--seeds 0 1", {"seeds": [0, 1]}),
        ("--seeds 3", {"seeds": [3]}),
        ("--seeds [4,5]", {"seeds": [4, 5]}),
        ("--seeds=[6]", {"seeds": [6]}),
        ("--seeds -1 2 --rate -0.5", {"seeds": [-1, 2], "rate": -0.5}),
        ("--skip a.* 7", {"skip": ["a.*", "7"]}),
        ("--skip null", {"skip": None}),
        ('--skip ["a.*"]', {"skip": ["a.*"]}),
        ("--overwrite", {"overwrite": True}),
        ("--overwrite --seeds 1", {"overwrite": True, "seeds": [1]}),
        ("--overwrite false", {"overwrite": False}),
        ("--overwrite=true", {"overwrite": True}),
        ("--order --seeds 1", {"order": True, "seeds": [1]}),
        ("--order stream --seeds 1", {"order": "stream", "seeds": [1]}),
        ("--order false", {"order": False}),
        ("--smooth --seeds 1", {"smooth": True, "seeds": [1]}),
        ("--smooth null --seeds 1", {"smooth": None, "seeds": [1]}),
    ],
)
def test_lists_and_switches(words, expected):
    found = vars(parser().parse_args(words.split()))
    assert {name: found[name] for name in expected} == expected


def test_a_list_ends_where_a_short_option_begins():
    assert readable(parser(), ["--seeds", "0", "1", "-c", "x"]) == ["--seeds=[0, 1]", "-c", "x"]


TYPED = [name for name, command in main.COMMANDS.items() if command.typed]


@pytest.mark.parametrize("name", TYPED)
def test_own_options_come_first_and_all_have_a_default_and_words(name, capsys):
    with pytest.raises(SystemExit):
        main.main([name, "--help"])
    text = capsys.readouterr().out
    assert text.splitlines()[0] == " ".join(
        part for part in ("usage: prox24", name, main.COMMANDS[name].words, "[options]") if part
    )
    order = re.findall(r"^  (--?\w[\w.]*)", text, re.MULTILINE)
    general = [order.index(option) for option in ("-h", "--config", "--print_config")]
    assert min(general) > max(n for n, option in enumerate(order) if option not in ("-h", "--config", "--print_config"))
    for entry in (" ".join(part.split()) for part in re.split(r"\n(?=  -)", text)[1:]):
        option = entry.split()[0]
        if not re.match(r"-h|--config|--print_config|--model$|.*\.help", option):
            assert "default: " in entry or "required" in entry, option
            assert len(entry.partition("(type:")[0].split()) > 3, option


def test_compare_shows_its_own_options_then_those_of_prox24(capsys):
    with pytest.raises(SystemExit):
        main.main(["compare", "--help"])
    text = capsys.readouterr().out
    places = [text.index(word) for word in ("  --seeds", "  --overwrite", "  --prox24.start", "  --trainer.max_steps")]
    assert places == sorted(places)


def config(tmp_path, *callbacks):
    path = tmp_path / "run.yaml"
    trainer = {
        **{"max_steps": 2, "accelerator": "cpu", "enable_checkpointing": False, "enable_progress_bar": False},
        **{"callbacks": [{"class_path": "prox24_lightning.Prox24", "init_args": given} for given in callbacks]},
        **{"default_root_dir": str(tmp_path), "enable_model_summary": False},
    }
    path.write_text(yaml.safe_dump({"seed_everything": 0, "model": {"class_path": MODEL}, "trainer": trainer}))
    return path


@pytest.mark.parametrize("callbacks", [({"start": 0.3, "freeze": 0.6, "strategy": "post_step"},), ()])
def test_settings_of_prox24_take_the_place_of_the_configs(prox24, tmp_path, callbacks):
    words = ("--prox24.start", "0.1", "--prox24.targets", "layer", "--prox24.verbose=false", "--prox24.freeze", "1")
    code, _, err = prox24("fit", "--config", config(tmp_path, *callbacks), *words)
    assert code == 0, err
    [saved] = tmp_path.rglob("config.yaml")
    [entry] = yaml.safe_load(saved.read_text())["trainer"]["callbacks"]
    arguments = entry["init_args"]
    assert (arguments["start"], arguments["freeze"], arguments["targets"]) == (0.1, 1, ["layer"])
    assert arguments["verbose"] is False
    assert arguments.get("strategy") == ("post_step" if callbacks else None)


@pytest.mark.parametrize(
    ("callbacks", "words", "sentence"),
    [
        (1, ["--prox24.strat", "post_step"], "unrecognized arguments: --prox24.strat post_step"),
        (
            1,
            ["--prox24.strategy", "fast"],
            "prox24.strategy: expected one of 'post_step', 'progressive', 'keep', got fast",
        ),
        (1, ["--prox24.start", "0.9", "--prox24.freeze", "0.5"], "start=0.9 comes after freeze=0.5"),
        (2, ["--prox24.start", "0.1"], "--prox24.* is for one Prox24, and the config has 2: change them there"),
    ],
)
def test_settings_that_cannot_work_end_in_one_sentence(prox24, tmp_path, callbacks, words, sentence):
    path = config(tmp_path, *({"name": f"p{number}"} for number in range(callbacks)))
    code, _, err = prox24("fit", "--config", path, *words)
    assert code == 2
    [line] = [line for line in err.splitlines() if line.startswith("prox24")]
    assert sentence in line


def test_settings_are_split_from_the_other_words():
    words = ["--config", "x.yaml", "--prox24.skip", "a", "b", "--trainer.max_steps", "-1", "--prox24.start=3"]
    others, settings = take_settings(words, "prox24 fit")
    assert others == ["--config", "x.yaml", "--trainer.max_steps", "-1"]
    assert settings == {"skip": ["a", "b"], "start": 3}


def test_scoring_commands_take_none(prox24, tmp_path):
    code, _, err = prox24("validate", "--config", config(tmp_path), "--prox24.start", "0.1")
    assert code == 2
    assert "unrecognized arguments: --prox24.start" in err


def test_ctrl_c_in_a_fit_ends_with_the_code_of_an_interrupt(prox24, tmp_path, monkeypatch):
    def training_step(self, *args):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"{MODEL}.training_step", training_step)
    handler = signal.getsignal(signal.SIGINT)
    try:
        code, _, err = prox24("fit", "--config", config(tmp_path))
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning ignores further ones from then on
    assert code == 130
    assert err.splitlines()[-1] == "prox24 fit: interrupted"
    assert "Traceback" not in err


def test_the_first_word_of_prune_is_the_model(prox24, tmp_path):
    code, _, err = prox24("prune", tmp_path / "gone", "--text", tmp_path / "gone.txt")
    assert code == 2
    assert f"there is no text {tmp_path / 'gone.txt'}" in err
