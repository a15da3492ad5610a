"""``prox24 compare``: dense, one-shot magnitude (the ASP recipe) and Prox24 from one config, at equal steps.

It takes every config of ``prox24 fit`` with a Prox24 callback. Each variant starts from the same seed, gets the same
batches (their checksums are compared) and takes the same number of optimizer steps; only the pruning differs:

- ``dense``: without Prox24.
- ``asp``: all weights pruned at once by magnitude, ``--asp_at`` of the way, then masked fine-tuning.
- ``prox24``: as configured.
"""

from __future__ import annotations

import gc
import re
import shlex
import sys
import traceback
import warnings
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import Namespace
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser
from rich.console import Console
from typing_extensions import override

from prox24_lightning.callbacks.prox24 import Prox24
from prox24_lightning.cli.callback_entries import callback_entries, loaded_class
from prox24_lightning.cli.compare.comparison import VARIANTS, Comparison, Run, Variant
from prox24_lightning.cli.compare.config_edit import (
    rate_key,
    separate_outputs,
    with_one_shot_magnitude,
    without_conversion,
    without_pruning,
)
from prox24_lightning.cli.compare.early_search import EarlySearch
from prox24_lightning.cli.compare.training_record import TrainingRecord
from prox24_lightning.cli.exit_codes import errors_as_exit
from prox24_lightning.cli.trainer import Prox24CLI
from prox24_lightning.mask import violations_24
from prox24_lightning.utils.files import check_output
from prox24_lightning.weights.selection import select_weights

Split = Literal["validation", "test"]

_OWN_OPTIONS = "What is compared, and where the results go"


class CompareCLI(Prox24CLI):
    """Parser of ``fit``'s options and those of ``compare``; instantiates classes only with an edit of the config."""

    own_group = _OWN_OPTIONS

    def __init__(self, words: list[str], edit: Callable[[Namespace], None] | None = None) -> None:
        self._edit = edit
        super().__init__(words, name="prox24 compare", trains=True, run=False, save_config_callback=None)

    @override
    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        about = "Train the same model dense, by one-shot magnitude and with Prox24, and compare."
        return super().init_parser(**{**kwargs, "description": about})

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        group = parser.add_argument_group(_OWN_OPTIONS)
        group.add_argument("--seeds", type=list[int], default=[0], help="one run of every variant a seed")
        group.add_argument("--variants", type=list[Variant], default=list(VARIANTS), help="which variants run")
        group.add_argument(
            "--metric",
            type=str | None,
            default=None,
            help="logged metric (default: ModelCheckpoint.monitor)",
        )
        group.add_argument(
            "--mode", type=Literal["min", "max"] | None, default=None, help="which direction of the metric is better"
        )
        group.add_argument(
            "--split",
            type=Split,
            default="validation",
            help="data of the final score; test is for data that no setting was chosen on",
        )
        group.add_argument(
            "--lrs",
            type=list[float] | None,
            default=None,
            help="learning rates to try for every variant alike; the seeds run with each variant's best",
        )
        group.add_argument(
            "--search_part",
            type=float | None,
            default=None,
            help="end search runs after this part of the run, and choose by the mean training loss of its second half",
        )
        group.add_argument("--search_seed", type=int, default=1000, help="seed of the runs that choose the rate")
        group.add_argument(
            "--lr_key", type=str | None, default=None, help="where the config holds the rate (default: found)"
        )
        group.add_argument("--asp_at", type=float, default=0.5, help="when asp prunes, as a fraction of the run")
        group.add_argument(
            "--output", type=str | None, default=None, help="folder of results and logs (default: runs/CONFIG/TIME)"
        )
        group.add_argument(
            "--overwrite", type=bool, default=False, help="write into an output that holds files already"
        )
        # A config saved by `fit` holds the arguments of Trainer.fit.
        parser.add_method_arguments(Trainer, "fit", skip=set(self.subcommands()["fit"]))

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        super().parse_arguments(parser, args)
        if self._edit is not None:
            self._edit(self.config)

    @override
    def _set_seed(self) -> None:
        if self._edit is not None:
            super()._set_seed()

    @override
    def instantiate_classes(self) -> None:
        if self._edit is not None:
            super().instantiate_classes()


