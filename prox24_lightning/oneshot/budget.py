"""Spend a budget of dense weights on the layers that 2:4 hurts most."""

from __future__ import annotations

from collections.abc import Sequence

from prox24_lightning.calibration.input_groups import find_input_groups
from prox24_lightning.oneshot.block_inputs import BlockInputs
from prox24_lightning.oneshot.parallel import check_same_input_groups
from prox24_lightning.oneshot.progress import LayerProgress
from prox24_lightning.solvers.config import SolverConfig
from prox24_lightning.solvers.input_group import input_group_hessian
from prox24_lightning.solvers.layer import solve
from prox24_lightning.weights.layer_matrix import as_matrix
from prox24_lightning.weights.selection import GroupedWeight, SkippedWeight

SENSITIVITY = SolverConfig("wanda", refine_steps=50)


def within_budget(
    inputs: BlockInputs, chosen: Sequence[GroupedWeight], budget: float, bar: LayerProgress
) -> tuple[list[GroupedWeight], list[SkippedWeight]]:
    """Split ``chosen`` into what is pruned and what stays dense: the most sensitive layers that fit into ``budget``.

    A layer's sensitivity is the share of its output's squared norm that Wanda's mask with refined values loses, on the
    inputs of the dense model.

    Args:
        inputs: of the first block, where they stay.
        budget: share of the weights of ``chosen``; experts count, but none of them stays dense.
    """
    layers = [weight for weight in chosen if not weight.is_experts]
    losses = _sensitivities(inputs, layers, bar)
    room = budget * sum(weight.parameter.numel() for weight in chosen)
    dense: dict[str, SkippedWeight] = {}
    for weight in sorted(layers, key=lambda weight: -losses.get(weight.name, 0.0)):
        if weight.parameter.numel() <= room:
            room -= weight.parameter.numel()
            dense[weight.name] = SkippedWeight(
                weight.name,
                type(weight.module).__name__,
                tuple(weight.parameter.shape),
                f"budget: 2:4 would lose {losses.get(weight.name, 0.0):.4f} of its output's squared norm",
            )
    return [weight for weight in chosen if weight.name not in dense], list(dense.values())


def _sensitivities(inputs: BlockInputs, chosen: Sequence[GroupedWeight], bar: LayerProgress) -> dict[str, float]:
    losses: dict[str, float] = {}
    with inputs.copied() as own:
        for index in range(len(own.blocks)):
            inside = {weight.module: weight for weight in chosen if own.blocks.owns(index, weight.module_name)}
            with own.on_device(index) as block:
                runs = own.runs(index, block)
                groups = find_input_groups(list(inside), runs[0])
                check_same_input_groups(groups, {layer: weight.name for layer, weight in inside.items()})
                for group in groups:
                    hessian = input_group_hessian(group, runs).hessian
                    for layer in group.layers:
                        weight = inside[layer]
                        bar.describe(f"sensitivity of {weight.module_name}")
                        matrix = as_matrix(layer)
                        solution = solve(matrix, hessian, SENSITIVITY, dim=weight.matrix_dim, name=weight.module_name)
                        losses[weight.name] = solution.refined_loss or 0.0
                own.advance(index, block)
    return losses
