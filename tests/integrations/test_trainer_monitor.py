"""What Lightning's users have, in transformers.Trainer: phases, scalars, figure, table, progress, distillation."""

from __future__ import annotations

import pytest
import torch
from test_trainer_callback import FREEZE, START, STEPS, InOrder, Model, Samples, callback
from torch import nn
from transformers import TrainerCallback, TrainingArguments

from prox24_lightning import DistillationTrainerCallback, Prox24TrainerCallback, SparsityMonitorTrainerCallback
from prox24_lightning.mask import mask_24
from prox24_lightning.sparsify import solve_watch

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*no accelerator is found.*:UserWarning"),
]


class Records(TrainerCallback):
    """Stands for an integration (TensorBoard, Weights & Biases): it gets what the Trainer logs."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append((state.global_step, dict(logs)))


def make(folder, *callbacks, model=None, **arguments):
    settings = TrainingArguments(
        str(folder),
        **{
            "max_steps": STEPS,
            "per_device_train_batch_size": 4,
            "learning_rate": 0.01,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0.0,
            "save_steps": 6,
            "logging_steps": 2,
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
            "optim": "adamw_torch",
            **arguments,
        },
    )
    return InOrder(
        model or Model(), settings, train_dataset=Samples(), eval_dataset=Samples(), callbacks=list(callbacks)
    )


def test_scalars_figure_table_and_phases(tmp_path, capsys):
    records = Records()
    prox = Prox24TrainerCallback(START, FREEZE, targets=["model.0", "model.2"])
    trainer = make(tmp_path, records, prox, eval_strategy="steps", eval_steps=4)
    monitor = SparsityMonitorTrainerCallback(trainer, 3, per_layer=True)
    trainer.add_callback(monitor)
    trainer.train()
    shares = {step: logs["sparsity/groups_24"] for step, logs in records.logs if "sparsity/groups_24" in logs}
    assert set(shares) == {0, 3, 6, 8, 9, 12}  # every third, and the freeze
    assert shares[8] == shares[9] == shares[12] == 1.0 > shares[6]
    assert {step for step, logs in records.logs if "loss" in logs} == {2, 4, 6, 8, 10, 12}
    assert {"sparsity/phase", "sparsity/step", "sparsity_layers/model.0/groups_24"} <= set(
        next(logs for step, logs in records.logs if step == 8 and "sparsity/phase" in logs)
    )
    assert {"sparsity/groups_24", "loss"} <= set().union(*trainer.state.log_history)
    assert (tmp_path / "sparsity.png").stat().st_size > 10_000
    history = monitor.histories["prox24"]
    assert history.phases == [(0, "dense"), (START + 1, "sparsify"), (FREEZE, "frozen")]
    assert (history.metric_name, [step for step, _ in history.metrics]) == ("eval_loss", [4, 8, 12])
    assert sum(value == value for value in history.series["loss"]) >= 4
    shown = " ".join(capsys.readouterr().out.split())
    assert f"prox24: phase sparsify after step {START + 1}" in shown
    assert f"prox24: phase frozen after step {FREEZE}" in shown
    assert "prox24: 100 % of the groups, 2 of 2 weights are 2:4 after 12 steps" in shown
    assert "prox24: solving layers took" in shown
    assert "'loss'" in shown
    assert "sparsity/" not in shown  # loggers have the scalars


def test_a_monitor_that_is_added_first_sees_the_same(tmp_path, recwarn):
    trainer = make(tmp_path)
    trainer.add_callback(monitor := SparsityMonitorTrainerCallback(trainer, 2, summary=False, overview=False))
    trainer.add_callback(callback("post_step"))
    trainer.train()
    assert [phase for _, phase in monitor.histories["prox24"].phases] == ["dense", "sparsify", "frozen"]
    assert monitor.histories["prox24"].steps[-1] == STEPS
    assert not [warning for warning in recwarn if "SparsityMonitor" in str(warning.message)]


def test_the_history_goes_on_after_a_resume(tmp_path):
    def run(resume=None):
        trainer = make(tmp_path, callback("post_step"))
        trainer.add_callback(monitor := SparsityMonitorTrainerCallback(trainer, 2, summary=False, overview=False))
        trainer.train(resume_from_checkpoint=resume)
        return monitor.histories["prox24"]

    whole = run()
    assert run(str(tmp_path / "checkpoint-6")).steps == whole.steps


def test_without_a_prox24_lost_zeros_are_named(tmp_path):
    model = Model()
    with torch.no_grad():
        model.model[0].weight.mul_(mask_24(model.model[0].weight))
    trainer = make(tmp_path, model=model)
    trainer.add_callback(SparsityMonitorTrainerCallback(trainer, summary=False, overview=False))
    with pytest.warns(UserWarning, match=r"model.0.weight is no longer 2:4.*Prox24TrainerCallback\(strategy='keep'\)"):
        trainer.train()


def test_lines_while_layers_are_solved(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(solve_watch, "_FIRST_SHOWN", 0.0)
    monkeypatch.setattr(solve_watch, "_SHOWN_EVERY", 0.0)
    monkeypatch.setattr(solve_watch.LogLines, "show", lambda self, state: self._say(f"solving {state}"))
    make(tmp_path, Prox24TrainerCallback(START, FREEZE, targets=["model.0", "model.2"])).train()
    assert "solving block 2 of 2 (model.2)" in capsys.readouterr().out


def test_an_interrupted_solve_says_how_to_go_on(tmp_path, capsys, monkeypatch):
    from prox24_lightning.sparsify.strategies.progressive import rerun_calibration

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(rerun_calibration, "solve_block", interrupt)
    prox = callback()
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, prox).train()
    assert prox.phase == "sparsify"
    assert "prox24: stopped while it solved block 1 of 2 (model.0): weights are as before; go on" in (
        capsys.readouterr().out
    )


# Distillation.


class Classifier(nn.Module):
    """Returns logits and a loss; as transformers' models do, it divides by ``num_items_in_batch`` if it is given."""

    accepts_loss_kwargs = False

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))

    def forward(self, x, labels=None):
        logits = self.model(x)
        return {"loss": None if labels is None else nn.functional.mse_loss(logits, labels), "logits": logits}


