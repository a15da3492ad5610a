"""A sharded model on one rank: whole tensors and plain modules, for what one process alone does with it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from prox24_lightning.utils.distributed import rank
from prox24_lightning.weights.sharded import gathered, is_fsdp, reshard, sharded_places

_STATE_OF_FSDP = "__composable_api"


@contextmanager
def whole_on_first(model: nn.Module) -> Iterator[None]:
    """Put whole tensors, on the CPU, in the places of sharded ones, on the first rank; all ranks enter together.

    There FSDP2's modules are of their own class again, so that the model can be copied. Their hooks stay: call a copy
    without them (:func:`~prox24_lightning.utils.module_copy.bare_copy`), not the model. On the other ranks nothing
    changes, and what the first one does needs none of them. Afterwards the model is as it was.
    """
    reshard(model)
    places = sharded_places(model)
    whole: dict[Tensor, Tensor] = {}
    for _, _, tensor in places:
        if tensor not in whole:
            values = gathered(tensor)  # one tensor at a time
            whole[tensor] = values.cpu() if rank() == 0 else tensor
            if rank() == 0 and isinstance(tensor, nn.Parameter):
                whole[tensor] = nn.Parameter(whole[tensor], requires_grad=tensor.requires_grad)
    if rank():
        yield
        return
    managed: list[tuple[nn.Module, type, dict[str, Any]]] = []
    try:
        for held, name, tensor in places:
            held[name] = whole[tensor]
        for module in list(model.modules()):
            if is_fsdp(module):
                state = {key: value for key, value in vars(module).items() if key.startswith(_STATE_OF_FSDP)}
                managed.append((module, type(module), state))
                module.__class__ = type(module).__bases__[-1]
                for key in state:
                    del vars(module)[key]
        yield
    finally:
        for module, kind, state in managed:
            module.__class__ = kind
            vars(module).update(state)
        for held, name, tensor in places:
            held[name] = tensor
