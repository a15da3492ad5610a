"""The callback that converts and times the finished model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn
from typing_extensions import override

from prox24_lightning.callbacks.prox24 import Prox24
from prox24_lightning.callbacks.round_weights import RoundWeights
from prox24_lightning.callbacks.unenforced_zeros import UnenforcedZeros
from prox24_lightning.convert.benchmark.example_inputs import InputCatcher, own_example
from prox24_lightning.convert.benchmark.fixed_scales import fixed_input_scales
from prox24_lightning.convert.benchmark.render import print_report, to_markdown, write_report
from prox24_lightning.convert.benchmark.report import Report, RunMode
from prox24_lightning.convert.benchmark.run import empty_report, run_benchmark
from prox24_lightning.convert.benchmark.settings import Settings
from prox24_lightning.convert.convert import convert_model
from prox24_lightning.convert.measurement import release_memory
from prox24_lightning.convert.packed_model import find_packable
from prox24_lightning.convert.restore import restored_on_error
from prox24_lightning.io.packed_folder import refuse_dense, save_folder
from prox24_lightning.utils.errors import describe
from prox24_lightning.utils.files import PACKED_FILE, check_folder
from prox24_lightning.utils.module_copy import cast_model, frozen_copy
from prox24_lightning.utils.names import counted
from prox24_lightning.weights.layer_matrix import is_transposed_linear
from prox24_lightning.weights.names import clean_name
from prox24_lightning.weights.rounding import WeightForm
from prox24_lightning.weights.sharded import is_sharded
from prox24_lightning.weights.whole_model import whole_on_first

Dtype = Literal["bfloat16", "float16"]


class ConvertAndBenchmark(Callback):
    """Convert a copy of the finished model to semi-structured 2:4 layers, time it against the dense one, and report.

    Every layer is checked strictly (one group with three non-zeros keeps it dense), packed, compared with the dense
    layer and timed on the GPU at ``token_counts``; then the whole model is timed on the inputs of one training batch.
    The user's model does not change: it stays dense with zeros, on its device, in its dtype, trainable. Without a GPU
    the report names the layers that a GPU would run sparse, and the reasons of the others.

    Written at the end: ``<filename>.json`` and ``<filename>.md``, a table in the terminal, scalars under ``convert/``
    to every logger, the Markdown as text to TensorBoard. Every error here, out of memory and a full disk included,
    becomes a warning and an entry in the JSON: a finished run never fails in this callback.

    A sharded model (FSDP2, tensor parallelism) is gathered on the first rank's CPU, which converts and times it alone.

    The work is done in ``on_fit_end``: averaging callbacks (EMA, SWA) put their weights into the model in
    ``on_train_end``, where checkpoints are written too. After that the weights are final, and no checkpoint can hold
    a converted model. The trainer has moved the module to the CPU by then; the copy goes back to the run's GPU.

    Args:
        token_counts: rows of input at which each layer is timed.
        dtype: of the copy, dense and sparse alike; the libraries take 16-bit types only.
        in_place: convert the user's model itself, after measuring: it moves to the GPU, in ``dtype``, and cannot be
            trained or checkpointed as before (:func:`~prox24_lightning.convert.expand_model` brings back dense
            layers). The optimizer's parameters of converted layers are empty then. One process only. Where the
            conversion fails, the model is as it was.
        dirpath: folder of the two files; None takes the logger's folder, or the trainer's ``default_root_dir``.
        filename: name of the two files, without ending.
        only_if_faster: a layer that is slower at one of the ``token_counts`` stays dense, and so does a whole model
            that is slower. False converts every layer that can run sparse.
        run_mode: the times that decide: calls replayed as a CUDA ``"graph"``, as servers and ``accelerate_generation``
            run a model, or ``"eager"`` calls, where a busy host hides what the GPU gains. The report shows both.
        keep_dense: keep the dense weights too, for the numbers of tokens at which cuBLAS is faster.
        rounds: repetitions of each measurement.
        verbose: print the tables.
        save_to: folder for the packed model, in ``dtype``: what the run leaves for ``from_pretrained`` and vLLM. Of a
            module with one Hugging Face model in it, that model, with the module's ``tokenizer`` if it has one. None
            writes none.
        weights: "fp8_e4m3" or "int8" round the weights of converted layers, and of the folder, to 8 bits with a scale a
            row, and the layers' inputs token by token. With fp8_e4m3 a layer that is faster dense in float8 takes that
            form. The name of ``dtype`` ("bf16", "fp16") keeps 16 bits; None too, or takes the form of a
            :class:`~prox24_lightning.RoundWeights` in the trainer.
        max_error: largest relative error of a layer's output that is acceptable in 8 bits. The report ends with the
            fastest form within it.
        input_quantile: fix the scale of a rounded layer's inputs at this quantile of the tokens' largest magnitudes in
            a training batch, 1 for the largest of all; None gives each token its own scale when the layer runs.

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
        run_mode: RunMode = "graph",
        keep_dense: bool = False,
        rounds: int = 20,
        verbose: bool = True,
        save_to: str | Path | None = None,
        weights: WeightForm | None = None,
        max_error: float = 0.05,
        input_quantile: float | None = None,
    ) -> None:
        super().__init__()
        if dtype not in get_args(Dtype):
            raise ValueError(f"dtype={dtype!r} has no sparse kernel; use one of {', '.join(get_args(Dtype))}")
        if not isinstance(token_counts, Sequence):
            raise ValueError(f"token_counts={token_counts!r} must be a list of whole numbers, such as [1, 64, 1024]")
        if not filename or Path(filename).name != filename:
            raise ValueError(f"filename={filename!r} is a name without folders; give the folder as dirpath")
        self.settings = Settings(
            token_counts=tuple(token_counts),
            dtype=getattr(torch, dtype),
            only_if_faster=only_if_faster,
            run_mode=run_mode,
            keep_dense=keep_dense,
            rounds=rounds,
            weights=weights,
            max_error=max_error,
            input_quantile=input_quantile,
        )
        self.weights = weights
        self.in_place = in_place
        self.dirpath = dirpath
        self.filename = filename
        self.verbose = verbose
        self.save_to = save_to
        self.report: Report | None = None
        self._folder: Path | None = None
        self._catcher: InputCatcher | None = None
        self._input_scales: dict[str, float] = {}
        self._zeros = UnenforcedZeros()

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
        self._take_form(trainer)
        if self.save_to is not None:
            check_folder(self.save_to)
            refuse_dense(self.save_to)
            if any(Path(self.save_to).glob(f"{PACKED_FILE}*")):
                rank_zero_info(
                    f"ConvertAndBenchmark: {self.save_to} holds a packed model, which the end of this run replaces"
                )
        # trainer.log_dir is a collective call; on_fit_end runs on the first rank only.
        self._folder = Path(self.dirpath or trainer.log_dir or trainer.default_root_dir)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._drop_catcher()
        self._zeros.on_train_start(trainer, pl_module)
        if trainer.is_global_zero:
            try:
                self._catcher = InputCatcher(pl_module, _linear_layers(trainer, pl_module))
            except Exception as error:
                _warn(f"ConvertAndBenchmark cannot record example inputs, only layers are timed: {describe(error)}")

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._zeros.on_train_batch_end(trainer)
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
        if not any(map(is_sharded, pl_module.parameters())):
            self._finish(trainer, pl_module)
            return
        with whole_on_first(pl_module):  # all ranks gather; the first one works on
            self._finish(trainer, pl_module)

    def _finish(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        try:
            with isolate_rng():
                self.report = self._run(trainer, pl_module)
        except Exception as error:
            problem = describe(error)
            _warn(f"ConvertAndBenchmark failed, the run itself is complete: {problem}")
            self.report = replace(empty_report(self.settings), error=problem)
        self._drop_catcher()
        for publish in (self._print, self._write, self._log, self._save):
            try:
                publish(trainer, self.report)
            except Exception as error:
                _warn(f"ConvertAndBenchmark could not publish its report: {describe(error)}")
        try:
            release_memory()
        except Exception as error:  # after a broken kernel every CUDA call fails
            rank_zero_info(f"ConvertAndBenchmark could not release GPU memory: {describe(error)}")

    def _run(self, trainer: Trainer, pl_module: LightningModule) -> Report:
        inputs = self._catcher.inputs if self._catcher is not None else None
        inputs = inputs or own_example(pl_module)
        device = trainer.strategy.root_device
        # A LightningModule may hold these, and a copy of it must not copy them.
        shared = [trainer, *trainer.loggers, *trainer.optimizers]
        shared += [*trainer.callbacks, trainer.datamodule]  # type: ignore[attr-defined]
        objects = [thing for thing in shared if thing is not None]
        report = run_benchmark(
            pl_module,
            replace(self.settings, rounds=2) if _is_rehearsal(trainer) else self.settings,
            device=device,
            inputs=inputs,
            reasons=_reasons(trainer),
            shared=objects,
        )
        if inputs is None and report.shapes:
            report = report.with_note(
                "Whole model not timed: the first batch made no call that Python sees (it is compiled, perhaps), "
                "and the module has no example_input_array."
            )
        self._input_scales = {}
        try:
            self._input_scales = fixed_input_scales(pl_module, inputs, self.settings, device, objects)
        except Exception as error:
            report = report.with_note(
                f"Inputs keep a scale for each token: no fixed one was measured: {describe(error)}"
            )
        names = (*report.names("sparse"), *report.dense_fp8_names)
        if self.in_place and names:
            with restored_on_error(pl_module):
                cast_model(pl_module, self.settings.dtype, device)
                # Optimizers and Prox24 outlive the fit and still hold the dense weights.
                convert_model(
                    pl_module,
                    names,
                    keep_dense=self.settings.keep_dense,
                    empty_dense=True,
                    weights=self.settings.weights,
                    dense_fp8=report.dense_fp8_names,
                    input_scales={name: scale for name, scale in self._input_scales.items() if name in names},
                )
            in_fp8 = f", {len(report.dense_fp8_names)} dense in float8" if report.dense_fp8_names else ""
            sparse = len(report.names("sparse"))
            report = report.with_note(f"in_place: {sparse} layers of the user's model are now sparse{in_fp8}.")
        return report

    def _take_form(self, trainer: Trainer) -> None:
        """Convert into the form that the model trains for, unless the user has named one."""
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        trained = next((callback.weights for callback in callbacks if isinstance(callback, RoundWeights)), None)
        self.settings = replace(self.settings, weights=self.weights or trained)
        if trained is not None and self.settings.weights != trained:
            rank_zero_warn(
                f"RoundWeights trains the model for {trained}, and ConvertAndBenchmark converts it with "
                f"weights={self.weights!r}: leave weights out there, or name the same form"
            )

    def _drop_catcher(self) -> None:
        if self._catcher is not None:
            self._catcher.remove()
        self._catcher = None

    def _print(self, trainer: Trainer, report: Report) -> None:
        if self.verbose:
            print_report(report)

    def _write(self, trainer: Trainer, report: Report) -> None:
        if _is_rehearsal(trainer) and self.dirpath is None:
            return  # a fast_dev_run writes no logs and no checkpoints either
        folder = self._folder or Path(trainer.default_root_dir)
        _, page = write_report(report, folder, self.filename)
        rank_zero_info(f"ConvertAndBenchmark: wrote {page} and the same as JSON")

    def _save(self, trainer: Trainer, report: Report) -> None:
        if self.save_to is None or _is_rehearsal(trainer):
            return
        module = trainer.lightning_module
        model = _hugging_face_model(module) or module
        prefix = next((f"{name}." for name, child in module.named_children() if child is model), "")
        companions = [part for part in (getattr(module, "tokenizer", None),) if hasattr(part, "save_pretrained")]
        copy = cast_model(frozen_copy(model, shared=[trainer, *trainer.loggers]), self.settings.dtype)
        packable = find_packable(copy)
        if not packable.dims:
            raise ValueError(f"no weight is 2:4, so nothing was written to {self.save_to}")
        written = save_folder(
            self.save_to,
            copy,
            packable,
            source="a Lightning run",
            companions=companions,
            weights=self.settings.form,
            input_scales={name.removeprefix(prefix): scale for name, scale in self._input_scales.items()},
        )
        rank_zero_info(f"ConvertAndBenchmark: wrote {counted(len(written.packed), 'packed weight')} to {self.save_to}")

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
    """Return the layers that Prox24 prunes; without a Prox24 every linear layer."""
    chosen = [weight.module_name for callback in _sparsifiers(trainer) for weight in callback.weights]
    return chosen or [
        clean_name(name)
        for name, module in pl_module.named_modules()
        if isinstance(module, nn.Linear) or is_transposed_linear(module)
    ]


def _reasons(trainer: Trainer) -> dict[str, str]:
    """Return layer name -> why Prox24 has not pruned it."""
    reasons: dict[str, str] = {}
    for callback in _sparsifiers(trainer):
        for skipped in callback.selection.skipped:
            reasons[skipped.name.rpartition(".")[0]] = f"{callback.name} left it dense: {skipped.reason}"
    for callback in _sparsifiers(trainer):
        for weight in callback.weights:
            reasons.pop(weight.module_name, None)  # another Prox24 prunes it
            if callback.phase != "frozen":
                reasons[weight.module_name] = f"{callback.name} ended in phase {callback.phase!r}, before its freeze"
    return reasons


def _hugging_face_model(module: LightningModule) -> Any:
    """Return the one Hugging Face model among the module's children; None if there is none, or more than one."""
    found = [child for child in module.children() if hasattr(child, "save_pretrained") and hasattr(child, "config")]
    return found[0] if len(found) == 1 else None


def _is_rehearsal(trainer: Trainer) -> bool:
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]


def _sparsifiers(trainer: Trainer) -> list[Prox24]:
    return [callback for callback in trainer.callbacks if isinstance(callback, Prox24)]  # type: ignore[attr-defined]


def _warn(text: str) -> None:
    try:
        rank_zero_warn(text)
    except Warning:  # warnings may be errors in the user's process, and must not fail a finished run
        rank_zero_info(text)
