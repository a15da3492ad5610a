"""The final hook: what of the finished model runs on sparse tensor cores, and does it pay?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn
from typing_extensions import override

from prox24_lightning.callbacks.prox24 import Prox24
from prox24_lightning.convert.benchmark.example_inputs import InputCatcher, own_example
from prox24_lightning.convert.benchmark.render import print_report, to_markdown, write_report
from prox24_lightning.convert.benchmark.report import Report, RunMode
from prox24_lightning.convert.benchmark.run import empty_report, run_benchmark
from prox24_lightning.convert.benchmark.settings import Settings
from prox24_lightning.convert.convert import convert_model, expand_model
from prox24_lightning.convert.measurement import release_memory
from prox24_lightning.utils.errors import describe
from prox24_lightning.utils.module_copy import cast_model
from prox24_lightning.weights.layer_matrix import is_transposed_linear
from prox24_lightning.weights.names import clean_name
from prox24_lightning.weights.sharded import is_sharded

Dtype = Literal["bfloat16", "float16"]


class ConvertAndBenchmark(Callback):
    """After the fit, convert a copy of the model to semi-structured 2:4 layers, time it against the dense one, report.

    Every layer is checked strictly (one group with three non-zeros and it stays dense), packed, compared with the
    dense layer and timed on the GPU at ``token_counts``, then the whole model on the inputs of one training batch. The
    user's model is not touched: it stays dense with zeros, on its device, in its dtype, trainable. Without a GPU the
    report says which layers would be converted on one, and why the others would not.

    Written at the end: ``<filename>.json`` and ``<filename>.md``, a table in the terminal, scalars under ``convert/``
    to every logger, the Markdown as text to TensorBoard. Whatever goes wrong here, out of memory included, is a
    warning and an entry in the JSON: a finished run never fails in this callback.

    It works in ``on_fit_end``. Averaging callbacks (EMA, SWA) put their weights into the model in ``on_train_end``
    and checkpoints are written there too, so that only here the weights are final and no checkpoint can catch a
    converted model. The trainer has moved the module to the CPU by then; the copy goes back to the run's GPU.

    Args:
        token_counts: rows of input at which each layer is timed.
        dtype: of the copy, dense and sparse alike; the libraries take 16-bit types only.
        in_place: convert the user's model itself, after measuring: it moves to the GPU, in ``dtype``, and cannot be
            trained or checkpointed as before (:func:`~prox24_lightning.convert.expand_model` brings back dense
            layers). The optimizer's parameters of converted layers are empty then. One process only.
        dirpath: folder of the two files; None takes the logger's folder, or the trainer's ``default_root_dir``.
        filename: their name without ending.
        only_if_faster: a layer that is slower at one of the ``token_counts`` stays dense, and so does a whole model
            that is slower. False converts all that can be converted.
        run_mode: the times that decide: ``"eager"`` calls, or calls replayed as a CUDA ``"graph"``.
        keep_dense: hold the dense weights too, for the numbers of tokens at which cuBLAS is faster.
        rounds: repetitions of each measurement.
        verbose: print the tables.

    Raises:
        ValueError: for arguments that are wrong whatever the model.
        MisconfigurationException: ``in_place`` with several processes, before the first batch.
    """

    def __init__(
        self,
        token_counts: Sequence[int] = (1, 64, 1024, 4096),
        dtype: Dtype = "bfloat16",
        in_place: bool = False,
        dirpath: str | Path | None = None,
        filename: str = "benchmark",
        only_if_faster: bool = True,
        run_mode: RunMode = "eager",
        keep_dense: bool = False,
        rounds: int = 20,
        verbose: bool = True,
    ) -> None:
        super().__init__()
        if dtype not in get_args(Dtype):
            raise ValueError(f"dtype={dtype!r} has no sparse kernel; use one of {', '.join(get_args(Dtype))}")
        if not filename or Path(filename).name != filename:
            raise ValueError(f"filename={filename!r} is a name without folders; give the folder as dirpath")
        self.settings = Settings(
            token_counts=tuple(token_counts),
            dtype=getattr(torch, dtype),
            only_if_faster=only_if_faster,
            run_mode=run_mode,
            keep_dense=keep_dense,
            rounds=rounds,
        )
        self.in_place = in_place
        self.dirpath = dirpath
        self.filename = filename
        self.verbose = verbose
        self.report: Report | None = None
        self._folder: Path | None = None
        self._catcher: InputCatcher | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and self.in_place and trainer.world_size > 1:
            raise MisconfigurationException(
                f"ConvertAndBenchmark(in_place=True) would convert the model of one of {trainer.world_size} processes "
                "only; leave in_place=False and convert the saved model with prox24_lightning.convert.convert_model"
            )

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.report = None
        # trainer.log_dir talks to all ranks, so it is asked here and not in the part that only the first one runs.
        self._folder = Path(self.dirpath or trainer.log_dir or trainer.default_root_dir)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._drop_catcher()
        if trainer.is_global_zero:
            self._catcher = InputCatcher(pl_module, _linear_layers(trainer, pl_module))

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._catcher is not None:
            self._catcher.remove()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._drop_catcher()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._drop_catcher()

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        try:
            self.report = self._run(trainer, pl_module)
        except Exception as error:
            problem = describe(error)
            _warn(f"ConvertAndBenchmark failed, the run itself is complete: {problem}")
            self.report = replace(empty_report(self.settings), error=problem)
        self._drop_catcher()
        for publish in (self._print, self._write, self._log):
            try:
                publish(trainer, self.report)
            except Exception as error:
                _warn(f"ConvertAndBenchmark could not publish its report: {describe(error)}")
        try:
            release_memory()
        except Exception as error:  # after a broken kernel every CUDA call fails
            _warn(f"ConvertAndBenchmark could not release GPU memory: {describe(error)}")

    def _run(self, trainer: Trainer, pl_module: LightningModule) -> Report:
        if any(is_sharded(parameter) for parameter in pl_module.parameters()):
            return empty_report(self.settings).with_note(
                "The model is sharded over several ranks, and one of them cannot convert it: load the saved model in "
                "one process and call prox24_lightning.convert.convert_model."
            )
        inputs = self._catcher.inputs if self._catcher is not None else None
        inputs = inputs or own_example(pl_module)
        device = trainer.strategy.root_device
        # What a LightningModule may hold besides its weights, and what its copy is not to drag along.
        shared = [trainer, *trainer.loggers, *trainer.optimizers]
        shared += [*trainer.callbacks, trainer.datamodule]  # type: ignore[attr-defined]
        report = run_benchmark(
            pl_module,
            replace(self.settings, rounds=2) if _is_rehearsal(trainer) else self.settings,
            device=device,
            inputs=inputs,
            reasons=_reasons(trainer),
            shared=[thing for thing in shared if thing is not None],
        )
        if inputs is None and report.shapes:
            report = report.with_note(
                "Whole model not timed: no call of it was seen in the first batch (a compiled training step hides it), "
                "and the module has no example_input_array."
            )
        names = report.names("sparse")
        if self.in_place and names:
            cast_model(pl_module, self.settings.dtype, device)
            try:
                # Optimizers and Prox24 outlive the fit and still hold the dense weights.
                convert_model(pl_module, names, keep_dense=self.settings.keep_dense, empty_dense=True)
            except Exception:
                expand_model(pl_module)
                raise
            report = report.with_note(f"in_place: {len(names)} layers of the user's model are now sparse.")
        return report

    def _drop_catcher(self) -> None:
        if self._catcher is not None:
            self._catcher.remove()
        self._catcher = None

    def _print(self, trainer: Trainer, report: Report) -> None:
        if self.verbose:
            print_report(report)

    def _write(self, trainer: Trainer, report: Report) -> None:
        if _is_rehearsal(trainer) and self.dirpath is None:
            return  # like loggers and checkpoints, which a fast_dev_run leaves no trace of
        folder = self._folder or Path(trainer.default_root_dir)
        _, page = write_report(report, folder, self.filename)
        rank_zero_info(f"ConvertAndBenchmark: wrote {page} and the same as JSON")

    def _log(self, trainer: Trainer, report: Report) -> None:
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        for logger in trainer.loggers:
            try:
                logger.log_metrics(report.scalars(), step=step)
                if any(cls.__name__ == "TensorBoardLogger" for cls in type(logger).__mro__):
                    logger.experiment.add_text("convert/report", to_markdown(report), step)  # type: ignore[attr-defined]
            except Exception as error:
                _warn(f"ConvertAndBenchmark could not write to {type(logger).__name__}: {describe(error)}")


def _linear_layers(trainer: Trainer, pl_module: LightningModule) -> list[str]:
    """The layers that Prox24 makes 2:4; without one every linear layer."""
    chosen = [weight.module_name for callback in _sparsifiers(trainer) for weight in callback.weights]
    return chosen or [
        clean_name(name)
        for name, module in pl_module.named_modules()
        if isinstance(module, nn.Linear) or is_transposed_linear(module)
    ]


def _reasons(trainer: Trainer) -> dict[str, str]:
    """What Prox24 knows about layers that are not 2:4, by layer."""
    reasons: dict[str, str] = {}
    for callback in _sparsifiers(trainer):
        for skipped in callback.selection.skipped:
            reasons[skipped.name.rpartition(".")[0]] = f"{callback.name} left it dense: {skipped.reason}"
    for callback in _sparsifiers(trainer):
        for weight in callback.weights:
            reasons.pop(weight.module_name, None)  # one of two callbacks left it to the other
            if callback.phase != "frozen":
                reasons[weight.module_name] = f"{callback.name} ended in phase {callback.phase!r}, before its freeze"
    return reasons


def _is_rehearsal(trainer: Trainer) -> bool:
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]


def _sparsifiers(trainer: Trainer) -> list[Prox24]:
    return [callback for callback in trainer.callbacks if isinstance(callback, Prox24)]  # type: ignore[attr-defined]


def _warn(text: str) -> None:
    try:
        rank_zero_warn(text)
    except Warning:  # warnings may be errors in the user's process; a finished run is not to fail by ours
        rank_zero_info(text)
