"""Several linear layers of one input as one layer: the rows of the one are those of the others, one after another."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from prox24_lightning.convert.autotune.tune import stored_table
from prox24_lightning.convert.kernels.buffers import from_buffer, to_buffer
from prox24_lightning.convert.kernels.rounded_buffer import from_dense_buffer, input_scale
from prox24_lightning.convert.layers.dense_fp8_linear import FORM, DenseFp8Linear
from prox24_lightning.convert.layers.semi_structured_linear import SemiStructuredLinear
from prox24_lightning.weights.rounding import RoundedRows

KINDS = (nn.Linear, SemiStructuredLinear, DenseFp8Linear)
"""The classes of layers that are joined, and no class that is derived from them."""

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_MEMORY = 0.25  # of the free memory of a GPU that a copy may take


def why_not_joined(layers: Sequence[nn.Module], uses: Mapping[int, int]) -> str | None:
    """Return why layers that read one input do not run as one; None if they can.

    Args:
        layers: linear layers.
        uses: id of a parameter or buffer -> how many modules hold it.
    """
    first: Any = layers[0]
    if any(type(layer) is not type(first) for layer in layers) or type(first) not in KINDS:
        return f"they are {', '.join(dict.fromkeys(type(layer).__name__ for layer in layers))}"
    if any(map(has_hooks, layers)):
        return "one has a hook or a forward of its own"
    tensors = [tensor for layer in layers for tensor in tensors_of(layer)]
    if any(uses[id(tensor)] > 1 for tensor in tensors):
        return "one shares its weight with another layer"
    for tensor in tensors:
        if type(tensor.data) is not Tensor or tensor.is_inference() or not tensor.is_contiguous():
            return "a weight is no ordinary contiguous tensor"
    if len({(layer.bias is None, *((t.dtype, t.device) for t in tensors_of(layer))) for layer in layers}) > 1:
        return "their weights or biases are of several kinds"
    if isinstance(first, SemiStructuredLinear):
        return _why_not_packed([layer for layer in layers if isinstance(layer, SemiStructuredLinear)])
    if any(not (_follow(parts) or all(map(_owns_memory, parts))) for parts in _rows(layers)):
        return "a weight is part of a larger tensor"
    return None


def has_hooks(module: nn.Module) -> bool:
    """Return whether a module has hooks, or a forward of its own instead of its class's."""
    return any(getattr(module, hooks) for hooks in _HOOKS) or "forward" in vars(module)


def _why_not_packed(layers: Sequence[SemiStructuredLinear]) -> str | None:
    if any(layer.dense is not None for layer in layers):
        return "one keeps its dense weight"
    if len({(layer.dtype, layer.form) for layer in layers}) > 1:
        return "their weights have several forms"
    if layers[0].form is not None and len({input_scale(layer.packed) for layer in layers}) > 1:
        return "their inputs have several fixed scales"
    device = layers[0].packed.device
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        if sum(layer.packed.nbytes for layer in layers) > _MEMORY * (torch.cuda.mem_get_info(device)[0] + kept):
            return "a copy of their packed weights would take too much of the memory that is left"
    return None


def join(layers: Sequence[Any]) -> nn.Module:
    """Return a layer whose output is that of ``layers``, for which :func:`why_not_joined` knows nothing, in a row.

    Parameters of dense layers become views of its parameters; packed weights are copied.

    Raises:
        RuntimeError: if a GPU has no memory left for a copy.
        ValueError: if no kernel runs for the joined shape.
    """
    shape = sum(layer.out_features for layer in layers), layers[0].in_features
    with_bias = layers[0].bias is not None
    if type(layers[0]) is nn.Linear:
        with torch.device("meta"):
            whole = nn.Linear(shape[1], shape[0], bias=with_bias)
        for name, parts in zip(("weight", "bias"), _rows(layers), strict=False):
            setattr(whole, name, nn.Parameter(_rows_of_one(parts), requires_grad=False))
        return whole
    bias = torch.cat([layer.bias.detach() for layer in layers]) if with_bias else None
    if isinstance(layers[0], DenseFp8Linear):
        return _join_dense_fp8(layers, shape, bias)
    return _join_packed(layers, shape, bias)