@errors_as_exit("compare")
def compare(words: list[str]) -> None:
    """Run every variant with every seed, print the table, and write it after each run.

    Raises:
        SystemExit: with code 2 and the reason, before the first run, if the config has no Prox24 callback, the metric
            is not known or never logged, or the output cannot be written; with code 1 at the end, if a run failed: the
            table holds the others.
    """
    console = Console()
    parsed = CompareCLI(words)
    options = parsed.config
    metric, mode = _metric(options)
    pruning = [entry for entry in callback_entries(options) if issubclass(loaded_class(entry), Prox24)]
    if not pruning:
        raise ValueError(
            "the config has no Prox24 callback, so there is nothing to compare; add it to trainer.callbacks"
        )
    if not 0 <= options.asp_at <= 1:
        raise ValueError(f"asp_at={options.asp_at} must lie between 0 (before the first step) and 1 (after the last)")
    key = rate_key(options, options.lr_key) if options.lrs else None
    chosen_by = metric
    if options.search_part is not None and not options.lrs:
        raise ValueError(f"search_part={options.search_part} ends the runs that try rates: name the rates by --lrs")
    if options.lrs:
        if options.search_seed in options.seeds:
            raise ValueError(f"search_seed={options.search_seed} is one of the seeds; rates are chosen on another")
        # Whatever the reported split: test data is for settings that were chosen without it.
        if options.search_part is None:
            chosen_by = _metric(Namespace(**{**vars(options), "split": "validation", "metric": _searched(options)}))[0]
        else:
            EarlySearch(options.search_part)  # refuses a wrong part
    output = Path(options.output) if options.output else _default_output(options)
    check_output(output, overwrite=options.overwrite)
    output.mkdir(parents=True, exist_ok=True)
    comparison = Comparison.begin(
        metric=metric,
        mode=mode,
        command=shlex.join(["prox24", "compare", *words]),
        config=parsed.parser.dump(options, skip_none=True),
        search_part=options.search_part,
    )
    _check_metric(words, metric, options.split)
    searches = [(variant, rate) for variant in options.variants for rate in options.lrs or ()]
    plan = [(seed, variant) for seed in options.seeds for variant in options.variants]
    for number, (variant, rate) in enumerate(searches, start=1):
        console.rule(f"search {number} of {len(searches)}: {variant}, rate {rate:g}")
        place = output / "search" / f"rate_{rate:g}"
        search = None if options.search_part is None else EarlySearch(options.search_part)
        found = _guarded_run(words, variant, options.search_seed, chosen_by, "validation", place, key, rate, search)
        comparison.runs.append(replace(found, search=True))
        comparison.write(output)
        gc.collect()
    for number, (seed, variant) in enumerate(plan, start=1):
        best = comparison.best_rate(variant)
        console.rule(f"run {number} of {len(plan)}: {variant}, seed {seed}{'' if best is None else f', rate {best:g}'}")
        if options.lrs and best is None:
            comparison.runs.append(Run(variant, seed, error="no rate of the search ended with a finite score"))
            continue
        comparison.runs.append(_guarded_run(words, variant, seed, metric, options.split, output, key, best))
        comparison.write(output)
        gc.collect()
    console.print(comparison.table())
    for warning in comparison.warnings():
        console.print(f"warning: {warning}")
    console.print(f"results: {output / 'comparison.md'} and {output / 'comparison.json'}")
    console.print(f"curves:  tensorboard --logdir {output}")
    if (checkpoint := _sparse_checkpoint(output)) is not None:
        console.print(f"next:    prox24 doctor {checkpoint}", soft_wrap=True)
    if any(run.error for run in comparison.runs):
        raise SystemExit(1)


def _sparse_checkpoint(output: Path) -> Path | None:
    """Return the newest checkpoint of a Prox24 run; None if the config saves none."""
    found = sorted(output.glob("prox24/seed*/checkpoints/*.ckpt"), key=lambda path: path.stat().st_mtime)
    return found[-1] if found else None


def _check_metric(words: list[str], metric: str, split: Split) -> None:
    """Score the untrained model on one batch: a metric that is never logged would cost the training of every variant.

    Raises:
        ValueError: if it is not logged. Other errors are left to the runs.
    """

    def edit(config: Namespace) -> None:
        without_pruning(config)
        without_conversion(config)
        config.trainer.logger = False
        config.trainer.limit_val_batches = config.trainer.limit_test_batches = 1

    try:
        cli = CompareCLI(words, edit)
        scores = _score(cli.trainer, cli.model, cli.datamodule, split)
    except Exception:
        return
    _known(metric, scores, split)


def _known(metric: str, scores: dict[str, float], split: Split) -> float:
    if metric not in scores:
        raise ValueError(f"{split} logged no {metric!r}, only {', '.join(sorted(scores))}; name one by --metric")
    return scores[metric]


def _searched(options: Namespace) -> str | None:
    """Return the metric that rates are chosen by, of the validation data; None is ModelCheckpoint's."""
    return options.metric if options.split == "validation" else None


def _guarded_run(
    words: list[str],
    variant: Variant,
    seed: int,
    metric: str,
    split: Split,
    output: Path,
    key: str | None = None,
    rate: float | None = None,
    search: EarlySearch | None = None,
) -> Run:
    """Return one run; a crash becomes a failed row, so that the finished rows are kept."""
    try:
        return replace(_run(words, variant, seed, metric, split, output, key, rate, search), lr=rate)
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        return Run(variant, seed, error=f"{type(error).__name__}: {error}", lr=rate)


