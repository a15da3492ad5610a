"""The callback in real runs: it reports, changes nothing, and never fails a finished run."""

from __future__ import annotations

import errno
import json
import warnings

import pytest
import torch
from converted_runs import HIDDEN, fit, prox, states
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger
from new_processes import spawn
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_runs import TinyModule, quiet_trainer, tiny_loader

from prox24_lightning import ConvertAndBenchmark
from prox24_lightning.callbacks import convert_and_benchmark
from prox24_lightning.convert.benchmark.run import empty_report
from prox24_lightning.mask import is_24

pytestmark = pytest.mark.filterwarnings("ignore:The .*dataloader.* does not have many workers")


def test_a_run_without_a_gpu_reports_what_it_would_do(tmp_path, capsys):
    module = TinyModule()
    final = ConvertAndBenchmark()
    trainer = quiet_trainer(max_steps=6, callbacks=[prox(), final], default_root_dir=tmp_path)
    trainer.fit(module, tiny_loader())
    stored = json.loads((tmp_path / "benchmark.json").read_text())
    found = {layer["name"]: layer["state"] for layer in stored["layers"]}
    assert found == {"model.0": "dense", HIDDEN: "fits", "model.4": "dense"}
    assert stored["error"] is None
    assert stored["machine"]["GPU"] == "none in use"
    page = (tmp_path / "benchmark.md").read_text()
    assert "would be sparse on a GPU" in page
    assert "prox24 left it dense: not among the targets" in page
    assert "would be sparse on a GPU" in " ".join(capsys.readouterr().out.split()) or HIDDEN in page
    assert sorted(path.name for path in tmp_path.iterdir()) == ["benchmark.json", "benchmark.md"]


def test_the_model_stays_dense_and_trainable(tmp_path):
    sparsifier = prox()
    final, module, _ = fit(tmp_path, sparsifier)
    assert type(module.model[2]) is torch.nn.Linear
    assert is_24(module.model[2].weight)
    assert all(parameter.requires_grad and parameter.dtype == torch.float32 for parameter in module.parameters())
    assert not any(layer._forward_pre_hooks for layer in module.modules())
    before = module.model[0].weight.clone()
    trainer = quiet_trainer(max_steps=9, callbacks=[sparsifier, final], default_root_dir=tmp_path)
    trainer.fit(module, tiny_loader())
    assert not torch.equal(module.model[0].weight, before)
    assert states(final.report)[HIDDEN][0] == "fits"


def test_before_the_freeze_the_phase_is_the_reason(tmp_path):
    class Stop(Callback):
        def on_train_batch_end(self, trainer, *args):
            trainer.should_stop = trainer.global_step == 3

    with pytest.warns(UserWarning, match="before the freeze"):
        final, *_ = fit(tmp_path, prox(freeze=5), Stop())
    state, why = states(final.report)[HIDDEN]
    assert state == "dense"
    assert "not 2:4" in why
    assert "prox24 ended in phase 'sparsify', before its freeze" in why


def test_without_prox24_every_linear_layer_is_looked_at(tmp_path):
    final, *_ = fit(tmp_path)
    assert set(states(final.report)) == {"model.0", "model.2", "model.4"}
    assert "not 2:4" in states(final.report)[HIDDEN][1]


def test_the_inputs_of_the_model_are_caught(tmp_path, monkeypatch):
    seen = spy(monkeypatch)
    fit(tmp_path, prox())
    inputs = seen[0]["inputs"]
    assert inputs.module_name == "model"
    assert inputs.args[0].shape == (4, 8)


def test_example_input_array_where_no_call_was_seen(tmp_path, monkeypatch):
    class Direct(TinyModule):
        example_input_array = torch.ones(2, 8)

        def training_step(self, batch, batch_idx):
            x, y = batch
            for layer in self.model:
                x = layer(x)
            return torch.nn.functional.mse_loss(x, y)

    seen = spy(monkeypatch)
    fit(tmp_path, prox(), module=Direct())
    assert seen[0]["inputs"].module_name == ""
    assert torch.equal(seen[0]["inputs"].args[0], torch.ones(2, 8))
    Direct.example_input_array = None
    fit(tmp_path, prox(), module=Direct())
    assert seen[1]["inputs"] is None


def spy(monkeypatch) -> list[dict]:
    seen: list[dict] = []
    original = convert_and_benchmark.run_benchmark

    def run(model, settings, **arguments):
        seen.append(arguments | {"settings": settings})
        return original(model, settings, **arguments)

    monkeypatch.setattr(convert_and_benchmark, "run_benchmark", run)
    return seen