def separate(layers: Iterable[nn.Module]) -> None:
    """Give the parameters of dense layers memory of their own again."""
    for layer in layers:
        for parameter in layer.parameters() if type(layer) is nn.Linear else ():
            if not _owns_memory(parameter):
                parameter.data = parameter.data.clone()


def _rows(layers: Sequence[Any]) -> list[list[nn.Parameter]]:
    """The weights of dense layers and, if they have them, their biases."""
    names = ("weight",) if layers[0].bias is None else ("weight", "bias")
    return [[getattr(layer, name) for layer in layers] for name in names]


def _rows_of_one(parts: Sequence[nn.Parameter]) -> Tensor:
    """Return one tensor that holds the rows of all parts, each of which is a view of it afterwards."""
    if _follow(parts):
        size = sum(len(part) for part in parts), *parts[0].shape[1:]
        return parts[0].detach().as_strided(size, parts[0].stride())
    joined = torch.cat([part.detach() for part in parts])
    for part, (start, end) in zip(parts, pairwise(accumulate(map(len, parts), initial=0)), strict=True):
        part.data = joined[start:end]
    return joined


def _follow(parts: Sequence[Tensor]) -> bool:
    """Whether each part begins in memory where the one before it ends, as parts that were joined before do."""
    if len({part.untyped_storage().data_ptr() for part in parts}) > 1:
        return False
    return all(one.storage_offset() + one.numel() == other.storage_offset() for one, other in pairwise(parts))


def _owns_memory(part: Tensor) -> bool:
    return part.untyped_storage().nbytes() == part.nbytes


def _join_packed(layers: Sequence[SemiStructuredLinear], shape: tuple[int, int], bias: Tensor | None) -> nn.Module:
    first = layers[0]
    parts = [from_buffer(layer.packed, layer._shape, layer.dtype, layer.form) for layer in layers]
    scales = [part.scales for part in parts if part.scales is not None]
    packed = replace(
        parts[0],
        values=_in_a_row([part.values for part in parts]),
        indices=torch.cat([part.indices for part in parts]),
        shape=shape,
        scales=torch.cat(scales) if scales else None,
    )
    kernels = _kernels(layers, shape)
    return SemiStructuredLinear(to_buffer(packed), shape, first.dtype, bias, kernels, form=first.form).eval()


def _join_dense_fp8(layers: Sequence[DenseFp8Linear], shape: tuple[int, int], bias: Tensor | None) -> nn.Module:
    parts = [from_dense_buffer(layer.packed, layer._shape, FORM) for layer in layers]
    rows = RoundedRows(_in_a_row([part.values for part in parts]), torch.cat([part.scales for part in parts]))
    kernels, fixed = _kernels(layers, shape), input_scale(layers[0].packed)
    return DenseFp8Linear(rows, layers[0].dtype, bias, kernels, input_scale=fixed).eval()


def _in_a_row(values: Sequence[Tensor]) -> Tensor:
    # As bytes: not every version of torch joins float8.
    return torch.cat([part.view(torch.uint8) for part in values]).view(values[0].dtype)


def _kernels(layers: Sequence[SemiStructuredLinear], shape: tuple[int, int]) -> str:
    """Return which kernels multiply: those of the joined shape on a GPU, where no measurement is made."""
    first = layers[0]
    if not first.packed.is_cuda:
        return max(layers, key=lambda layer: layer.out_features).kernels
    table = stored_table(shape, first.dtype, device=first.packed.device.index, form=first.form)
    return table.dense_fp8_text if isinstance(first, DenseFp8Linear) else table.text


def tensors_of(layer: nn.Module) -> list[Tensor]:
    """The layer's parameters and buffers, in the order of their names."""
    held = {**layer._parameters, **layer._buffers}
    return [tensor for _, tensor in sorted(held.items()) if tensor is not None]
