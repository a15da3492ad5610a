"""ADMM with the exact prox: the multiplier over growing rho, and the strength at the end."""

from __future__ import annotations

from correlated_layer import layer

from prox24_lightning.mask import is_24, mask_24
from prox24_lightning.solvers.admm import admm
from prox24_lightning.solvers.loss import input_scale, relative_loss


def loss_of(weight, hessian, **arguments):
    found = admm(weight, hessian, **arguments)
    return relative_loss(found * mask_24(found, scale=input_scale(hessian)), weight, hessian)


def test_few_steps_with_fast_growing_rho_come_close_to_many():
    """Ten steps let rho grow by 1.67 each: a multiplier that is not rescaled with it loses 60 % more."""
    weight, hessian = layer(64, 16, 0.9)
    assert loss_of(weight, hessian, steps=10) < 1.2 * loss_of(weight, hessian)


def test_groups_of_small_weights_are_24_at_the_last_strength():
    """The strength at which the prox makes a group 2:4 grows as its weights shrink."""
    weight, hessian = layer(16, 32, 0.5)
    weight[:, 16:] *= 0.05
    assert is_24(admm(weight, hessian))