def _run(
    words: list[str],
    variant: Variant,
    seed: int,
    metric: str,
    split: Split,
    output: Path,
    key: str | None,
    rate: float | None,
    search: EarlySearch | None,
) -> Run:
    selections: list[dict[str, Any]] = []

    def edit(config: Namespace) -> None:
        config.seed_everything = seed
        if key is not None and rate is not None:
            config[key] = rate
        for entry in callback_entries(config):
            if issubclass(loaded_class(entry), Prox24):
                arguments = entry.get("init_args", Namespace())
                chosen = {key: arguments.get(key) for key in ("targets", "skip", "geometry")}
                selections.append({key: value for key, value in chosen.items() if value is not None})
        if variant == "dense":
            without_pruning(config)
        elif variant == "asp":
            with_one_shot_magnitude(config, at=float(config.asp_at))
        without_conversion(config)
        separate_outputs(config, output, variant, seed)

    cli = CompareCLI(words, edit)
    record = TrainingRecord()
    trainer = cli.trainer
    watching = [record] if search is None else [record, search]
    trainer.callbacks.extend(watching)  # type: ignore[attr-defined]  # set by a connector, unseen by mypy
    fit_options = {key: cli.config_init.get(key) for key in ("ckpt_path", "weights_only") if key in cli.config_init}
    # Constructors may have drawn random numbers; from here on every variant draws the same.
    seed_everything(seed, workers=True, verbose=False)
    with warnings.catch_warnings():
        if search is not None:
            warnings.filterwarnings("ignore", message=".*before the freeze at step")  # it is to end there
        trainer.fit(cli.model, datamodule=cli.datamodule, **fit_options)
    steps = trainer.global_step
    if search is not None:
        return Run(variant, seed, search.loss, seconds=record.seconds, steps=steps, batches=record.checksum)
    scores = _score(trainer, cli.model, cli.datamodule, split)
    score = _known(metric, scores, split)
    sparse, groups = _groups_24(cli.model, selections)
    return Run(variant, seed, score, scores, sparse, groups, record.seconds, steps, record.checksum)


def _score(trainer: Trainer, model: LightningModule, datamodule: Any, split: Split) -> dict[str, float]:
    # The final weights, not a checkpoint: the best one may stem from before the freeze.
    score = trainer.validate if split == "validation" else trainer.test
    scores: dict[str, float] = {}
    for logged in score(model, datamodule=datamodule, verbose=False):
        scores.update({name: float(value) for name, value in logged.items()})
    return scores


@torch.no_grad()
def _groups_24(model: LightningModule, selections: list[dict[str, Any]]) -> tuple[int, int]:
    """Count the 2:4 groups, and all groups, of the weights that Prox24 would prune, whatever the variant.

    Groups lie along the dimensions of Prox24's geometry.
    """
    weights = {weight.name: weight for chosen in selections for weight in select_weights(model, **chosen)}
    checks = [violations_24(weight.parameter, dim=weight.dim) for weight in weights.values()]
    groups = sum(check.groups for check in checks)
    return groups - sum(check.count for check in checks), groups


def _metric(options: Namespace) -> tuple[str, Literal["min", "max"]]:
    """Return the metric and its direction: as given, else those of ModelCheckpoint, on the split asked for."""
    if options.metric and options.mode:
        return options.metric, options.mode
    for entry in callback_entries(options):
        if issubclass(loaded_class(entry), ModelCheckpoint):
            arguments = entry.get("init_args", Namespace())
            monitor = arguments.get("monitor")
            if monitor and options.metric in (None, monitor):
                name = monitor if options.split == "validation" else _test_name(monitor)
                return name, options.mode or ("max" if arguments.get("mode") == "max" else "min")
    missing = "--mode min or max" if options.metric else "--metric NAME --mode min or max"
    raise ValueError(f"no ModelCheckpoint of the config names the metric to compare by; add {missing}")


def _test_name(monitor: str) -> str:
    """Return the test data's name of a validation metric (``val_acc``, ``val/acc``, ``acc/valid``, or just ``acc``)."""
    name, found = re.subn(r"(?<![a-zA-Z])(val|valid|validation)(?![a-zA-Z])", "test", monitor, count=1)
    return name if found else f"test_{monitor}"


def _default_output(options: Namespace) -> Path:
    """Return a new folder, so that no log mixes with an older one."""
    stem = Path(str(options.config[-1])).stem if options.get("config") else "comparison"
    return Path("runs") / stem / datetime.now().strftime("%Y%m%d-%H%M%S")
