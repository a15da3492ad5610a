"""Which optimizers are wrapped, which cannot work, and where they keep weights outside of their state."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from prox24_lightning.weights.sharded import local_part

_OUTSIDE = "keeps fp32 copies of the weights outside of its state; use the trainer's mixed precision (bf16-mixed)"
REFUSED = {
    "LBFGS": "has a curvature history, which a prox between steps makes false",
    "FTRL": "computes weights from sums of gradients alone and would bring pruned ones back",
    "Lomo": "steps inside of the backward pass, where no step can be noticed",
    "AdaLomo": "steps inside of the backward pass, where no step can be noticed",
    "FP16_Optimizer": _OUTSIDE,
    "FP16Optimizer": _OUTSIDE,
    "SafeFP16Optimizer": _OUTSIDE,
    "DistributedFusedAdam": _OUTSIDE,
    "DistributedFusedLAMB": _OUTSIDE,
}
"""Class name -> why the weights that such an optimizer trains cannot become 2:4."""


def wrapped_optimizers(optimizer: Optimizer) -> list[Optimizer]:
    """Return ``optimizer`` and all optimizers that it wraps (SAM's base, Lookahead's inner one), outermost first."""
    found = [optimizer]
    for outer in found:
        for leaf in tree_leaves(vars(outer)):
            if isinstance(leaf, Optimizer) and not any(leaf is known for known in found):
                found.append(leaf)
    return found


def masters_of(optimizers: Iterable[Optimizer], parameters: Iterable[Tensor]) -> dict[Tensor, Tensor]:
    """Return the tensors that optimizers train in the place of ``parameters``: fp32 masters that they copy from.

    Each is a tensor of the parameter's shape and, rounded to its dtype, values; of parameters that are trained
    themselves there is none.
    """
    trained = [tensor for optimizer in optimizers for group in optimizer.param_groups for tensor in group["params"]]
    own, known = dict.fromkeys(parameters), set(trained)
    untrained = [parameter for parameter in own if parameter not in known]
    spare = [tensor for tensor in trained if tensor not in own]
    found: dict[Tensor, Tensor] = {}
    for parameter in untrained:
        for index, tensor in enumerate(spare):
            if tensor.shape == parameter.shape and _is_master(tensor, parameter):
                found[parameter] = spare.pop(index)
                break
    return found


def check_optimizer(optimizer: Optimizer) -> None:
    """Refuse optimizers whose steps cannot be noticed, or that would undo or misread a prox between steps.

    Raises:
        ValueError: with the name and the remedy.
    """
    for part in wrapped_optimizers(optimizer):
        name = type(part).__name__
        if not hasattr(part, "_optimizer_step_post_hooks"):
            raise ValueError(
                f"the step hooks of torch.optim.Optimizer are needed, which {name} lacks; derive it from "
                "torch.optim.Optimizer and call its __init__"
            )
        for base in type(part).__mro__:
            if reason := REFUSED.get(base.__name__):
                raise ValueError(f"this cannot work with {base.__name__}: it {reason}; use SGD, Adam or AdamW")


def copies_in_attributes(
    parts: Iterable[Optimizer], parameters: Mapping[Tensor, Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """Return (parameter, copy) for the tensors in attributes of optimizers that have the values of a parameter.

    Tensors are matched in order, once for each attribute, since fresh biases and norms are all equal.
    """
    found: list[tuple[Tensor, Tensor]] = []
    for part in parts:
        tensors = [tensor for group in part.param_groups for tensor in group["params"]]
        for name, value in vars(part).items():
            if name in ("param_groups", "state", "defaults"):
                continue
            free = [parameters.get(tensor, tensor) for tensor in tensors]
            known = {*tensors, *free}
            for leaf in tree_leaves(value):
                if not isinstance(leaf, Tensor) or leaf in known:
                    continue
                fits = (i for i, p in enumerate(free) if p.shape == leaf.shape and _is_master(leaf, p))
                if (index := next(fits, None)) is not None:
                    found.append((free.pop(index), leaf))
    return found


def _is_master(tensor: Tensor, parameter: Tensor) -> bool:
    master, weight = local_part(tensor), local_part(parameter)
    return master.shape == weight.shape and torch.equal(master.to(weight.device, weight.dtype), weight)
