"""What ends a command: one sentence on stderr, and an exit code."""

from __future__ import annotations

import pytest
import yaml

from prox24_lightning.cli import convert, main

MODEL = "lightning.pytorch.demos.boring_classes.BoringModel"


def config(tmp_path, **changes):
    path = tmp_path / "run.yaml"
    callback = {"class_path": "prox24_lightning.Prox24", "init_args": {"start": 0.2, **changes.pop("prox24", {})}}
    trainer = {"max_steps": 2, "accelerator": "cpu", "logger": False, "callbacks": [callback], **changes}
    path.write_text(yaml.safe_dump({"seed_everything": 0, "model": {"class_path": MODEL}, "trainer": trainer}))
    return path


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"max_steps": "lots"}, "trainer.max_steps: expected int, got lots"),
        (
            {"prox24": {"strategy": "progresive"}},
            "strategy: expected one of 'post_step', 'progressive', 'keep', got progresive",
        ),
        (
            {"prox24": {"start": "banana"}},
            "run.yaml: trainer.callbacks: prox24_lightning.Prox24: start: expected int or float, got banana (",
        ),
        ({"prox24": {"strateg": "keep"}}, "Prox24: no option 'strateg'; did you mean 'strategy'?"),
        ({"max_step": 3}, "run.yaml: no option 'trainer.max_step'; did you mean 'trainer.max_steps'?"),
        ({"prox24": {"start": 0.9, "freeze": 0.5}}, "start=0.9 comes after freeze=0.5; sparsification begins before"),
        ({"prox24": {"targets": ["modle.*"]}}, "targets pattern 'modle.*' matches no weight"),
    ],
)
def test_a_config_that_cannot_work_ends_in_one_sentence(prox24, tmp_path, monkeypatch, changes, sentence):
    monkeypatch.chdir(tmp_path)
    code, _, err = prox24("fit", "--config", config(tmp_path, **changes))
    assert code == 2
    [line] = [line for line in err.splitlines() if line.startswith("prox24")]
    assert sentence in line
    assert "usage:" not in err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["doctor"], "prox24 doctor: the following arguments are required: model"),
        (["prune"], "prox24 prune: the following arguments are required: MODEL"),
        (["tradeoff"], "prox24 tradeoff: the following arguments are required: MODEL"),
        (["doctor", "x", "--token_counts", "a"], "prox24 doctor: token_counts: expected int, got a"),
        (["prune", "--model.nam", "x"], "prune: unrecognized arguments: --model.nam x; did you mean '--model.name'?"),
        (["fit", "--prox24.start", "banana"], "prox24 fit: prox24.start: expected int or float, got banana ("),
        (["fit", "--model", "no_such.Net"], "model: no_such.Net: No module named 'no_such', neither installed nor in"),
        (["fit"], "prox24 fit: model is missing: name a config (--config X.yaml) or a class (--model my.Class)"),
        (["fit", "my.yaml"], "prox24 fit: unrecognized arguments: my.yaml; did you mean --config my.yaml? ("),
        (["validate"], "(options: prox24 validate --help)"),
        (["fit", "--config", "gone.yaml"], "prox24 fit: config: File does not exist"),
    ],
)
def test_words_that_cannot_work_end_in_one_sentence(prox24, words, sentence):
    code, _, err = prox24(*words)
    assert code == 2
    assert sentence in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("words", [["fit"], ["prune"]])
@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("model:\n  name\n  other: 1\n", "not YAML: mapping values are not allowed"),
        ("- a\n", "expected lines 'key: value', got - a"),
        ("modle:\n  name: x\n", "no option 'modle'; did you mean 'model'?"),
    ],
)
def test_a_config_that_is_none_is_named(prox24, tmp_path, words, text, sentence):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    code, _, err = prox24(*words, "--config", path)
    assert code == 2
    assert err.startswith(f"prox24 {words[0]}: {path}: {sentence}")
    assert len(err.splitlines()) == 1


def test_the_file_of_a_wrong_key_is_found_among_several(prox24, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "more.yaml").write_text("trainer: {min_step: 1}\n")
    code, _, err = prox24("fit", "--config", "more.yaml", "--config", config(tmp_path))
    assert code == 2
    assert err.startswith("prox24 fit: more.yaml: no option 'trainer.min_step'; did you mean 'trainer.min_steps'?")


def test_an_error_of_the_users_class_keeps_its_traceback(tmp_path, monkeypatch):
    (tmp_path / "broken_net.py").write_text(
        "from lightning.pytorch.demos.boring_classes import BoringModel\n"
        "class Net(BoringModel):\n"
        "    def __init__(self):\n"
        "        [][0]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    options = ["--seed_everything=0", "--trainer.max_steps=1", "--trainer.accelerator=cpu"]
    with pytest.raises(ValueError, match="list index out of range") as caught:
        main.main(["fit", "--model", "broken_net.Net", *options])
    assert isinstance(caught.value.__cause__, IndexError)


def test_ctrl_c_ends_in_one_line(prox24, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(convert, "load_source", interrupted)
    code, out, err = prox24("convert", "gpt2", "out")
    assert (code, out, err) == (130, "", "prox24 convert: interrupted\n")


def test_a_reason_is_not_cut():
    assert convert._reasons({"a.weight": "not 2:4: group 3 has three", "b.weight": "not 2:4: group 1"}) == (
        "a.weight, b.weight: not 2:4"
    )
