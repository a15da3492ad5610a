"""The protocol: every row runs, a cut run goes on, the table says what was measured."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import runpy
import sys
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace

import pytest
import torch
from new_processes import START
from tiny_language import Chains, save_tiny_llama
from torch import nn

from benchmarks.recovery import protocol
from benchmarks.recovery.__main__ import main
from benchmarks.recovery.averages import Averages
from benchmarks.recovery.early_loss import choices
from benchmarks.recovery.language_model import LanguageModel
from benchmarks.recovery.protocol import Job, Results, best_rates, compare, run_all
from benchmarks.recovery.rate_warning import lines as rate_lines
from benchmarks.recovery.recipes import main as recipes
from benchmarks.recovery.rows import FINETUNING, SCRATCH, Row, chosen_rows, further_rows
from benchmarks.recovery.run import fine_tuned_teacher
from benchmarks.recovery.scratch import Recipe
from benchmarks.recovery.summary import excesses, table, warnings, with_averages
from benchmarks.recovery.table import main as again
from prox24_lightning.io.pretrained import Pretrained
from prox24_lightning.mask import is_24

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recovery")
    return {
        "model": Pretrained(save_tiny_llama(folder)),
        "training": Chains(60),
        "evaluation": {"a": Chains(20), "b": Chains(30)},
        "steps": 8,
        "batch_size": 4,
        "length": 16,
        "eval_sequences": 4,
        "warmup_steps": 2,
        "weight_decay": 0.01,
        "calibration_sequences": 6,
        "compile": False,
        "precision": "32-true",
        "cache": folder / "tokens",
    }


@pytest.fixture
def task(settings):
    return LanguageModel(**settings)


@pytest.fixture
def results(tmp_path):
    return Results(tmp_path / "runs.jsonl")


@pytest.mark.parametrize("name", list(FINETUNING))
def test_every_row_runs_through_and_ends_2_4_unless_it_is_dense(name, task, results):
    job = Job(task, name, FINETUNING[name], 0, 1e-2)
    assert run_all([job], results, 1) == 0
    (found,) = results.of([job])
    row = FINETUNING[name]
    if "budget" in row.arguments:
        assert 0.5 < found["share_24"] < 1.0
    else:
        assert found["share_24"] == (0.0 if name.startswith("dense") else 1.0)
    progressive = row.prox24 and row.arguments.get("strategy") != "post_step"
    way = row.arguments.get("calibration", "rerun")
    assert found["calibration"] == (way if progressive else None)
    assert found["steps"] == 8
    assert set(found["losses"]) == {"a", "b"}
    assert len(found["train_losses"]) == 8
    assert (found["pruning_seconds"] > 0) == (FINETUNING[name].prune is not None)


def test_rows_of_a_seed_see_the_same_batches_and_seeds_differ(task, results):
    jobs = [Job(task, name, FINETUNING[name], seed, 1e-2) for name in ("dense", "sr-ste") for seed in (0, 1)]
    run_all(jobs, results, 1)
    found = results.of(jobs)
    assert found[0]["batches"] == found[2]["batches"] != found[1]["batches"] == found[3]["batches"]
    assert warnings(found) == []


def test_the_same_row_twice_gives_the_same_loss(task, tmp_path):
    job = Job(task, "prox24", FINETUNING["prox24"], 0, 1e-2)
    losses = []
    for number in range(2):
        results = Results(tmp_path / str(number))
        run_all([job], results, 1)
        losses.append(results.of([job])[0]["losses"])
    assert losses[0] == losses[1]


def test_processes_share_the_runs_and_give_the_results_of_one(task, tmp_path, monkeypatch):
    prepared = multiprocessing.get_context(START)
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: prepared)
    jobs = [Job(task, name, FINETUNING[name], 0, 1e-2) for name in ("dense", "magnitude")]
    losses = []
    for processes in (1, 2):
        results = Results(tmp_path / str(processes))
        assert run_all(jobs, results, processes) == 0
        losses.append([run["losses"] for run in results.of(jobs)])
    for one, two in zip(*losses, strict=True):
        assert one == pytest.approx(two, rel=1e-4)


def given(settings, **options):
    hidden = {key: value for key, value in settings.items() if key not in ("steps",)}
    return {**hidden, "steps": 4, "seeds": [0], "lr": 1e-2, "rows": ["dense", "magnitude"], **options}


def test_the_command_writes_table_plot_and_runs_and_does_nothing_twice(settings, tmp_path, monkeypatch):
    main(output=tmp_path, **given(settings))
    (page,) = tmp_path.glob("recovery/*.md")
    text = page.read_text()
    assert "| magnitude |" in text
    assert "60 chains of words" in text
    assert page.with_suffix(".png").stat().st_size > 5000
    assert len((tmp_path / "recovery" / "recovery.runs.jsonl").read_text().splitlines()) == 2

    ran = []
    true = protocol.execute

    def counted(*args):
        ran.append(args[1])
        return true(*args)

    monkeypatch.setattr(protocol, "execute", counted)
    main(output=tmp_path, **given(settings))
    assert ran == []
    main(output=tmp_path, keep=tmp_path / "kept", **given(settings, rows=["dense", "magnitude", "wanda"]))
    kept = Pretrained(str(tmp_path / "kept")).load()[0]
    assert all(is_24(layer.weight) for layer in kept.model.layers.modules() if isinstance(layer, nn.Linear))
    assert ran == [FINETUNING["wanda"]]
    assert "| wanda |" in page.read_text()
    main(output=tmp_path, **given(settings, weight_decay=0.0))
    assert len(ran) == 3


def test_a_row_learns_from_the_model_of_an_earlier_run(tmp_path):
    folder = save_tiny_llama(tmp_path)
    options = {"distillation": 0.7, "teacher": {"folder": folder, "temperature": 2.0}}
    row = further_rows({"taught": options})["taught"]
    distillation = row.callbacks(())[0]
    assert (distillation.share, distillation.temperature) == (0.7, 2.0)
    saved = Pretrained(folder).model().state_dict()
    taught = distillation._given.state_dict()
    assert all(torch.equal(taught[name], value) for name, value in saved.items())
    assert row.definition()["teacher"] == options["teacher"]


def test_a_row_fine_tunes_its_teacher_first(task, results):
    options = {"distillation": 1.0, "teacher": {"fine_tuned": {"lr": 1e-2, "embedding_lr": 0.0}}}
    row, dense = further_rows({"taught": options})["taught"], further_rows({"d": {"prox24": False}})["d"]
    teacher, seconds = fine_tuned_teacher(task, row, 0)
    assert seconds > 0
    jobs = [Job(task, "taught", row, 0, 1e-2), Job(task, "dense", dense, 0, 1e-2)]
    assert run_all(jobs, results, 1) == 0
    taught, alone = results.of(jobs)
    assert taught["batches"] == alone["batches"]
    assert taught["teacher_seconds"] > 0
    before, after = task.module(1e-2).model.state_dict(), teacher.state_dict()
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert any("q_proj" in name for name in moved)  # trained, but for the embeddings, whose rate is 0
    assert not any("embed_tokens" in name for name in moved)
    given = row.callbacks((), teacher)[0]._given
    assert given is teacher
    line = next(line for line in table([taught, alone], ["taught"], ["dense"]) if line["row"] == "taught")
    assert float(line["of it teacher"]) == pytest.approx(taught["teacher_seconds"], abs=0.1)


def test_the_table_is_made_again_from_the_runs_alone(settings, tmp_path):
    main(output=tmp_path, **given(settings, rates={"dense": 1e-3}))
    (page,) = tmp_path.glob("recovery/*.md")
    page.unlink()
    again(tmp_path / "recovery" / "recovery.runs.jsonl", tmp_path, lr=1e-2, rates={"dense": 1e-3}, note="Told by hand.")
    text = page.read_text()
    assert "| magnitude |" in text
    assert "| dense |" in text
    assert "Told by hand." in text
    assert "'dense': 0.001" in text
    with pytest.raises(ValueError, match="holds no run of the rows"):
        again(tmp_path / "recovery" / "recovery.runs.jsonl", tmp_path, lr=1e-2, rows=["dense"])


def test_nothing_begins_once_the_time_is_up(settings, tmp_path, capsys):
    main(output=tmp_path, **given(settings, minutes=0.0))
    assert not (tmp_path / "recovery" / "recovery.runs.jsonl").exists()
    assert "left for later" in capsys.readouterr().out


def test_long_is_four_times_the_steps_in_files_of_its_own(settings, tmp_path):
    main(output=tmp_path, **given(settings, steps=2, long=True, rows=["dense"]))
    (line,) = (tmp_path / "recovery" / "long.runs.jsonl").read_text().splitlines()
    assert json.loads(line)["steps"] == 8


@pytest.mark.parametrize("rest", ['{"key": "abc", "losses": {"a": 1.', '{"key": "abc", "losses": {"a": 1.0}'])
def test_a_line_that_was_cut_off_is_run_again_and_later_ones_are_whole(task, results, rest):
    jobs = [Job(task, "dense", FINETUNING["dense"], seed, 1e-2) for seed in (0, 1)]
    results.add(jobs[0], {"losses": {}}, "monday")
    with results.path.open("a") as file:
        file.write(rest)
    again = Results(results.path)
    assert again.missing(jobs) == [jobs[1]]
    again.add(jobs[1], {"losses": {}}, "tuesday")
    assert Results(results.path).missing(jobs) == []


def test_a_run_that_fails_is_told_and_the_others_go_on(task, results, capsys):
    bad = further_rows({"bad": {"strategy": "no such"}})["bad"]
    jobs = [Job(task, "bad", bad, 0, 1e-2), Job(task, "dense", FINETUNING["dense"], 0, 1e-2)]
    assert run_all(jobs, results, 1) == 1
    assert "strategy='no such' is unknown" in capsys.readouterr().out
    assert [run["row"] for run in results.of(jobs)] == ["dense"]


def test_the_search_takes_the_best_rate_of_each_row_and_reports_other_seeds(task, results):
    rows = chosen_rows(["dense", "magnitude"], FINETUNING)
    found, rates, failed = compare(task, rows, [0], 1e-4, [1e-6, 1e-2], 7, 1, results)
    assert failed == 0
    assert rates == {"dense": 1e-2, "magnitude": 1e-2}
    assert [(run["row"], run["seed"], run["lr"]) for run in found] == [("dense", 0, 1e-2), ("magnitude", 0, 1e-2)]
    assert len(results.path.read_text().splitlines()) == 6


def test_the_search_text_is_not_reported(task):
    data = task.data(0)
    loaders = data.val_dataloader()
    assert list(loaders) == ["a", "b", "search"]
    reported, searched = (set(loaders[name].dataset.order.tolist()) for name in ("b", "search"))
    assert len(reported) == len(searched) == 4
    assert not reported & searched
    assert task.losses({"val_loss_a": 1.0, "val_loss_b": 2.0, "val_loss_search": 3.0}) == {"a": 1.0, "b": 2.0}


def test_best_rate_is_that_of_the_smallest_search_loss(task):
    tried = [("x", 1e-3, 2.0), ("x", 1e-4, 1.5), ("y", 1e-3, 1.0), ("y", 1e-4, 1.1)]
    assert best_rates(searched(tried), task) == {"x": 1e-4, "y": 1e-3}


def searched(tried):
    return [{"row": row, "lr": lr, "scores": {"val_loss_search": loss}} for row, lr, loss in tried]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_rate_whose_search_loss_is_not_finite_is_not_the_best(task, bad):
    assert best_rates(searched([("x", 1e-2, bad), ("x", 1e-4, 2.0)]), task) == {"x": 1e-4}
    with pytest.raises(ValueError, match=r"loss of 'y' is finite at none of lrs=\[0.001, 0.01\]; search smaller"):
        best_rates(searched([("x", 1e-4, 2.0), ("y", 1e-2, bad), ("y", 1e-3, bad)]), task)


def test_a_search_on_a_reported_seed_is_refused(task, results):
    with pytest.raises(ValueError, match="search_seed=1 is among the reported seeds"):
        compare(task, {"dense": FINETUNING["dense"]}, [0, 1], None, [1e-3], 1, 1, results)


def test_an_unknown_row_is_refused():
    with pytest.raises(ValueError, match=r"rows \['sr_ste'\] are unknown; choose from"):
        chosen_rows(["sr_ste"], FINETUNING)


def run(row, seed, a, b, seconds=10.0, pruning=0.0):
    measured = {"seconds": seconds, "pruning_seconds": pruning, "step_ms": 5.0, "longest_step_ms": 50.0}
    facts = {"peak_gib": None, "share_24": 1.0, "batches": 1, "steps": 8, "lr": 1e-4}
    return {"row": row, "seed": seed, "losses": {"a": a, "b": b}, **measured, **facts}


def test_excess_is_above_dense_of_the_same_seed_and_time_in_units_of_plain_fine_tuning(task):
    runs = [run("dense", 0, 1.0, 2.0), run("dense", 1, 1.5, 2.5), run("magnitude", 0, 1.2, 2.4)]
    runs += [run("magnitude", 1, 1.6, 2.8), run("prox24", 0, 1.1, 2.1, seconds=14.0, pruning=2.0)]
    assert excesses(runs)["magnitude"] == pytest.approx({0: 0.3, 1: 0.2})
    dense, magnitude, prox24 = table(runs, ["dense", "magnitude", "wanda", "prox24"], task.plain)
    assert dense["excess, nats"] == "0.0000 ± 0.0000"
    assert magnitude["excess, nats"] == "0.2500 ± 0.0707"
    assert prox24["wall time"] == "1.60"
    assert prox24["ppl a"] == "3.004"


def test_times_compare_within_one_start_only(task):
    """What else runs on the GPU at the time decides how long a run takes."""
    runs = [{**run("magnitude", 0, 1, 1), "start": "alone"}, {**run("prox24", 0, 1, 1, seconds=13.0), "start": "alone"}]
    runs += [{**run("magnitude", 1, 1, 1, seconds=50.0), "start": "shared"}]
    runs += [{**run("sr-ste", 0, 1, 1, seconds=90.0), "start": "another"}]
    lines = {line["row"]: line["wall time"] for line in table(runs, ["magnitude", "prox24", "sr-ste"], task.plain)}
    assert lines == {"magnitude": "1.00", "prox24": "1.30", "sr-ste": ""}


def test_unequal_data_is_told():
    runs = [run("dense", 0, 1, 1), {**run("prox24", 0, 1, 1), "batches": 2, "steps": 7}]
    assert [line.split(":")[1] for line in warnings(runs)] == [
        " the rows did not see the same training batches",
        " the rows did not take the same number of steps",
    ]


def test_a_variant_is_prox24_with_other_arguments():
    row = further_rows({"late": {"start": 0.6, "distillation": 0.3}})["late"]
    assert row.prox24
    assert row.arguments == {"start": 0.6}
    assert row.distillation == 0.3
    given = {"dense": {"prox24": False, "module": {"final": 0.0}}, "once": {"prune": {"method": "wanda"}}}
    dense, once = further_rows(given).values()
    assert dense == Row(module={"final": 0.0})
    assert once == Row(prune={"method": "wanda"})


def test_averages_of_a_run_are_scored_and_change_none_of_its_own_scores(task):
    variants = {"plain": {}, "averaged": {"averages": True}}
    plain, averaged = (protocol.execute(task, row, 0, 1e-2) for row in further_rows(variants).values())
    assert averaged["scores"] == plain["scores"]
    assert averaged["share_24"] == 1
    assert set(averaged["averages"]) == {"average 0.98", "average 0.995", "0.6 of the last", "0.8 of the last"}
    losses = [scored["losses"]["a"] for scored in averaged["averages"].values()]
    assert len({*losses, plain["losses"]["a"]}) == 5
    run = {**averaged, "row": "averaged", "seed": 0}
    runs, rows = with_averages([{**plain, "row": "plain", "seed": 0}, run], ["plain", "averaged"])
    assert rows == ["plain", "averaged", *(f"averaged: {name}" for name in averaged["averages"])]
    assert [one["losses"]["a"] for one in runs[2:]] == losses


def test_mixtures_lie_between_the_freeze_and_the_end():
    module, averages = nn.Linear(1, 1, bias=False), Averages((0.5,))
    trainer = SimpleNamespace(callbacks=[SimpleNamespace()])
    for value in (1.0, 3.0):
        nn.init.constant_(module.weight, value)
        averages.on_train_batch_end(trainer, module)
    found = {name: float(module.weight.detach()) for name in averages.put_in_turn(module)}
    assert found == pytest.approx({"average 0.5": 2.0, "0.6 of the last": 2.2, "0.8 of the last": 2.6})
    assert float(module.weight.detach()) == 3.0


@pytest.mark.parametrize("config", ["digits", "bytelm"])
def test_recipes_run_from_scratch_by_the_same_protocol(config, tmp_path):
    text = (CONFIGS / f"{config}.yaml").read_text()
    sizes = {"max_steps: 600": "max_steps: 10", "blocks: 512": "blocks: 16", "validation: 0.1 ": "validation: 0.02 "}
    for long, short in {**sizes, "128 ": "16 "}.items():
        text = text.replace(long, short)
    (tmp_path / f"{config}.yaml").write_text(text)
    recipes(tmp_path / f"{config}.yaml", output=tmp_path, seeds=[0], rows=["dense", "asp", "sr-ste", "prox24"])
    lines = (tmp_path / "recovery" / f"{config}.runs.jsonl").read_text().splitlines()
    shares = {found["row"]: found["share_24"] for found in map(json.loads, lines)}
    assert shares == {"dense": 0.0, "asp": 1.0, "sr-ste": 1.0, "prox24": 1.0}


def test_prox24_of_a_recipe_takes_the_arguments_of_its_config():
    task = Recipe.of(CONFIGS / "bytelm.yaml")
    assert task.adapted(SCRATCH["prox24"]).arguments["start"] == 0.6
    assert task.adapted(SCRATCH["asp"]).arguments["start"] == 0.5
    assert task.adapted(SCRATCH["sr-ste"]) == SCRATCH["sr-ste"]


def test_the_command_line_of_the_recipes_takes_its_own_argument(monkeypatch):
    command = "benchmarks.recovery.recipes"
    monkeypatch.setattr(sys, "argv", [command, "--recipe", "configs/digits.yaml", "--rows", '["none such"]'])
    monkeypatch.delitem(sys.modules, command)
    with pytest.raises(ValueError, match=r"rows \['none such'\] are unknown"):
        runpy.run_module(command, run_name="__main__")


def test_processes_take_the_gpus_in_turn_and_only_those_that_are_visible(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert protocol._gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-5")
    assert protocol._gpus() == ["3", "GPU-5"]
    monkeypatch.setattr(
        protocol, "_prepare", lambda *arguments: seen.append((*arguments, os.environ["CUDA_VISIBLE_DEVICES"]))
    )
    seen: list[tuple] = []
    queue = SimpleQueue()
    queue.put("GPU-5")
    protocol._begin(queue, 1)
    assert seen == [(1, "GPU-5")]


def test_what_the_training_loss_would_choose_is_priced_on_held_out_text():
    def run(lr, early, late, held_out):
        return {
            "row": "a",
            "lr": lr,
            "losses": {"x": held_out},
            "train_losses": [2.0] * 16 + [early] * 34 + [late] * 50,
        }

    runs = [run(1e-4, 1.9, 1.7, 2.1), run(3e-4, 1.8, 1.6, 2.0), run(1e-3, 1.85, 1.5, 2.3)]
    (line,) = choices([*runs, {**run(1e-4, 1, 1, 1), "row": "alone"}])
    assert line["best on held-out text"] == "0.0003"
    assert list(line.values())[-2:] == ["0.0003 (+0.0000)", "0.001 (+0.3000)"]


def test_the_warning_of_the_rate_is_replayed_on_recorded_runs():
    def run(row, lr, held_out, losses=None, seed=0):
        found = {"key": f"{row} {lr} {seed}", "row": row, "lr": lr, "seed": seed, "steps": 400, "train_losses": losses}
        return {**found, "losses": {"x": held_out}}

    fine, risen = [2.0] * 50, [2.0] * 14 + [3.0] * 2 + [1.9] + [3.0] * 33
    runs = [
        run("dense", 1e-4, 1.8),
        run("prox24", 1e-4, 2.0, fine),
        run("prox24", 3e-4, 2.3, risen),
        run("kept, default solves 2e-3", 2e-3, 2.4, [2.0] * 6 + [3.0] * 44),
        run("slow 1e-3", 1e-3, 2.2, fine),
        run("prox24 distilled", 1e-4, 1.9, risen),
        run("prox24", 1e-3, 2.3),
        run("prox24", 1e-4, 2.3, risen, seed=1),  # no dense run of this seed
    ]
    found = [(line["row"], line["above the best rate"], line["warning"]) for line in rate_lines(runs).values()]
    assert found == [
        ("prox24", "+0%", "none"),
        ("prox24", "+150%", "step 152: 3.00, lowest 1.90, start 2.00"),
        ("embeddings kept", "+50%", "step 64: 3.00, lowest 2.00, start 2.00"),
        ("embeddings kept", "+0%", "none"),
    ]
    noisy = [2.0, 1.5] * 7 + [2.9, 3.1] + [1.9] + [3.0, 1.9] * 16 + [3.0]
    assert [line["warning"] for line in rate_lines([runs[0], run("prox24", 3e-4, 2.3, noisy)]).values()] == ["none"]
