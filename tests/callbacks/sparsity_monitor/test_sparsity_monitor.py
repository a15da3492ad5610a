"""The monitor in real runs: what it writes, where, when, and that it never ends a run."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from matplotlib.image import imread
from monitored_runs import LAYERS, fit, monitor, prox, rows_of
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_runs import TinyModule, quiet_trainer, tiny_loader
from torch import nn

from prox24_lightning import SparsityMonitor
from prox24_lightning.mask import mask_24
from prox24_lightning.monitoring import monitored_weights
from prox24_lightning.monitoring.statistics import measure_sparsity


@pytest.fixture
def measured(monkeypatch):
    """The first weight at every measurement."""
    taken = []

    def counted(weights, **kwargs):
        taken.append(weights[0].parameter.detach().clone())
        return measure_sparsity(weights, **kwargs)

    monkeypatch.setattr(monitored_weights, "measure_sparsity", counted)
    return taken


def test_csv_columns(tmp_path):
    logger = CSVLogger(tmp_path)
    fit([monitor(), prox()], logger=logger)
    rows = rows_of(logger)
    # Step n lies at n - 1, as Lightning's own metrics do; the two phases begin at steps 5 and 12.
    assert list(rows) == [0, 4, 9, 11, 14, 19]
    assert rows[0]["sparsity/groups_24"] == 0.0
    assert rows[19]["sparsity/groups_24"] == 1.0
    assert [rows[step]["sparsity/phase"] for step in rows] == [0, 1, 1, 2, 2, 2]
    assert [rows[step]["sparsity/step"] for step in rows] == [0, 5, 10, 12, 15, 20]
    for row in rows.values():
        assert sum(row[f"sparsity/groups_with_{count}_zeros"] for count in range(5)) == pytest.approx(1.0)
        assert {"sparsity/retained_squared_norm", "sparsity/penalty", "sparsity/rms"} <= row.keys()
    assert "sparsity/mask_flips" not in rows[0]
    assert 0 < rows[9]["sparsity/mask_flips"] < 1
    assert rows[14]["sparsity/mask_flips"] == rows[19]["sparsity/mask_flips"] == 0
    assert [step for step in rows if "sparsity/strength" in rows[step]] == [4, 9]
    layer = {key.rsplit("/", 1)[1] for key in rows[9] if key.startswith("sparsity_layers/model.2/")}
    assert layer == {"groups_24", "retained_squared_norm", "penalty", "rms", "mask_flips", "strength"}


def test_numbers_are_those_of_the_model(tmp_path):
    logger = CSVLogger(tmp_path)
    callback = prox(metric="weight")
    _, module = fit([monitor(), callback], logger=logger)
    row = rows_of(logger)[19]
    weights = [module.get_parameter(name).detach() for name in LAYERS]
    flat = torch.cat([weight.flatten() for weight in weights])
    assert row["sparsity/rms"] == pytest.approx(flat.square().mean().sqrt().item())
    assert row["sparsity_layers/model.0/rms"] == pytest.approx(weights[0].square().mean().sqrt().item())


def test_it_measures_in_the_metric_of_prox24(tmp_path):
    logger = CSVLogger(tmp_path)
    callback = prox(start=15, freeze=20)

    class Spy(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 9:
                weight = pl_module.model[2].weight.detach() * callback.controller.metric_scale("model.2.weight")
                kept = weight * mask_24(weight)
                self.expected = (kept.square().sum() / weight.square().sum()).item()

    spy = Spy()
    fit([monitor(), callback, spy], logger=logger)
    assert callback.controller.metric_scale("model.2.weight") is not None
    assert rows_of(logger)[9]["sparsity_layers/model.2/retained_squared_norm"] == pytest.approx(spy.expected)


def test_layers_can_be_left_out(tmp_path):
    logger = CSVLogger(tmp_path)
    fit([monitor(per_layer=False), prox()], logger=logger)
    assert not any(key.startswith("sparsity_layers") for row in rows_of(logger).values() for key in row)


def test_tensorboard_holds_everything(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    fit([monitor(overview=True, histograms_every_n_steps=10, figures_every_n_steps=10), prox()], logger=logger)
    events = EventAccumulator(logger.log_dir, size_guidance={"images": 0, "histograms": 0, "tensors": 0})
    events.Reload()
    tags = events.Tags()
    scalars = {event.step: event.value for event in events.Scalars("sparsity/groups_24")}
    assert list(scalars) == [0, 4, 9, 11, 14, 19]
    assert scalars[19] == 1.0
    assert "sparsity_layers/model.4/groups_24" in tags["scalars"]
    assert [event.step for event in events.Histograms("sparsity_weights/model.2")] == [0, 9, 19]
    assert events.Histograms("sparsity_weights/model.2")[-1].histogram_value.num == 256
    assert {"sparsity/overview", "sparsity/masks"} <= set(tags["images"])
    assert events.Images("sparsity/overview")[0].encoded_image_string.startswith(b"\x89PNG")
    texts = [
        event.tensor_proto.string_val[0].decode() for event in events.Tensors("sparsity/phase_changes/text_summary")
    ]
    assert texts == [f"prox24: phase {phase} after step {step}" for phase, step in
                     (("dense", 0), ("sparsify", 5), ("frozen", 12))]  # fmt: skip


def test_several_loggers_and_the_figure_beside_each_log(tmp_path):
    loggers = [TensorBoardLogger(tmp_path / "tensorboard"), CSVLogger(tmp_path / "csv")]
    callback = monitor(overview=True)
    fit([callback, prox()], logger=loggers)
    assert rows_of(loggers[1])[19]["sparsity/groups_24"] == 1.0
    for logger in loggers:
        pixels = imread(f"{logger.log_dir}/sparsity.png")
        assert pixels.shape[0] > 500
        assert pixels.shape[1] > 800
        assert pixels.std() > 0.05
    assert not [path for path in tmp_path.rglob("*") if ".partial" in path.name]


def test_the_figure_is_written_although_the_run_fails(tmp_path):
    class Fails(TinyModule):
        def training_step(self, batch, batch_idx):
            if batch_idx == 8:
                raise RuntimeError("a bug of the user")
            return super().training_step(batch, batch_idx)

    logger = CSVLogger(tmp_path)
    with pytest.raises(RuntimeError, match="a bug of the user"):
        fit([monitor(overview=True), prox()], Fails(), logger=logger)
    assert imread(f"{logger.log_dir}/sparsity.png").size


def test_two_prox24_are_told_apart(tmp_path):
    logger = CSVLogger(tmp_path)
    first = prox(freeze=18, targets=["model.0"], name="first")
    second = prox(start=2, freeze=6, targets=["model.2"], name="second")
    callback = monitor(overview=True)
    trainer, _ = fit([first, callback, second], logger=logger)
    rows = rows_of(logger)
    assert rows[9]["sparsity/second/groups_24"] == 1.0
    assert rows[9]["sparsity/first/groups_24"] < 1.0
    assert "sparsity/groups_24" not in rows[9]
    assert {"sparsity_layers/model.0/rms", "sparsity_layers/model.2/rms"} <= rows[9].keys()
    assert list(callback.histories) == ["first", "second"]
    assert trainer.progress_bar_metrics["2:4"] == 1.0
    assert imread(f"{logger.log_dir}/sparsity_first.png").size


def test_the_figure_of_a_prox24_whose_name_holds_a_slash_is_written(tmp_path):
    logger = CSVLogger(tmp_path)
    parts = [prox(targets=["model.0"], name="encoder/first"), prox(targets=["model.2"], name="second")]
    fit([monitor(overview=True), *parts], logger=logger)
    assert imread(f"{logger.log_dir}/sparsity_encoder_first.png").size
    assert imread(f"{logger.log_dir}/sparsity_second.png").size


def test_without_prox24_it_selects_weights_itself(tmp_path):
    logger = CSVLogger(tmp_path)
    callback = monitor(skip=["model.0"])
    fit([callback], logger=logger)
    assert callback.histories["model"].layers == ("model.2.weight", "model.4.weight")
    rows = rows_of(logger)
    assert list(rows) == [0, 4, 9, 14, 19]
    assert rows[4].keys().isdisjoint({"sparsity/phase", "sparsity/step", "sparsity/strength"})


def test_a_pattern_that_matches_nothing_is_refused_before_the_first_batch():
    with pytest.raises(
        MisconfigurationException, match=r"SparsityMonitor: targets pattern 'modle\.\*' matches no weight"
    ):
        fit([monitor(targets=["modle.*"])])


def test_a_model_without_weights_to_watch_is_only_warned_about():
    class Module(TinyModule):
        def __init__(self):
            super().__init__()
            self.model = nn.Sequential(nn.Linear(8, 3), nn.Linear(3, 2), nn.Linear(2, 4))
            self.model[0].weight.requires_grad_(False)

    with pytest.warns(UserWarning, match="nothing to measure: no weight of the model can be 2:4"):
        trainer, _ = fit([monitor()], Module())
    assert trainer.global_step == 20


def test_nothing_between_measurements(measured):
    fit([monitor(every=6), prox(start=0, freeze=0)], steps=20)
    assert len(measured) == 1 + 3 + 1, "at the start, after steps 6, 12 and 18, and at the end"


def test_gradient_accumulation(measured):
    callback = monitor(every=1)
    fit([callback], steps=4, accumulate_grad_batches=3)
    assert callback.histories["model"].steps == [0, 1, 2, 3, 4]
    *during, at_the_end = measured
    assert len(during) == 5
    assert torch.equal(during[4], at_the_end), "a measurement follows its step"


def test_manual_optimisation_that_accumulates_by_itself(measured):
    class Manual(TinyModule):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            self.manual_backward(super().training_step(batch, batch_idx))
            if batch_idx % 4 == 3:
                self.optimizers().step()
                self.optimizers().zero_grad()

    callback = monitor(every=1)
    fit([callback], Manual(), steps=5)
    # Before the first step nobody can tell such a loop from one with optimizers that Lightning does not count.
    assert callback.histories["model"].steps == [0, 1, 2, 3, 4, 8, 12, 16, 20]


def test_manual_optimisation_with_bare_optimizers(measured):
    class Manual(TinyModule):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers(use_pl_optimizer=False)
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    callback = monitor(every=10)
    trainer = quiet_trainer(max_steps=-1, max_epochs=1, callbacks=[callback])
    trainer.fit(Manual(), tiny_loader(20))
    assert trainer.global_step == 0
    assert callback.histories["model"].steps == [0, 10, 20]


def test_one_read_from_the_device_a_measurement_and_none_between(monkeypatch):
    reads = []
    original = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: reads.append(self.shape) or original(self))
    callback = monitor(every=10)
    fit([callback], steps=20)
    assert reads == [(3, 11)] * 4, "three weights; at the start, after steps 10 and 20, and at the end"


def test_training_is_the_same_with_and_without_it(tmp_path):
    def trained(*callbacks):
        torch.manual_seed(0)
        _, module = fit([*callbacks, prox()], TinyModule(), logger=TensorBoardLogger(tmp_path))
        return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])

    torch.manual_seed(0)
    assert torch.equal(trained(), trained(monitor(every=1, overview=True, figures_every_n_steps=10)))


class Throws(CSVLogger):
    def log_metrics(self, metrics, step=None):
        raise ConnectionError("no route to host")


def test_a_logger_that_throws_is_reported_once(tmp_path):
    good = CSVLogger(tmp_path / "good")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer, _ = fit([monitor(), prox()], logger=[Throws(tmp_path / "bad"), good])
    told = [str(entry.message) for entry in caught if "SparsityMonitor" in str(entry.message)]
    assert told == [
        "SparsityMonitor: Throws.log_metrics failed, and the run continues without it: "
        "ConnectionError: no route to host"
    ]
    assert trainer.global_step == 20
    assert rows_of(good)[19]["sparsity/groups_24"] == 1.0


def test_a_folder_that_cannot_be_written_is_reported(tmp_path):
    class Elsewhere(CSVLogger):
        log_dir = str(tmp_path / "file" / "log")

        def save(self):
            pass

    (tmp_path / "file").write_text("not a folder")
    logger = Elsewhere(tmp_path)
    logger._experiment = DummyLogger().experiment
    logger.log_metrics = lambda metrics, step=None: None
    with pytest.warns(UserWarning, match=r"SparsityMonitor: writing sparsity\.png failed"):
        trainer, _ = fit([monitor(overview=True), prox()], logger=logger)
    assert trainer.global_step == 20


def test_without_a_logger():
    callback = monitor(overview=True)
    trainer, _ = fit([callback, prox()], logger=False)
    assert callback.histories["prox24"].groups_24[-1] == 1.0
    assert trainer.progress_bar_metrics["2:4"] == 1.0


def test_fast_dev_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = quiet_trainer(fast_dev_run=2, callbacks=[monitor(every=1, overview=True)], logger=True)
    trainer.fit(TinyModule(), tiny_loader())
    assert not list(tmp_path.rglob("*.png"))


@pytest.mark.filterwarnings("ignore:the weights are stored in torch.bfloat16")
def test_bf16_weights(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    callback = monitor(overview=True, histograms_every_n_steps=5)
    fit([callback, prox()], logger=logger, precision="bf16-true")
    assert callback.histories["prox24"].groups_24[-1] == 1.0


def test_a_compiled_model():
    module = TinyModule()
    module.model = torch.compile(module.model, backend="eager")
    callback = monitor()
    fit([callback, prox()], module)
    assert callback.histories["prox24"].layers == tuple(LAYERS)


def test_the_bar_keeps_its_value_between_measurements_and_epochs():
    seen = []

    class Module(TinyModule):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", self.training_step(batch, batch_idx), prog_bar=True)

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append(trainer.progress_bar_metrics.get("2:4"))

    trainer = quiet_trainer(
        max_steps=12,
        max_epochs=-1,
        callbacks=[monitor(every=4), prox(start=2, freeze=8), Watch()],
        num_sanity_val_steps=2,
    )
    trainer.fit(Module(), tiny_loader(3), tiny_loader(2))
    assert None not in seen
    assert seen[:2] == [0.0, 0.0]
    assert seen[2] == seen[0] or seen[2] > 0
    assert seen[3] == seen[4] == seen[5] == seen[6] > 0
    assert seen[7:] == [1.0] * 5


def test_the_bar_can_be_left_alone():
    trainer, _ = fit([monitor(progress_bar=False), prox()])
    assert "2:4" not in trainer.progress_bar_metrics


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every_n_steps": 0}, "every_n_steps=0 must be a whole number from 1 up"),
        ({"every_n_steps": "often"}, "every_n_steps='often' must be a whole number from 1 up"),
        ({"histograms_every_n_steps": -1}, "histograms_every_n_steps=-1 must be a whole number from 0 up"),
        ({"figures_every_n_steps": -1}, "figures_every_n_steps=-1 must be a whole number from 0 up"),
        ({"picture_layers": -1}, "picture_layers=-1 must be a whole number from 0 up"),
        ({"name": "a/b"}, "name='a/b' is a prefix"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        SparsityMonitor(**arguments)


def test_the_closing_table_is_printed(capsys):
    fit([monitor(summary=True), prox(targets=["model.2"])])
    printed = " ".join(capsys.readouterr().out.split())
    assert "prox24: 100 % of the groups, 1 of 1 weights are 2:4 after 20 steps" in printed
    assert "16 x 16" in printed
    assert "not 2:4" not in printed


def test_the_next_command_comes_after_the_tables_of_other_callbacks(capsys, tmp_path):
    class Table(Callback):
        def on_fit_end(self, trainer, pl_module):
            print("another table")

    def saved(name):
        return ModelCheckpoint(tmp_path / name, save_last=True)

    fit([monitor(summary=True), prox(targets=["model.2"]), Table(), saved("a")], enable_checkpointing=True)
    printed = capsys.readouterr().out
    assert printed.index("another table") < printed.index("next: prox24 doctor ")
    fit([monitor(summary=False), prox(targets=["model.2"]), saved("b")], enable_checkpointing=True)
    assert "next:" not in capsys.readouterr().out


def test_dense_layers_are_named(capsys):
    fit([monitor(summary=True)])
    printed = " ".join(capsys.readouterr().out.split())
    assert "3 of 3 weights are not 2:4: model.0.weight (0.00 %), model.2.weight (0.00 %)" in printed


class Validated(TinyModule):
    """Its losses are those that a test can name: the batch index, and at validation the step."""

    def training_step(self, batch, batch_idx):
        self.log("train_loss", torch.tensor(9.0))
        return super().training_step(batch, batch_idx) * 0 + batch_idx

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", torch.tensor(float(self.trainer.global_step)))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_losses_and_the_metric_that_a_callback_monitors_are_recorded(accumulate):
    callback = monitor(every=5)
    stopping = EarlyStopping("val_loss", mode="max", patience=9)
    trainer = quiet_trainer(
        max_steps=10,
        max_epochs=-1,
        accumulate_grad_batches=accumulate,
        callbacks=[callback, stopping],
        val_check_interval=5 * accumulate,
    )
    trainer.fit(Validated(), tiny_loader(10 * accumulate), tiny_loader(1))
    history = callback.histories["model"]
    batches = range(5 * accumulate)
    means = [math.nan, *(sum(b + start for b in batches) / len(batches) for start in (0, len(batches)))]
    assert history.steps == [0, 5, 10]
    assert history.series["loss"] == pytest.approx(means, nan_ok=True)
    assert (history.metric_name, history.metrics) == ("val_loss", [(5, 5.0), (10, 10.0)])


def test_the_metric_can_be_named():
    callback = monitor(metric="val_loss")
    trainer = quiet_trainer(max_steps=4, max_epochs=-1, callbacks=[callback], val_check_interval=4)
    trainer.fit(Validated(), tiny_loader(4), tiny_loader(1))
    assert callback.histories["model"].metrics == [(4, 4.0)]
