"""``prox24 compare`` on the digits recipe at a tiny size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from prox24_lightning.cli.compare import command as compare_module
from prox24_lightning.cli.main import main

CONFIG = Path(__file__).parent.parent.parent / "configs" / "digits.yaml"
TINY = [
    "--model.channels=4",
    "--model.hidden=8",
    "--data.batch_size=16",
    "--trainer.max_steps=20",
    "--trainer.val_check_interval=10",
    "--trainer.limit_val_batches=4",
    "--trainer.enable_progress_bar=false",
    "--trainer.accelerator=cpu",
]


def words(output: Path, *more: str, config: Path = CONFIG) -> list[str]:
    return ["compare", "--config", str(config), "--output", str(output), "--overwrite", "true", *TINY, *more]


def results(output: Path) -> list[dict]:
    return json.loads((output / "comparison.json").read_text())["runs"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A comparison with two seeds."""
    output = tmp_path_factory.mktemp("compare")
    main(words(output, "--seeds", "0", "1"))
    return output


def test_every_variant_runs_with_every_seed(finished):
    pairs = [(run["variant"], run["seed"]) for run in results(finished)]
    assert pairs == [(variant, seed) for seed in (0, 1) for variant in ("dense", "asp", "prox24")]


def test_variants_take_equal_steps_on_equal_batches(finished):
    assert {run["steps"] for run in results(finished)} == {20}
    batches = {(run["seed"], run["batches"]) for run in results(finished)}
    assert len(batches) == 2
    assert len({checksum for _, checksum in batches}) == 2


def test_seeds_are_set_before_anything_is_built(tmp_path, monkeypatch):
    monkeypatch.setattr(compare_module, "seed_everything", lambda *args, **options: None)
    main(words(tmp_path, "--variants", "dense", "--seeds", "0", "1"))
    first, second = results(tmp_path)
    assert first["batches"] != second["batches"]


def test_only_the_pruned_variants_are_2_4(finished):
    for run in results(finished):
        assert run["groups"] == 36 * 8 // 4 + 128 * 8 // 4
        assert run["sparse"] == (0 if run["variant"] == "dense" else run["groups"])


