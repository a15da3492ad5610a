"""What a run with distillation optimises, and what it leaves as it was."""

from __future__ import annotations

import copy
import io
import logging
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from distilled_runs import ResidualClassifier, TinyClassifier, distillation, fit
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback
from tiny_runs import quiet_trainer, tiny_loader
from torch import nn

import prox24_lightning
from prox24_lightning import Distillation, Prox24, is_24
from prox24_lightning.finetune import weights_checksum


def kl(student, teacher):
    q, p = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean()


def trained_by_hand(module, loss, steps=3):
    """The same run written out: SGD on ``loss(student, teacher, x, y)`` for the first batches."""
    teacher = copy.deepcopy(module.model).eval().requires_grad_(False)
    optimizer = module.configure_optimizers()
    for x, y in list(tiny_loader())[:steps]:
        optimizer.zero_grad()
        loss(module.model, teacher, x, y).backward()
        optimizer.step()
    return module


def assert_equal_weights(one, other, **tolerance):
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


@pytest.mark.parametrize("share", [0.3, 1])
def test_the_run_follows_the_written_out_loss(share):
    def loss(student, teacher, x, y):
        logits = student(x)
        return (1 - share) * F.cross_entropy(logits, y.argmax(-1)) + share * kl(logits, teacher(x))

    module = TinyClassifier()
    expected = trained_by_hand(copy.deepcopy(module), loss)
    fit(module, distillation(share))
    assert_equal_weights(module, expected)


def test_temperature():
    def loss(student, teacher, x, y):
        logits = student(x)
        return 0.5 * F.cross_entropy(logits, y.argmax(-1)) + 0.5 * 9 * kl(logits / 3, teacher(x) / 3)

    module = TinyClassifier()
    expected = trained_by_hand(copy.deepcopy(module), loss)
    fit(module, distillation(temperature=3.0))
    assert_equal_weights(module, expected)


def test_the_squared_error_of_outputs_that_are_no_logits():
    def loss(student, teacher, x, y):
        return 0.5 * F.cross_entropy(student(x), y.argmax(-1)) + 0.5 * F.mse_loss(student(x), teacher(x))

    module = TinyClassifier()
    expected = trained_by_hand(copy.deepcopy(module), loss)
    fit(module, distillation(loss="mse"))
    assert_equal_weights(module, expected)


def test_features_add_the_relative_error_of_every_block():
    def states(model, x):
        found = []
        for block in model.blocks:
            found.append(block(x))
            x = x + found[-1].tanh()
        return found, model.head(x)

    def loss(student, teacher, x, y):
        (mine, logits), (theirs, target) = states(student, x), states(teacher, x)
        errors = [((a - b).norm(dim=-1) / b.norm(dim=-1)).square().mean() for a, b in zip(mine, theirs, strict=True)]
        return 0.5 * F.cross_entropy(logits, y.argmax(-1)) + 0.5 * kl(logits, target) + 2 * sum(errors) / 3

    module = ResidualClassifier()
    expected = trained_by_hand(copy.deepcopy(module), loss)
    trainer = fit(module, distillation(features=2.0))
    assert_equal_weights(module, expected)
    assert trainer.logged_metrics["distillation/features"] > 0


def test_another_teacher():
    torch.manual_seed(1)
    given = TinyClassifier(width=24).model.train()

    def loss(student, teacher, x, y):
        return 0.5 * F.cross_entropy(student(x), y.argmax(-1)) + 0.5 * kl(student(x), given(x).detach())

    module = TinyClassifier()
    expected = trained_by_hand(copy.deepcopy(module), loss)
    callback = distillation(teacher=given)
    fit(module, callback)
    assert_equal_weights(module, expected)
    assert callback.teacher is not given
    assert given.training, "the user's module is left as it is"
    assert all(value.requires_grad for value in given.parameters())


class Outputs(TinyClassifier):
    """Returns what ``self.form`` makes of the loss."""

    def training_step(self, batch, batch_idx):
        return self.form(super().training_step(batch, batch_idx), batch_idx)


class SeenOutputs(Callback):
    def __init__(self):
        self.outputs = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.outputs.append(outputs)


def test_a_mapping_keeps_its_other_entries():
    plain, module, seen = TinyClassifier(), Outputs(), SeenOutputs()
    module.load_state_dict(plain.state_dict())
    module.form = lambda loss, index: {"loss": loss, "index": index}
    fit(plain, distillation())
    fit(module, distillation(), seen)
    assert_equal_weights(module, plain)
    assert [output["index"] for output in seen.outputs] == [0, 1, 2]


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_skipped_batch_stays_skipped():
    module, callback, asked = Outputs(), distillation(), []
    module.form = lambda loss, index: None if index == 1 else loss

    class Count(Callback):
        def on_train_start(self, trainer, pl_module):
            callback.teacher.register_forward_hook(lambda *_: asked.append(trainer.global_step))

    fit(module, callback, Count())
    assert asked == [0, 2]


