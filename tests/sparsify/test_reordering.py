"""Weights move into another order in the middle of training, and the training goes on as if they had not."""

import copy

import pytest
import torch
from tiny_reordered import IDS, IMAGES, conv_net, llama
from torch import nn

from prox24_lightning.calibration.free_orders.find import find_free_orders
from prox24_lightning.finetune.optimizer_state import OptimizerState
from prox24_lightning.solvers.input_order.choose import ChosenOrder
from prox24_lightning.sparsify.reordering import move_all, optimizer_companions

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.003, weight_decay=0.1),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.003, amsgrad=True),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.001),
}


def free_orders(model, run):
    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    with torch.no_grad():
        orders, _ = find_free_orders(model.eval(), run, layers)
    model.train()
    return [ChosenOrder(order, order.random_order(seed), -0.1) for seed, order in enumerate(orders)]


def steps(forward, optimizer, count):
    for _ in range(count):
        optimizer.zero_grad()
        forward().float().square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("kind", ["convolutions", "llama"])
def test_training_goes_on_as_if_nothing_had_moved(kind, name):
    model, forward = conv_net() if kind == "convolutions" else llama()
    data = {"convolutions": lambda m: m(IMAGES), "llama": lambda m: m(IDS, use_cache=False).logits}[kind]
    chosen = free_orders(model, forward)
    if kind == "convolutions":  # those of the residual stream are not free
        chosen = [one for one in chosen if one.free.consumers[0] in (model.one.second, model.project, model.head)]
    still = copy.deepcopy(model)
    optimizers = [OPTIMIZERS[name](each.parameters()) for each in (model, still)]
    for each, optimizer in zip((model, still), optimizers, strict=True):
        steps(lambda each=each: data(each), optimizer, 3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert len(move_all(chosen, [optimizer_companions(optimizers[:1])])) == len(chosen) > 1
    assert any(not torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for each, optimizer in zip((model, still), optimizers, strict=True):
        steps(lambda each=each: data(each), optimizer, 3)
    torch.testing.assert_close(data(model.eval()), data(still.eval()), rtol=1e-3, atol=1e-4)


def test_gradients_that_wait_for_the_next_step_move_too():
    model, forward = llama()
    chosen = free_orders(model, forward)
    layer = model.model.layers[0].mlp.down_proj
    forward().square().mean().backward()
    gradient, order = layer.weight.grad.clone(), next(one for one in chosen if layer in one.free.consumers)
    move_all([order], [])
    assert torch.equal(layer.weight.grad, gradient[:, order.order])


def test_an_optimizer_that_keeps_factors_keeps_the_order():
    model, forward = llama()
    chosen = free_orders(model, forward)
    optimizer = torch.optim.Adafactor(model.parameters())
    steps(forward, optimizer, 1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert move_all(chosen, [optimizer_companions([optimizer])]) == []
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="not elementwise"):
        OptimizerState(optimizer).of_one_shape(set(model.parameters()))


def test_masters_move_with_their_weights():
    model, forward = llama()
    chosen = free_orders(model, forward)
    model.bfloat16()
    masters = [parameter.detach().float() for parameter in model.parameters()]
    optimizer = torch.optim.SGD(masters, lr=0.1)
    assert move_all(chosen, [optimizer_companions([optimizer])])
    for parameter, master in zip(model.parameters(), masters, strict=True):
        assert torch.equal(parameter, master.bfloat16())