class Scaled(Classifier):
    accepts_loss_kwargs = True

    def forward(self, x, labels=None, num_items_in_batch=None):
        logits = self.model(x)
        loss = None
        if labels is not None:
            loss = (logits - labels).square().sum() / (num_items_in_batch or labels.numel())
        return {"loss": loss, "logits": logits}


def distilled(folder, model, *, share=0.5, teacher=None, resume=None, **arguments):
    records = Records()
    trainer = make(folder, records, model=model, **arguments)
    own = trainer.compute_loss
    distillation = DistillationTrainerCallback(trainer, share, teacher=teacher, loss="mse")
    trainer.add_callback(distillation)
    trainer.train(resume_from_checkpoint=resume)
    assert trainer.compute_loss == own
    return trainer, [logs["distillation/loss"] for _, logs in records.logs if "distillation/loss" in logs]


def test_the_loss_is_mixed_with_the_distance_from_the_teacher(tmp_path):
    teacher = Classifier(seed=1)
    trainer, losses = distilled(tmp_path, Classifier(), share=1.0, teacher=teacher, max_steps=60, logging_steps=6)
    assert len(losses) == 10
    assert losses[-1] < 0.3 * losses[0]
    x = Samples().x
    assert (trainer.model(x)["logits"] - teacher(x)["logits"]).square().mean() < (
        Classifier()(x)["logits"] - teacher(x)["logits"]
    ).square().mean()


@pytest.mark.parametrize("kind", [Classifier, Scaled])
def test_accumulated_batches_are_the_large_batch(tmp_path, kind):
    """The share of the teacher is the same whether a step takes one batch of 8 or two of 4."""
    arguments = {"teacher": Classifier(seed=1), "share": 1.0, "max_steps": 2, "optim": "sgd", "learning_rate": 0.5}
    one, _ = distilled(tmp_path / "one", kind(), per_device_train_batch_size=8, **arguments)
    two, _ = distilled(tmp_path / "two", kind(), gradient_accumulation_steps=2, **arguments)
    for mine, theirs in zip(one.model.parameters(), two.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)


def test_another_teacher_than_in_the_checkpoint_is_refused(tmp_path):
    distilled(tmp_path, Classifier(), teacher=Classifier(seed=1))
    with pytest.raises(ValueError, match="was written with another teacher"):
        distilled(tmp_path, Classifier(), teacher=Classifier(seed=2), resume=str(tmp_path / "checkpoint-6"))
    distilled(tmp_path, Classifier(), teacher=Classifier(seed=1), resume=str(tmp_path / "checkpoint-6"))


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"share": 0}, "share=0"),
        ({"temperature": 0}, "temperature=0"),
        ({"teacher": "my-teacher"}, "teacher='my-teacher' is no model: load it first, as by from_pretrained"),
    ],
)
def test_wrong_settings(tmp_path, arguments, words):
    with pytest.raises(ValueError, match=words):
        DistillationTrainerCallback(make(tmp_path), **arguments)
    with pytest.raises(ValueError, match="every_n_steps=0"):
        SparsityMonitorTrainerCallback(make(tmp_path), 0)
