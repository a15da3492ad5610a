"""``prox24 compare --lrs``: every variant gets its own best learning rate, chosen on other data and another seed."""

import json
from pathlib import Path

import pytest
import torch
from jsonargparse import Namespace
from lightning.pytorch import LightningModule
from tiny_runs import quiet_trainer

from prox24_lightning.cli.compare.comparison import Comparison, Run
from prox24_lightning.cli.compare.config_edit import rate_key
from prox24_lightning.cli.compare.early_search import EarlySearch
from prox24_lightning.cli.main import main

CONFIG = Path(__file__).parent.parent.parent / "configs" / "digits.yaml"
TINY = [
    *("--model.channels=4", "--model.hidden=8", "--data.batch_size=16", "--trainer.max_steps=20"),
    *("--trainer.val_check_interval=10", "--trainer.limit_val_batches=4", "--trainer.enable_progress_bar=false"),
    "--trainer.accelerator=cpu",
]


def words(output, *more):
    return ["compare", "--config", str(CONFIG), "--output", str(output), "--overwrite", "true", *TINY, *more]


def test_the_seeds_run_with_the_best_rate_of_each_variant(tmp_path):
    main(
        words(
            tmp_path, "--variants", "dense", "prox24", "--lrs", "[1e-9, 2e-2]", "--metric", "val_loss", "--mode", "min"
        )
    )
    runs = json.loads((tmp_path / "comparison.json").read_text())["runs"]
    assert [(run["variant"], run["lr"], run["seed"]) for run in runs if run["search"]] == [
        (variant, rate, 1000) for variant in ("dense", "prox24") for rate in (1e-9, 2e-2)
    ]
    assert [(run["variant"], run["lr"], run["seed"]) for run in runs if not run["search"]] == [
        ("dense", 2e-2, 0),
        ("prox24", 2e-2, 0),
    ]
    page = (tmp_path / "comparison.md").read_text()
    assert "Prox24, rate 0.02" in page
    assert "the best rate, 0.02, is the largest that was tried; add larger ones" in page


def test_a_search_may_end_early_and_goes_by_the_training_loss_until_then(tmp_path, recwarn):
    rates = ("--lrs", "[1e-9, 1e-2]", "--search_part", "0.5", "--metric", "val_acc", "--mode", "max")
    main(words(tmp_path, "--variants", "prox24", *rates))
    runs = json.loads((tmp_path / "comparison.json").read_text())["runs"]
    assert [(run["lr"], run["steps"], run["search"]) for run in runs] == [
        (1e-9, 10, True),
        (1e-2, 10, True),
        (1e-2, 20, False),
    ]
    assert runs[0]["score"] > runs[1]["score"] > 0
    assert not [warning for warning in recwarn if "before the freeze" in str(warning.message)]


class CountedLosses(LightningModule):
    """Has a loss of 1, 2, 3 and so on in its batches."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.batches = 0

    def training_step(self, batch):
        self.batches += 1
        return self.batches + 0 * self.weight.sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize("least", [{}, {"min_steps": 16}, {"min_epochs": 2}])
def test_the_loss_of_a_search_is_that_of_the_second_half_of_its_part(least):
    search, module = EarlySearch(0.4), CountedLosses()
    data = torch.utils.data.DataLoader(torch.zeros(10, 1))
    quiet_trainer(max_steps=20, callbacks=[search], **least).fit(module, data)
    assert (module.batches, search.loss) == (8, 6.5)  # the mean of 5, 6, 7 and 8


def test_a_part_without_rates_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(words(tmp_path, "--search_part", "0.5"))
    assert "search_part=0.5 ends the runs that try rates: name the rates by --lrs" in capsys.readouterr().err


@pytest.mark.parametrize("part", ["0", "1"])
def test_a_part_that_is_none_is_refused(tmp_path, capsys, part):
    with pytest.raises(SystemExit):
        main(words(tmp_path, "--lrs", "[0.001]", "--search_part", part))
    assert "must lie between 0 and 1: a search run ends" in capsys.readouterr().err


def test_the_best_rate_follows_the_mode_and_leaves_out_what_diverged():
    runs = [
        Run("prox24", 9, score, lr=lr, search=True) for lr, score in ((1e-4, 2.0), (3e-4, 1.5), (1e-3, float("nan")))
    ]
    for mode, rate in (("min", 3e-4), ("max", 1e-4)):
        assert Comparison("val_loss", mode, "", "", {}, runs).best_rate("prox24") == rate
    assert Comparison("val_loss", "min", "", "", {}, runs).best_rate("dense") is None


def test_where_the_config_holds_the_rate():
    config = Namespace(model=Namespace(init_args=Namespace(learning_rate=0.1, peak=0.2)))
    assert rate_key(config, None) == "model.init_args.learning_rate"
    assert rate_key(config, "model.init_args.peak") == "model.init_args.peak"
    with pytest.raises(ValueError, match="name the learning rate by --lr_key"):
        rate_key(Namespace(model=Namespace(init_args=Namespace(peak=0.2))), None)
    with pytest.raises(ValueError, match="'model.rate' is no number of the config"):
        rate_key(config, "model.rate")


def test_rates_are_not_chosen_on_a_reported_seed(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(words(tmp_path, "--lrs", "[0.001]", "--seeds", "1000"))
    assert "search_seed=1000 is one of the seeds" in capsys.readouterr().err
