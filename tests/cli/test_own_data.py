"""``prox24 prune --text``: calibration and evaluation on text of the user's own; output folders that exist."""

from __future__ import annotations

import json

import pytest
from tiny_language import Chains, save_tiny_llama
from transformers import BloomConfig, GPT2Config, LlamaConfig

from prox24_lightning.io.pretrained import Pretrained, check_positions, positions

QUICK = ("--sequences", 4, "--length", 16, "--eval_sequences", 2, "--batch_size", 2, "--steps", 3)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A tiny model, and text as a file, a folder and JSONL."""
    home = tmp_path_factory.mktemp("home")
    save_tiny_llama(home / "model")
    chains = Chains(40)
    calibration, evaluation = (list(chains.texts(split)) for split in ("calibration", "evaluation"))
    (home / "own.txt").write_text("\n\n".join(calibration))
    (home / "folder").mkdir()
    (home / "folder" / "a.md").write_text("\n\n".join(calibration))
    (home / "held_out.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in evaluation))
    (home / "short.txt").write_text("w1 w2 w3\n\nw4 w5 w6")
    (home / "empty.txt").write_text("\n\n")
    return home


def prune(prox24, home, out, *words):
    return prox24("prune", "--model.name", home / "model", "--output", out, *QUICK, *words)


@pytest.mark.parametrize(
    ("words", "card"),
    [
        (["--text", "own.txt"], "own.txt, a fifth of its documents held out by content"),
        (["--text", "folder", "--eval_text", "held_out.jsonl"], "calibration folder, evaluation held_out.jsonl"),
    ],
)
def test_text_of_the_users_own(prox24, home, tmp_path, monkeypatch, words, card):
    places = [home / word if not word.startswith("--") else word for word in words]
    code, out, err = prune(prox24, home, tmp_path / "out", *places)
    assert code == 0, err
    assert "held-out perplexity, dense" in out
    flat = " ".join(out.split())
    assert f"next: prox24 doctor {tmp_path / 'out'} says what it gains, prox24 convert " in flat
    page = (tmp_path / "out" / "README.md").read_text()
    monkeypatch.chdir(tmp_path / "out")
    exec(page.split("```python\n")[1].split("```")[0], found := {})
    assert type(found["model"]).__name__ == "LlamaForCausalLM"
    assert f"| data | {card} |" in page
    assert "2:4 already" not in out
    if "--eval_text" in words:
        again = prox24("prune", tmp_path / "out", "--output", tmp_path / "again", *QUICK, *places)[1]
        assert "14 of 14 weights are 2:4 already and get new masks; --method keep keeps" in " ".join(again.split())
        assert "of its passages of 30 words stand in the calibration text too" in page


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--text", "gone.txt"], "there is no text .*gone.txt: name a file or a folder"),
        (["--text", "empty.txt"], "empty.txt holds no text"),
        (
            ["--text", "own.txt", "--sequences", 1000],
            "the calibration text .*own.txt.* make 6. sequences of 16, but 1000",
        ),
        (["--text", "own.txt", "--eval_text", "short.txt"], "the evaluation text .* make 0 sequences of 16, but 2 are"),
        (["--text", "own.txt", "--data", "prox24_lightning.io.texts.PythonTopics"], "both data and text are given"),
        (["--eval_text", "own.txt"], "text is missing"),
        (
            ["--text", "own.txt", "--length", 65],
            r"the 64 positions .*\(max_position_embeddings in .*--length 64 or less",
        ),
        (["--text", "own.txt", "--length", 0], "length=0 must be 1 or more"),
        (["--text", "own.txt", "--budget", 1.5], r"budget=1.5 must lie in \[0, 1\)"),
    ],
)
def test_text_that_cannot_serve_is_refused_before_the_model_is_loaded(
    prox24, home, tmp_path, monkeypatch, words, message
):
    monkeypatch.setattr("prox24_lightning.io.pretrained.Pretrained.model", lambda self: pytest.fail("loaded"))
    places = [home / word if str(word).endswith(".txt") else word for word in words]
    code, _, err = prune(prox24, home, tmp_path / "out", *places)
    assert code == 2
    [line] = [line for line in err.splitlines() if line.startswith("prox24 prune: ")]
    import re

    assert re.search(message, line), line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["prune", "--model.name", "nowhere", "--text", "x", "--output"],
        ["convert", "nowhere"],
        ["bench", "nowhere", "--output"],
        ["study", "--size", "tiny", "--output"],
    ],
    ids=lambda words: words[0],
)
def test_an_output_folder_that_exists_is_refused_first(prox24, tmp_path, words):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("kept")
    code, _, err = prox24(*words, tmp_path / "out")
    assert code == 2
    assert err == (
        f"prox24 {words[0]}: {tmp_path / 'out'} exists and holds mine.txt: name another folder, or replace files with "
        "--overwrite\n"
    )


def test_an_output_is_replaced_when_asked_for(prox24, home, tmp_path):
    for words in ([], ["--overwrite", "true"]):
        code, _, err = prune(prox24, home, tmp_path / "out", "--text", home / "own.txt", *words)
        assert code == 0, err


def test_the_length_is_held_against_the_name_that_the_config_has(tmp_path):
    GPT2Config(n_positions=64).save_pretrained(tmp_path)
    Pretrained(str(tmp_path)).check_length(64)
    with pytest.raises(ValueError, match=r"length=100 is more than the 64 positions .*\(n_positions in its config\)"):
        Pretrained(str(tmp_path)).check_length(100)
    BloomConfig().save_pretrained(tmp_path)  # no number of positions
    Pretrained(str(tmp_path)).check_length(10**6)


@pytest.mark.parametrize(
    ("rope", "longest"),
    [
        ({"rope_type": "linear", "factor": 4.0}, 256),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}, 128),
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 4}, 64),
        ({"rope_type": "default"}, 64),
    ],
)
def test_scaled_rotary_embeddings_have_the_scaled_number_of_positions(rope, longest):
    config = LlamaConfig(max_position_embeddings=64)
    config.rope_parameters = rope
    assert positions(config) == ("max_position_embeddings", longest)
    check_positions(config, {"length": longest})
    with pytest.raises(ValueError, match=f"prefill={longest + 1} is more than the {longest} positions .*--prefill"):
        check_positions(config, {"length": longest, "prefill": longest + 1})
    config.rope_parameters = {"full_attention": rope, "sliding_attention": {"rope_type": "default"}}
    assert positions(config)[1] == longest


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--skip", "nomatch*"], "skip pattern 'nomatch*' matches no weight"),
        (["--blocks", "layers"], "blocks='layers'"),
    ],
)
def test_names_are_checked_before_the_perplexity_of_the_dense_model(
    prox24, home, tmp_path, monkeypatch, words, message
):
    monkeypatch.setattr("prox24_lightning.cli.prune.perplexity", lambda *_: pytest.fail("computed"))
    code, _, err = prune(prox24, home, tmp_path / "out", "--text", home / "own.txt", *words)
    assert code == 2
    assert message in err