def test_a_validation_step_that_calls_the_training_step():
    class Shared(TinyClassifier):
        def validation_step(self, batch, batch_idx):
            seen.append((float(self.training_step(batch, batch_idx)), float(super().training_step(batch, batch_idx))))

    plain, module, seen = TinyClassifier(), Shared(), []
    module.load_state_dict(plain.state_dict())
    fit(plain, distillation())
    trainer = quiet_trainer(max_steps=3, max_epochs=-1, callbacks=[distillation()], val_check_interval=1)
    trainer.fit(module, tiny_loader(), tiny_loader(batches=2))
    assert_equal_weights(module, plain)
    assert len(seen) == 6
    assert all(called == alone for called, alone in seen)


def test_several_calls_in_a_step_are_averaged_and_those_without_gradients_do_not_count():
    class TwoViews(TinyClassifier):
        def training_step(self, batch, batch_idx):
            with torch.no_grad():
                self.model(100 * batch[0])
            return super().training_step(batch, batch_idx) + 0 * self.model(2 * batch[0]).sum()

    def loss(student, teacher, x, y):
        distances = kl(student(x), teacher(x)) + kl(student(2 * x), teacher(2 * x))
        return 0.5 * F.cross_entropy(student(x), y.argmax(-1)) + 0.25 * distances

    module = TwoViews()
    expected = trained_by_hand(copy.deepcopy(module), loss)
    fit(module, distillation())
    assert_equal_weights(module, expected)


def test_gradient_accumulation():
    plain, module = TinyClassifier(), TinyClassifier()
    module.load_state_dict(plain.state_dict())
    plain_data, data = tiny_loader(batches=4, batch_size=8), tiny_loader(batches=8, batch_size=4)
    for fitted, loader, accumulate in ((plain, plain_data, 1), (module, data, 2)):
        trainer = quiet_trainer(max_steps=4, callbacks=[distillation()], accumulate_grad_batches=accumulate)
        trainer.fit(fitted, loader)
    assert_equal_weights(module, plain)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_precisions(precision):
    module, callback = ResidualClassifier(), distillation(features=1.0)
    seen = []

    class Look(Callback):
        def on_train_start(self, trainer, pl_module):
            callback.teacher.register_forward_hook(lambda _m, args, output: seen.append((args[0].dtype, output.dtype)))

    trainer = fit(module, callback, Look(), precision=precision, steps=4)
    compute = torch.float64 if precision == "64-true" else torch.bfloat16
    assert seen[0][1] == compute, "the teacher runs in the student's precision"
    assert 0 < trainer.logged_metrics["distillation/loss"] < 1
    teacher_dtype = torch.float32 if precision == "bf16-mixed" else compute
    assert next(callback.teacher.parameters()).dtype == teacher_dtype


def test_distance_from_the_start_is_zero_at_the_first_step_and_logged():
    first = []

    class Look(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            first.append(float(trainer.callback_metrics["distillation/loss"]))

    fit(TinyClassifier(), distillation(), Look())
    assert first[0] < 1e-6
    assert first[2] > 1e-4


def test_distillation_keeps_the_student_nearer():
    def distance(*callbacks):
        torch.manual_seed(0)
        module = TinyClassifier()
        teacher = copy.deepcopy(module.model)
        fit(module, *callbacks, steps=40)
        x = torch.cat([x for x, _ in tiny_loader()])
        return float(kl(module.model(x), teacher(x)).detach())

    assert distance(distillation(0.9)) < 0.5 * distance()


@pytest.mark.parametrize("first", ["prox", "distillation"])
def test_the_teacher_does_not_change_while_the_student_trains_and_is_pruned(first):
    module, callback = TinyClassifier(), distillation()
    before = weights_checksum(module.model)
    outputs = module.model(torch.ones(2, 8)).detach()
    callbacks = [Prox24(2, 8, targets=["model.2"], verbose=False), callback]
    fit(module, *(callbacks if first == "prox" else reversed(callbacks)), steps=12)
    assert is_24(module.model[2].weight)
    assert weights_checksum(module.model) != before
    assert weights_checksum(callback.teacher) == before
    assert torch.equal(callback.teacher(torch.ones(2, 8)), outputs)
    assert all(value.grad is None for value in callback.teacher.parameters())


def test_the_teacher_runs_without_gradients_even_for_inputs_that_have_them():
    class Embeds(ResidualClassifier):
        def training_step(self, batch, batch_idx):
            return super().training_step((batch[0].requires_grad_(), batch[1]), batch_idx)

    callback, outputs = distillation(), []

    class Look(Callback):
        def on_train_start(self, trainer, pl_module):
            callback.teacher.register_forward_hook(lambda _m, _a, output: outputs.append(output.requires_grad))

    fit(Embeds(), callback, Look())
    assert outputs == [False, False, False]


class Shifts(nn.Linear):
    """Changes what it is called with, as an activation with inplace=True does that comes first."""

    def forward(self, x):
        return super().forward(x.sub_(1.0))


class TakesADataclass(nn.Sequential):
    def forward(self, batch):
        return super().forward(batch.x if isinstance(batch, Batch) else batch)


@dataclass
class Batch:
    x: torch.Tensor


@pytest.mark.parametrize("wrapped", [False, True], ids=["tensor", "dataclass"])
def test_a_model_that_changes_its_inputs_in_place(wrapped):
    class Wraps(TinyClassifier):
        def training_step(self, batch, batch_idx):
            x, y = batch
            return nn.functional.cross_entropy(self.model(Batch(x) if wrapped else x), y.argmax(-1))

    module, seen = Wraps(), []
    module.model = TakesADataclass(Shifts(8, 8), nn.ReLU(inplace=True), nn.Linear(8, 4))

    class Losses(Callback):
        def on_train_batch_end(self, trainer, *args):
            seen.append(float(trainer.callback_metrics["distillation/loss"]))

    fit(module, distillation(), Losses())
    assert seen[0] == pytest.approx(0, abs=1e-7)  # asked about the very same inputs
    assert seen[1] > 1e-6


def test_the_teacher_draws_no_random_numbers():
    def state_after(*callbacks):
        torch.manual_seed(0)
        module = ResidualClassifier(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 4)))
        fit(module, *callbacks)
        return torch.get_rng_state()

    assert torch.equal(state_after(distillation()), state_after())


