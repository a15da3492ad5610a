"""RoundWeights in transformers.Trainer: when layers are rounded, what is logged, and what is left."""

from __future__ import annotations

import pytest
import torch
from test_trainer_callback import FREEZE, START, STEPS
from test_trainer_monitor import Classifier, Records, make
from transformers import TrainerCallback

from prox24_lightning import Prox24TrainerCallback, RoundWeightsTrainerCallback, mask_24

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*no accelerator is found.*:UserWarning"),
]


class Pruned(Classifier):
    def __init__(self):
        super().__init__()
        with torch.no_grad():
            for layer in (self.model[0], self.model[2]):
                layer.weight *= mask_24(layer.weight)


class Probe(TrainerCallback):
    """Notes in each training and evaluation step whether the first layer is rounded."""

    def __init__(self):
        self.steps, self.evaluations = [], []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.steps.append("forward" in vars(model.model[0]))

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        self.evaluations.append("forward" in vars(model.model[0]))


def run(folder, *callbacks, resume=None, model=None, start=0.0, form="int8", **arguments):
    probe = Probe()
    trainer = make(folder, *callbacks, model=model or Pruned(), **arguments)
    trainer.add_callback(RoundWeightsTrainerCallback(trainer, form, start))
    trainer.add_callback(probe)
    trainer.train(resume_from_checkpoint=resume)
    assert not any("forward" in vars(module) for module in trainer.model.modules())
    return trainer, probe


def test_rounding_begins_at_the_freeze_and_evaluations_see_it(tmp_path, capsys):
    prox = Prox24TrainerCallback(START, FREEZE, strategy="post_step", targets=["model.0"], verbose=False)
    records = Records()
    options = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "loss", "logging_steps": 4}
    _, probe = run(tmp_path, records, prox, model=Classifier(), **options)
    assert probe.steps == [False] * FREEZE + [True] * (STEPS - FREEZE)
    assert probe.evaluations == [False] * (FREEZE - 1) + [True] * (STEPS - FREEZE + 1)
    assert "1 layer with weights and inputs rounded to int8 from now on" in (text := capsys.readouterr().out)
    assert "1 layer trained for int8, which changes their weights by" in text
    logged = [step for step, values in records.logs if "rounding/weights" in values]
    assert logged == [step for step in range(4, STEPS + 1, 4) if step >= FREEZE]


def test_a_resumed_run_equals_the_unbroken_one(tmp_path):
    keep = lambda: Prox24TrainerCallback(strategy="keep", verbose=False)  # noqa: E731
    whole, probe = run(tmp_path, keep(), start=4)
    assert probe.steps == [False] * 4 + [True] * (STEPS - 4)
    again, probe = run(tmp_path, keep(), start=4, resume=str(tmp_path / "checkpoint-6"))
    assert probe.steps == [True] * (STEPS - 6)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name


def test_zeros_that_nothing_keeps_are_watched(tmp_path):
    with pytest.warns(UserWarning, match="nothing enforces the masks"):
        _, probe = run(tmp_path, max_steps=2)
    assert probe.steps == [True, True]


def test_a_model_without_zeros_is_refused_and_a_late_start_is_named(tmp_path):
    with pytest.raises(ValueError, match="no weight of the model is 2:4, and no Prox24"):
        run(tmp_path, model=Classifier())
    late = Prox24TrainerCallback(2, STEPS, strategy="post_step", targets=["model.0"], verbose=False)
    with pytest.warns(UserWarning, match=f"ended at step {STEPS} before the rounding to int8 began"):
        run(tmp_path, late, model=Classifier())