@pytest.mark.parametrize("compiled", ["module", "model", "in place"])
def test_compiled_modules(tmp_path, compiled):
    module = TinyModule()
    given = module
    if compiled == "module":
        given = torch.compile(module, backend="eager")
    elif compiled == "model":
        module.model = torch.compile(module.model, backend="eager")
    else:
        module.model.compile(backend="eager")
    final, *_ = fit(tmp_path, prox(metric="weight"), module=given)
    assert states(final.report)[HIDDEN] == ("fits", "no CUDA GPU in use")


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_low_precision(tmp_path, precision):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the weights are stored in")
        final, *_ = fit(tmp_path, prox(), precision=precision)
    assert states(final.report)[HIDDEN][0] == "fits"


def test_averaged_weights_are_those_that_are_judged(tmp_path):
    """on_fit_end comes after every on_train_end: what an averaging callback puts in there is seen."""

    class Dense(Callback):
        def on_train_end(self, trainer, pl_module):
            with torch.no_grad():
                pl_module.model[2].weight.fill_(1)

    final = ConvertAndBenchmark(verbose=False)
    trainer = quiet_trainer(max_steps=6, callbacks=[final, prox(), Dense()], default_root_dir=tmp_path)
    trainer.fit(TinyModule(), tiny_loader())
    assert states(final.report)[HIDDEN][1] == "not 2:4: no group is"


def test_weight_averaging_and_checkpoints(tmp_path):
    checkpoint = ModelCheckpoint(dirpath=tmp_path / "saved", save_last=True)
    final, module, _ = fit(tmp_path, WeightAveraging(), prox(), checkpoint, enable_checkpointing=True)
    assert states(final.report)[HIDDEN][0] == "fits"
    saved = torch.load(tmp_path / "saved" / "last.ckpt", weights_only=True)["state_dict"]
    assert "model.2.weight" in saved
    assert torch.equal(saved["model.2.weight"], module.model[2].weight)


@pytest.mark.parametrize(
    "error", [RuntimeError("kernel went away\nmore"), torch.cuda.OutOfMemoryError("CUDA out of memory."), KeyError("x")]
)
def test_a_failure_is_a_warning_and_an_entry(tmp_path, monkeypatch, error):
    def run(*args, **kwargs):
        raise error

    monkeypatch.setattr(convert_and_benchmark, "run_benchmark", run)
    with pytest.warns(UserWarning, match="ConvertAndBenchmark failed, the run itself is complete"):
        final, _, trainer = fit(tmp_path, prox())
    assert trainer.state.finished
    stored = json.loads((tmp_path / "benchmark.json").read_text())
    assert stored["error"].startswith(type(error).__name__)
    assert "**Failed:**" in (tmp_path / "benchmark.md").read_text()
    assert final.report.scalars()["convert/failed"] == 1


def test_a_failure_stays_a_warning_where_warnings_are_errors(tmp_path, monkeypatch):
    def run(*args, **kwargs):
        raise RuntimeError("broken")

    monkeypatch.setattr(convert_and_benchmark, "run_benchmark", run)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="ConvertAndBenchmark failed")
        _, _, trainer = fit(tmp_path, prox())
    assert trainer.state.finished


@pytest.mark.parametrize("broken", ["log", "write", "print"])
def test_a_full_disk_is_a_warning(tmp_path, monkeypatch, broken):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    name = {"log": "to_markdown", "write": "write_report", "print": "print_report"}[broken]
    monkeypatch.setattr(convert_and_benchmark, name, full)
    final = ConvertAndBenchmark(verbose=broken == "print")
    logger = TensorBoardLogger(tmp_path)
    trainer = quiet_trainer(max_steps=4, callbacks=[final], default_root_dir=tmp_path, logger=logger)
    with pytest.warns(UserWarning, match="No space left on device"):
        trainer.fit(TinyModule(), tiny_loader())
    assert trainer.state.finished
    assert final.report.error is None


def test_a_model_whose_inputs_cannot_be_recorded_trains(tmp_path, monkeypatch):
    def refused(*args):
        raise RuntimeError("hooks are not allowed")

    monkeypatch.setattr(convert_and_benchmark, "InputCatcher", refused)
    with pytest.warns(UserWarning, match="cannot record example inputs.*hooks are not allowed"):
        final, _, trainer = fit(tmp_path, prox())
    assert trainer.state.finished
    assert states(final.report)[HIDDEN][0] == "fits"


def test_random_numbers_after_the_fit_are_those_without_the_callback(tmp_path, monkeypatch):
    def drawing(model, settings, **_):
        torch.rand(7)
        return empty_report(settings)

    monkeypatch.setattr(convert_and_benchmark, "run_benchmark", drawing)
    drawn = []
    for callbacks in ([], [ConvertAndBenchmark(verbose=False)]):
        torch.manual_seed(0)
        trainer = quiet_trainer(max_steps=4, callbacks=callbacks, default_root_dir=tmp_path)
        trainer.fit(TinyModule(), tiny_loader())
        drawn.append(torch.rand(3))
    assert torch.equal(*drawn)