def test_nothing_of_the_teacher_is_in_the_model_or_in_a_checkpoint(tmp_path):
    module, callback = TinyClassifier(), distillation()
    names = set(module.state_dict())
    found = {}

    class Look(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            found.update(parameters=len(list(pl_module.parameters())), state=set(pl_module.state_dict()))

    trainer = fit(module, callback, Look())
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    assert found == {"parameters": 6, "state": names}
    saved = torch.load(tmp_path / "run.ckpt", weights_only=True)
    assert set(saved["state_dict"]) == names
    [state] = [value for key, value in saved["callbacks"].items() if key.startswith("Distillation")]
    assert state == {"teacher_checksum": weights_checksum(callback.teacher)}


def test_the_wrapping_is_undone_after_the_fit():
    module = TinyClassifier()
    fit(module, distillation())
    assert "training_step" not in vars(module)
    assert not module.model._forward_hooks
    assert module.training_step(next(iter(tiny_loader())), 0).grad_fn is not None


def test_the_wrapping_is_undone_after_an_error():
    class Breaks(TinyClassifier):
        def training_step(self, batch, batch_idx):
            if batch_idx == 1:
                raise KeyError("broken data")
            return super().training_step(batch, batch_idx)

    module = Breaks()
    with pytest.raises(KeyError, match="broken data"):
        fit(module, distillation())
    assert "training_step" not in vars(module)
    assert not module.model._forward_hooks


def test_a_second_fit_keeps_the_teacher_and_another_model_gets_its_own():
    module, callback = TinyClassifier(), distillation()
    before = weights_checksum(module.model)
    fit(module, callback)
    fit(module, callback)
    assert weights_checksum(callback.teacher) == before
    torch.manual_seed(1)
    other = TinyClassifier()
    before = weights_checksum(other.model)
    fit(other, callback)
    assert weights_checksum(callback.teacher) == before


@pytest.mark.parametrize("how", ["child", "in place", "whole"])
def test_compiled(how):
    plain, module, graphs = ResidualClassifier(), ResidualClassifier(), []
    module.load_state_dict(plain.state_dict())
    fit(plain, distillation())

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    if how == "child":
        module.model = torch.compile(module.model, backend=backend, fullgraph=True)
    elif how == "in place":
        module.model.compile(backend=backend, fullgraph=True)
    if how != "whole":
        module.model(torch.randn(4, 8))  # the graph is built before anybody watches
    fit(torch.compile(module, backend=backend) if how == "whole" else module, distillation())
    assert_equal_weights(module, plain)
    assert len(graphs) == 1 or how == "whole", "the hook is outside of the graph"
    assert graphs
    # A LightningModule that was compiled keeps its compiled step; ours must be gone.
    assert "step_wrapper" not in module.training_step.__code__.co_filename


def test_a_step_that_takes_the_batch_alone():
    class BatchAlone(TinyClassifier):
        def training_step(self, batch):
            return super().training_step(batch, 0)

    fit(BatchAlone(), distillation())


def test_the_report(caplog):
    callback = Distillation(0.5)
    with caplog.at_level(logging.INFO):
        fit(TinyClassifier(width=64), callback, steps=20)
    size = (8 * 64 + 64 + 64 * 64 + 64 + 64 * 4 + 4) * 4
    assert callback.teacher_bytes == size
    assert f"Distillation: teacher Sequential, {size / 2**20:.1f} MiB beside the model" in caplog.text
    assert "Distillation: teacher and loss took " in caplog.text
    assert 0 < callback.time_share.ratio < 1
    assert callback.time_share.samples == 2


def test_from_yaml():
    parser = ArgumentParser()
    parser.add_argument("--callbacks", type=list[Callback])
    entry = {
        "class_path": "prox24_lightning.Distillation",
        "init_args": {
            "share": 0.25,
            "module": "model",
            "features": 1,
            "teacher": {"class_path": "torch.nn.Linear", "init_args": {"in_features": 2, "out_features": 3}},
        },
    }
    [callback] = parser.instantiate_classes(parser.parse_object({"callbacks": [entry]})).callbacks
    assert isinstance(callback, Distillation)
    assert (callback.share, callback.module, callback.features) == (0.25, "model", 1)
    [callback] = parser.instantiate_classes(
        parser.parse_object({"callbacks": [{"class_path": "prox24_lightning.Distillation"}]})
    ).callbacks
    assert callback.share == 0.5
    assert prox24_lightning.Distillation is Distillation


class TinyLlama(TinyClassifier):
    """A causal language model of Hugging Face: labels among its keywords, logits among its outputs."""

    def __init__(self):
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        self.model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=32,
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                attention_dropout=0.5,
            )
        ).train()

    def training_step(self, batch, batch_idx):
        tokens = (batch[0].abs() * 10).long() % 32
        return self.model(input_ids=tokens, labels=tokens).loss


