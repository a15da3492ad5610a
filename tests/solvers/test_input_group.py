"""Hessians of layers that share an input, where the dense reference sees other tokens than the model."""

from __future__ import annotations

import torch
from torch import nn

from prox24_lightning.calibration.input_groups import InputGroup
from prox24_lightning.solvers.input_group import input_group_hessian


def test_inputs_that_the_dense_reference_does_not_share_are_not_compared():
    """Each batch is run once all the same: reruns of sharded blocks make collective calls, which the ranks share."""
    torch.manual_seed(0)
    layer = nn.Linear(4, 4)
    group = InputGroup((layer,), once=True)
    inputs = [torch.randn(tokens, 4) for tokens in (3, 5, 2)]
    asked, run = [], []

    def called(number):
        run.append(number)
        return layer(inputs[number])

    def dense_inputs(group, number):
        asked.append(number)
        return [inputs[number][: 4 if number == 1 else None]]

    runs = [lambda number=number: called(number) for number in range(3)]
    found = input_group_hessian(group, runs, dense_inputs)
    assert asked == [0, 1, 2]
    assert run == [0, 1, 2]
    assert found.cross is None
    assert found.tokens == 10
    together = torch.cat(inputs)
    torch.testing.assert_close(found.hessian, together.T @ together / 10)
    compared = input_group_hessian(group, runs[:1], dense_inputs)
    torch.testing.assert_close(compared.cross, inputs[0].T @ inputs[0] / 3)
