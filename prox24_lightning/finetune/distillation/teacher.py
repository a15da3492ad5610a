"""The teacher: the checksum of its weights, its memory, and the keyword arguments it is called with."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from prox24_lightning.utils.checksum import checksum
from prox24_lightning.weights.names import clean_name


def weights_checksum(module: nn.Module) -> str:
    """Return the SHA-256 of every tensor in ``module.state_dict()``: name, dtype, shape and bytes.

    Names are those without ``torch.compile``. One tensor at a time is copied to the CPU.
    """
    tensors = {name: value for name, value in module.state_dict().items() if isinstance(value, Tensor)}
    return checksum(part for name, value in tensors.items() for part in (f"{clean_name(name)} ", value))


def memory_bytes(module: nn.Module) -> int:
    """Return the bytes of parameters and buffers; tied ones count once."""
    return sum(tensor.numel() * tensor.element_size() for tensor in (*module.parameters(), *module.buffers()))


def teacher_kwargs(teacher: nn.Module, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``kwargs`` without ``labels``, from which a model would compute a loss that nobody reads.

    Nor with ``num_items_in_batch``, by which transformers' models divide it. A ``forward`` that requires ``labels``
    keeps them.
    """
    labels = inspect.signature(teacher.forward).parameters.get("labels")
    needed = labels is not None and labels.default is inspect.Parameter.empty
    left_out = ("num_items_in_batch",) if needed else ("labels", "num_items_in_batch")
    return {key: value for key, value in kwargs.items() if key not in left_out}


@torch.no_grad()
def same_weights(module: nn.Module, other: nn.Module) -> bool:
    """Return whether the parameters of both are equal bit for bit, in order."""
    pairs = zip(module.parameters(), other.parameters(), strict=False)
    return all(a.shape == b.shape and torch.equal(a, b.to(a)) for a, b in pairs)