def test_a_hugging_face_language_model():
    module, callback, answers = TinyLlama(), distillation(features=0.5), []

    class Look(Callback):
        def on_train_start(self, trainer, pl_module):
            callback.teacher.register_forward_hook(lambda _m, _a, output: answers.append(output))

    trainer = fit(module, callback, Look())
    assert answers[0].loss is None, "the teacher computes no loss"
    assert answers[0].past_key_values is None, "and keeps no cache"
    assert trainer.logged_metrics["distillation/loss"] > 0
    assert trainer.logged_metrics["distillation/features"] > 0


def test_modules_are_found_by_name():
    class Nested(TinyClassifier):
        def __init__(self):
            super().__init__()
            self.outer = nn.ModuleDict({"inner": self.model, "other": nn.Linear(2, 2)})
            del self.model

        @property
        def model(self):
            return self.outer["inner"]

        def configure_optimizers(self):
            return torch.optim.SGD(self.outer["inner"].parameters(), lr=0.5)

    plain, module = TinyClassifier(), Nested()
    module.outer["inner"].load_state_dict(plain.model.state_dict())
    fit(plain, distillation())
    fit(module, distillation(module="outer.inner"))
    assert_equal_weights(module.outer["inner"], plain)


@pytest.mark.gpu
def test_on_a_gpu():
    module, callback = ResidualClassifier(), distillation(features=1.0)
    devices = []

    class Look(Callback):
        def on_train_start(self, trainer, pl_module):
            devices.append(next(callback.teacher.parameters()).device.type)

    fit(module, callback, Look(), steps=20, accelerator="gpu", precision="bf16-mixed")
    assert devices == ["cuda"]
    assert next(callback.teacher.parameters()).device.type == "cpu", "its memory is given back after the fit"
    assert 0 < callback.time_share.ratio < 1


class Copied(Callback):
    """Copies and pickles the module in mid-run."""

    def __init__(self):
        self.copies = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 1:
            buffer = io.BytesIO()
            trainer_of_module, pl_module.trainer = pl_module.trainer, None
            torch.save(pl_module, buffer)
            self.copies.append(copy.deepcopy(pl_module))
            pl_module.trainer = trainer_of_module
            self.copies.append(torch.load(io.BytesIO(buffer.getvalue()), weights_only=False))


@pytest.mark.parametrize("features", [0.0, 1.0])
def test_copies_and_pickles_of_the_module_are_free_of_the_callback(features):
    module, copied = ResidualClassifier(), Copied()
    fit(module, distillation(features=features), copied)
    batch = next(iter(tiny_loader()))
    for other in copied.copies:
        before = F.cross_entropy(other.model(batch[0]), batch[1].argmax(-1))
        torch.testing.assert_close(other.training_step(batch, 0), before)
        with torch.no_grad():
            other.model.head.weight.mul_(2.0)
        assert not torch.equal(other.training_step(batch, 0), before), "the step of the copy is its own"
