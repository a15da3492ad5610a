"""The dense reference of a sharded module: its values. FSDP2 modules cannot be copied, so the values change places."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from prox24_lightning.utils.distributed import rank
from prox24_lightning.weights.sharded import local_part, part_of, reshard, whole


class DenseWeights:
    """The values that the parameters and buffers of a module have now, this rank's parts of them."""

    def __init__(self, module: nn.Module) -> None:
        reshard(module)
        self._module = module
        self._values = {name: local_part(tensor).clone() for name, tensor in self._tensors().items()}

    def _tensors(self) -> dict[str, Tensor]:
        return {**dict(self._module.named_parameters()), **dict(self._module.named_buffers())}

    @contextmanager
    def in_place(self, part: nn.Module) -> Iterator[None]:
        """``part`` of the module has the old values inside the block."""
        inside = {id(tensor) for tensor in (*part.parameters(), *part.buffers())}
        names = [name for name, tensor in self._tensors().items() if id(tensor) in inside]
        self._exchange(names)
        try:
            yield
        finally:
            reshard(part)
            self._exchange(names)

    @torch.no_grad()
    def _exchange(self, names: list[str]) -> None:
        tensors = self._tensors()
        for name in names:
            values = local_part(tensors[name])
            now = values.clone()
            values.copy_(self._values[name])
            self._values[name] = now

    def state_dict(self) -> dict[str, Tensor]:
        """The whole values on the first rank's CPU; nothing on the others, who help to gather them."""
        gathered, tensors = {}, self._tensors()
        for name, value in self._values.items():
            tensor = whole(value, tensors[name])
            if rank() == 0:
                gathered[name] = tensor.cpu()
        return gathered

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take the values of :meth:`state_dict`, whole on every rank."""
        tensors = self._tensors()
        for name, value in self._values.items():
            value.copy_(part_of(state[name].to(value.device), tensors[name]))