@pytest.mark.parametrize(("geometry", "groups"), [("column", 36 * 8 // 4 + 128 * 8 // 4), ("block", 2 * 328)])
def test_groups_are_counted_along_the_geometry_of_the_config(tmp_path, geometry, groups):
    config = tmp_path / "geometry.yaml"
    config.write_text(CONFIG.read_text().replace("        start: ", f"        geometry: {geometry}\n        start: "))
    main(words(tmp_path, "--variants", "asp", config=config))
    (run,) = results(tmp_path)
    assert (run["sparse"], run["groups"]) == (groups, groups)


def test_score_is_the_monitored_metric(finished):
    assert all(run["score"] == run["scores"]["val_acc"] for run in results(finished))
    assert json.loads((finished / "comparison.json").read_text())["mode"] == "max"


def test_the_final_score_can_be_that_of_the_test_data(tmp_path, monkeypatch):
    monkeypatch.setattr(compare_module.Trainer, "validate", None)
    main(words(tmp_path, "--variants", "dense", "--split", "test"))
    (run,) = results(tmp_path)
    assert run["score"] == run["scores"]["test_acc"]
    assert "test_acc (higher is better)" in (tmp_path / "comparison.md").read_text()


@pytest.mark.parametrize(
    ("monitor", "name"),
    [
        ("val_acc", "test_acc"),
        ("val/acc", "test/acc"),
        ("valid_loss", "test_loss"),
        ("validation/loss", "test/loss"),
        ("acc/val", "acc/test"),
        ("value_loss", "test_value_loss"),
        ("acc", "test_acc"),
    ],
)
def test_the_test_metric_is_named_like_that_of_the_validation(monitor, name):
    options = compare_module.CompareCLI(["--config", str(CONFIG), "--split", "test"]).config
    options.trainer.callbacks[0].init_args.monitor = monitor
    assert compare_module._metric(options) == (name, "max")


def test_each_run_has_its_own_logs_and_checkpoint(finished):
    for variant in ("dense", "asp", "prox24"):
        for seed in (0, 1):
            folder = finished / variant / f"seed{seed}"
            assert (folder / "checkpoints" / "last.ckpt").is_file()
            assert list(folder.glob("events.out.tfevents.*"))


@pytest.mark.filterwarnings("ignore:freeze=1.0 is the end of the run")
def test_asp_is_dense_until_it_prunes(tmp_path):
    """Pruned after the last step, its weights are the dense run's largest two of every four."""
    main(words(tmp_path, "--variants", "dense", "asp", "--asp_at", "1.0"))
    dense, asp = (
        torch.load(tmp_path / variant / "seed0" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for variant in ("dense", "asp")
    )
    weight = dense["model.6.weight"].unflatten(1, (-1, 4))
    kept = torch.zeros_like(weight).scatter_(-1, weight.abs().topk(2).indices, 1.0)
    assert torch.equal((weight * kept).flatten(1), asp["model.6.weight"])
    assert torch.equal(dense["model.0.weight"], asp["model.0.weight"])


def test_table_and_places_are_printed(tmp_path, capsys):
    main(words(tmp_path, "--variants", "dense"))
    printed = capsys.readouterr().out.replace("\n", "")
    assert "run 1 of 1: dense, seed 0" in printed
    assert "20 optimizer steps a run" in printed
    assert "tensorboard --logdir" in printed


def test_a_crash_keeps_the_finished_rows(tmp_path, monkeypatch):
    run = compare_module._run

    def crash_in_asp(words, variant, *rest):
        if variant == "asp":
            raise RuntimeError("out of memory")
        return run(words, variant, *rest)

    monkeypatch.setattr(compare_module, "_run", crash_in_asp)
    with pytest.raises(SystemExit) as stopped:
        main(words(tmp_path, "--variants", "dense", "asp"))
    assert stopped.value.code == 1
    dense, asp = results(tmp_path)
    assert dense["score"] is not None
    assert asp["error"] == "RuntimeError: out of memory"


def test_finished_rows_are_on_disk_before_the_next_run(tmp_path, monkeypatch):
    run = compare_module._run

    def stop_at_asp(words, variant, *rest):
        if variant == "asp":
            raise KeyboardInterrupt
        return run(words, variant, *rest)

    monkeypatch.setattr(compare_module, "_run", stop_at_asp)
    with pytest.raises(SystemExit) as stopped:
        main(words(tmp_path, "--variants", "dense", "asp"))
    assert stopped.value.code == 130
    assert [row["variant"] for row in results(tmp_path)] == ["dense"]


def test_a_metric_that_is_never_logged_is_refused_before_training(tmp_path, monkeypatch, prox24):
    monkeypatch.setattr(compare_module, "_run", lambda *args: pytest.fail("trained"))
    code, _, printed = prox24(*words(tmp_path, "--metric", "val_f1", "--mode", "max"))
    assert code == 2
    assert "validation logged no 'val_f1', only val_acc, val_loss" in printed
    assert not list(tmp_path.glob("*/*")), "nothing is left behind"


def test_a_metric_that_was_not_logged_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(compare_module, "_check_metric", lambda *args: None)
    with pytest.raises(SystemExit):
        main(words(tmp_path, "--variants", "dense", "--metric", "val_f1", "--mode", "max"))
    assert "validation logged no 'val_f1', only val_acc, val_loss" in results(tmp_path)[0]["error"]


@pytest.fixture
def edited(tmp_path):
    """The config without one of its callbacks."""

    def without(name: str) -> Path:
        head, *entries = CONFIG.read_text().split("    - class_path: ")
        path = tmp_path / "edited.yaml"
        path.write_text("    - class_path: ".join([head, *(text for text in entries if name not in text)]))
        return path

    return without


def test_an_output_that_holds_files_is_refused(tmp_path, prox24):
    (tmp_path / "mine.txt").write_text("kept")
    code, _, printed = prox24(*words(tmp_path, "--overwrite", "false"))
    assert code == 2
    assert f"prox24 compare: {tmp_path} exists and holds mine.txt: name another folder" in printed


def test_a_config_without_prox24_is_refused(tmp_path, edited, prox24):
    code, _, printed = prox24(*words(tmp_path, config=edited("Prox24")))
    assert code == 2
    assert printed.startswith("prox24 compare: the config has no Prox24 callback")


def test_an_unknown_metric_is_refused_before_the_first_run(tmp_path, edited, prox24):
    code, _, printed = prox24(*words(tmp_path, config=edited("ModelCheckpoint")))
    assert code == 2
    assert "add --metric NAME --mode min or max" in printed
    code, _, printed = prox24(*words(tmp_path, "--metric", "val_loss"))
    assert code == 2
    assert "add --mode min or max" in printed


def test_asp_at_outside_the_run_is_refused(tmp_path, prox24):
    code, _, printed = prox24(*words(tmp_path, "--asp_at", "1.5"))
    assert code == 2
    assert printed.startswith("prox24 compare: asp_at=1.5 must lie between 0")


def test_a_folder_that_cannot_be_made_is_named_in_one_line(tmp_path, prox24):
    (tmp_path / "file").touch()
    code, _, printed = prox24(*words(tmp_path / "file" / "results"))
    assert code == 2
    assert "Traceback" not in printed
    assert str(tmp_path / "file" / "results") in printed


def test_default_output_is_named_after_the_config():
    options = compare_module.CompareCLI(["--config", str(CONFIG)]).config
    assert compare_module._default_output(options).parent == Path("runs/digits")
