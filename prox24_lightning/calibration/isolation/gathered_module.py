"""A module whose parameters are sharded, made callable on one rank alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from prox24_lightning.calibration.isolation.isolated import hooks_off
from prox24_lightning.weights.sharded import gathered, local_part, part_of, reshard, sharded_places


@contextmanager
def gathered_module(module: nn.Module) -> Iterator[dict[Tensor, nn.Parameter]]:
    """Put whole parameters in the places of sharded ones, and call ``module`` without the hooks that gather them.

    So a forward pass makes no collective call, and autograd sees plain tensors. All ranks enter together; memory: the
    whole module, on each. A module without sharded tensors is left as it is.

    Yields:
        sharded parameter -> the whole one in its place, the same one for tied parameters. Where no error ends the
        context, the sharded ones get their parts of what the whole ones hold then.
    """
    reshard(module)
    places = sharded_places(module)
    whole: dict[Tensor, Tensor] = {}
    for _, _, tensor in places:
        if tensor not in whole:
            values = gathered(tensor).clone()
            is_parameter = isinstance(tensor, nn.Parameter)
            whole[tensor] = nn.Parameter(values, requires_grad=tensor.requires_grad) if is_parameter else values
    if not places:
        yield {}
        return
    try:
        for held, name, tensor in places:
            held[name] = whole[tensor]
        with hooks_off(module):
            yield {tensor: value for tensor, value in whole.items() if isinstance(value, nn.Parameter)}
    finally:
        for held, name, tensor in places:
            held[name] = tensor
    with torch.no_grad():
        for tensor, value in whole.items():
            local_part(tensor).copy_(part_of(value.detach(), tensor))


def gathering_dtype(module: nn.Module) -> torch.dtype | None:
    """Return the dtype to which FSDP2's ``MixedPrecisionPolicy`` casts the module's parameters; None for their own."""
    for each in module.modules():
        state_of: Any = getattr(each, "_get_fsdp_state", None)  # no public way
        state = None if state_of is None else state_of()
        dtype = getattr(getattr(state, "_mp_policy", None), "param_dtype", None)
        if isinstance(dtype, torch.dtype):
            return dtype
    return None
