"""Spend a budget of dense weights on the layers that 2:4 hurts most."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from prox24_lightning.calibration.input_groups import find_input_groups
from prox24_lightning.oneshot.hidden_states import Flow
from prox24_lightning.oneshot.parallel import check_same_stages
from prox24_lightning.oneshot.progress import LayerProgress
from prox24_lightning.solvers.input_group import input_group_hessian
from prox24_lightning.solvers.layer import solve_layer
from prox24_lightning.weights.layer_matrix import as_matrix
from prox24_lightning.weights.selection import GroupedWeight, SkippedWeight


def within_budget(
    flow: Flow, chosen: Sequence[GroupedWeight], budget: float, bar: LayerProgress
) -> tuple[list[GroupedWeight], list[SkippedWeight]]:
    """Split ``chosen`` into what is pruned and what stays dense: the most sensitive layers that fit into ``budget``.

    A layer's sensitivity is the share of its output's energy that Wanda's mask with refined values loses, on the
    inputs of the dense model.

    Args:
        flow: at the first block; it is not moved on.
        budget: share of the weights of ``chosen``; experts count, but none of them stays dense.
    """
    layers = [weight for weight in chosen if not weight.is_experts]
    losses = _sensitivities(flow, layers, bar)
    room = budget * sum(weight.parameter.numel() for weight in chosen)
    dense: dict[str, SkippedWeight] = {}
    for weight in sorted(layers, key=lambda weight: -losses.get(weight.name, 0.0)):
        if weight.parameter.numel() <= room:
            room -= weight.parameter.numel()
            dense[weight.name] = SkippedWeight(
                weight.name,
                type(weight.module).__name__,
                tuple(weight.parameter.shape),
                f"budget: 2:4 would lose {losses.get(weight.name, 0.0):.4f} of its output's energy",
            )
    return [weight for weight in chosen if weight.name not in dense], list(dense.values())


def _sensitivities(flow: Flow, chosen: Sequence[GroupedWeight], bar: LayerProgress) -> dict[str, float]:
    scout = flow.copy()
    losses: dict[str, float] = {}
    for index, block in enumerate(flow.blocks.modules):
        block.to(flow.device)
        inside = {weight.module: weight for weight in chosen if flow.blocks.owns(index, weight.module_name)}
        stages = find_input_groups(list(inside), partial(scout.run, index, block, 0))
        check_same_stages(stages, {layer: weight.name for layer, weight in inside.items()})
        for stage in stages:
            moments = input_group_hessian(
                stage, [partial(scout.run, index, block, number) for number in range(len(scout))]
            )
            for layer in stage.layers:
                weight = inside[layer]
                bar.describe(f"sensitivity of {weight.module_name}")
                solution = solve_layer(
                    as_matrix(layer),
                    moments.hessian,
                    method="wanda",
                    refine_steps=50,
                    dim=weight.matrix_dim,
                    name=weight.module_name,
                )
                losses[weight.name] = solution.refined_loss or 0.0
        scout.advance(index, block)
        block.to(flow.home)
    return losses
