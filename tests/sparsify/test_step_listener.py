"""One call for each real step, whoever wraps whom; steps that no hook announces are reported early."""

from __future__ import annotations

import pytest
import torch
from odd_optimizers import SharpnessAware, SlowWeights
from torch import nn

from prox24_lightning.sparsify.step_listener import PATIENCE, StepListener


class Model:
    """A weight, the optimizers that ``make`` gives it, and the steps that a listener has noticed."""

    def __init__(self, *makes):
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(8, 8))
        self.optimizers = [make([self.weight]) for make in makes]
        self.steps = []
        self.listener = StepListener(self.steps.append)
        self.listener.bind(self.optimizers)

    def backward(self):
        self.weight.grad = None
        self.weight.square().sum().backward()


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def sharpness_aware(parameters):
    return SharpnessAware(parameters, torch.optim.SGD, lr=0.1)


def test_two_half_steps_are_one_step():
    model = Model(sharpness_aware)
    (sam,) = model.optimizers
    for _ in range(3):
        model.backward()
        sam.first_step()
        model.backward()
        sam.second_step()
    assert model.steps == [sam] * 3


def test_a_step_with_a_closure_that_steps_the_wrapped_optimizer_is_one_step():
    model = Model(sharpness_aware)
    (sam,) = model.optimizers
    sam.step(model.backward)
    assert model.steps == [sam]


def test_a_wrapper_is_called_after_its_own_update():
    model = Model(lambda p: SlowWeights(sgd(p)))
    (slow,) = model.optimizers
    for _ in range(5):
        model.backward()
        slow.step()
    assert model.steps == [slow] * 5


def test_an_optimizer_that_is_wrapped_and_listed_counts_once():
    inner = []
    model = Model(lambda p: inner.append(sgd(p)) or SlowWeights(inner[0]), lambda p: inner[0])
    model.backward()
    inner[0].step()
    assert model.steps == [model.optimizers[0]]


def test_a_step_that_a_gradient_scaler_skips_does_not_count():
    model = Model(lambda p: SlowWeights(sgd(p)))
    (slow,) = model.optimizers
    model.backward()
    slow.found_inf = torch.tensor(1.0)
    slow.step()
    assert model.steps == []


def test_weights_that_change_without_a_step_are_reported_after_a_few_batches():
    model = Model(sgd)

    def batch():
        model.listener.before_batch([model.weight])
        with torch.no_grad():
            model.weight.add_(1.0)

    for _ in range(PATIENCE):
        batch()
    with pytest.raises(RuntimeError, match=r"changed in 3 batches, but none of the optimizers \(SGD\) has announced"):
        batch()


def test_a_step_that_was_noticed_once_ends_the_search():
    model = Model(sgd)
    model.backward()
    model.optimizers[0].step()
    for _ in range(2 * PATIENCE):
        model.listener.before_batch([model.weight])
        with torch.no_grad():
            model.weight.add_(1.0)


def test_batches_that_change_nothing_are_no_reason_to_stop():
    model = Model(sgd)
    with torch.no_grad():
        model.weight[0, 0] = torch.nan
    for _ in range(2 * PATIENCE):
        model.listener.before_batch([model.weight])


def test_no_hooks_are_left():
    model = Model(lambda p: SlowWeights(sgd(p)))
    model.listener.unbind()
    for optimizer in (model.optimizers[0], model.optimizers[0].inner):
        assert not optimizer._optimizer_step_pre_hooks
        assert not optimizer._optimizer_step_post_hooks