def test_ctrl_c_is_not_swallowed(tmp_path, monkeypatch):
    def run(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(convert_and_benchmark, "run_benchmark", run)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(tmp_path, prox())
    assert not (tmp_path / "benchmark.json").exists()


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    final = ConvertAndBenchmark(dirpath=tmp_path / "file", verbose=False)
    trainer = quiet_trainer(max_steps=4, callbacks=[final], default_root_dir=tmp_path)
    with pytest.warns(UserWarning, match="could not publish its report: (FileExistsError|NotADirectoryError)"):
        trainer.fit(TinyModule(), tiny_loader())
    assert trainer.state.finished


def test_loggers_get_scalars_and_tensorboard_the_table(tmp_path):
    loggers = [CSVLogger(tmp_path, name="csv"), TensorBoardLogger(tmp_path, name="tb")]
    fit(tmp_path, prox(), logger=loggers)
    assert (tmp_path / "csv" / "version_0" / "benchmark.json").exists(), "the first logger's folder"
    assert "convert/layers_fits" in (tmp_path / "csv" / "version_0" / "metrics.csv").read_text()
    events = EventAccumulator(str(tmp_path / "tb" / "version_0"))
    events.Reload()
    assert events.Scalars("convert/layers_fits")[0].value == 1
    assert events.Scalars("convert/layers_fits")[0].step == 6
    text = events.Tensors("convert/report/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "## Layers" in text


def test_a_logger_that_throws_does_not_stop_the_others(tmp_path):
    class Broken(DummyLogger):
        def log_metrics(self, metrics, step=None):
            if "convert/failed" in metrics:
                raise ConnectionError("no network")

        save_dir = None

    good = CSVLogger(tmp_path, name="csv")
    with pytest.warns(UserWarning, match="could not write to Broken: ConnectionError: no network"):
        fit(tmp_path, prox(), logger=[Broken(), good])
    assert "convert/failed" in (tmp_path / "csv" / "version_0" / "metrics.csv").read_text()


def test_dirpath_and_filename(tmp_path):
    final = ConvertAndBenchmark(dirpath=str(tmp_path / "out"), filename="mine", verbose=False)
    quiet_trainer(max_steps=2, callbacks=[final], default_root_dir=tmp_path).fit(TinyModule(), tiny_loader())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["mine.json", "mine.md"]


def test_fast_dev_run_writes_nothing(tmp_path, monkeypatch):
    seen = spy(monkeypatch)
    final = ConvertAndBenchmark(verbose=False)
    trainer = quiet_trainer(fast_dev_run=True, callbacks=[final], default_root_dir=tmp_path)
    trainer.fit(TinyModule(), tiny_loader())
    assert final.report is not None
    assert seen[0]["settings"].rounds == 2
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_breaks_leaves_no_hooks(tmp_path):
    class Breaks(TinyModule):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            raise RuntimeError("user error")

    module = Breaks()
    with pytest.raises(RuntimeError, match="user error"):
        fit(tmp_path, module=module)
    assert not any(layer._forward_pre_hooks for layer in module.modules())


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"dtype": "float32"}, "dtype='float32' has no sparse kernel"),
        ({"filename": "a/b"}, "filename='a/b' is a name without folders"),
        ({"token_counts": 8}, r"token_counts=8 must be a list of whole numbers, such as \[1, 64, 1024\]"),
        ({"token_counts": [0]}, "token_counts=.* whole numbers from 1 up"),
        ({"run_mode": "fast"}, "run_mode='fast' is unknown"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        ConvertAndBenchmark(**arguments)


def fit_on_one_of_two(rank, folder):
    final = ConvertAndBenchmark(dirpath=folder / "out", verbose=False)
    trainer = quiet_trainer(devices=2, strategy="ddp", max_steps=2, callbacks=[prox(freeze=1), final])
    trainer.fit(TinyModule(), tiny_loader())
    (folder / f"rank{rank}").write_text(str(final.report is not None))


def test_on_two_ranks_the_first_one_reports(tmp_path):
    spawn(fit_on_one_of_two, tmp_path)
    assert [(tmp_path / f"rank{rank}").read_text() for rank in (0, 1)] == ["True", "False"]
    assert (tmp_path / "out" / "benchmark.json").exists()


def test_the_dense_weights_are_kept_on_demand():
    assert ConvertAndBenchmark(keep_dense=True).settings.keep_dense
    assert not ConvertAndBenchmark().settings.keep_dense
