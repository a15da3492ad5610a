"""The channels of a layer's inputs and outputs, and the tensors that move with them."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from prox24_lightning.weights.free_order import MovedTensor
from prox24_lightning.weights.layer_matrix import is_transposed_linear

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CHANNELS_SECOND = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.PReLU)


def mixes_channels(module: nn.Module) -> bool:
    """Whether each output of ``module`` depends on many inputs, so that outputs and inputs have orders of their own."""
    if isinstance(module, _CONVOLUTIONS):
        return module.groups < module.in_channels or module.groups == 1
    return isinstance(module, nn.Linear) or is_transposed_linear(module)


def takes_any_order(module: nn.Module) -> bool:
    """Whether the inputs of ``module`` may come in any order once its columns move."""
    return mixes_channels(module) and getattr(module, "groups", 1) == 1 and "weight" in module._parameters


def channel_dim(module: nn.Module, tensor: Tensor) -> int:
    """Return the dimension of an input or output of ``module`` along which its channels lie."""
    if isinstance(module, _CONVOLUTIONS):
        return tensor.dim() - 1 - len(module.kernel_size)
    return min(1, tensor.dim() - 1) if isinstance(module, _CHANNELS_SECOND) else tensor.dim() - 1


def input_channels(module: nn.Module) -> int:
    """Return the number of inputs of a layer for which :func:`takes_any_order` holds."""
    weight = module.get_parameter("weight")
    return weight.shape[0 if is_transposed_linear(module) else 1]


def moved_columns(consumer: nn.Module, columns: Tensor) -> MovedTensor:
    """Return the columns of a layer whose inputs move."""
    return MovedTensor(consumer, "weight", 0 if is_transposed_linear(consumer) else 1, columns)


def moved_rows(producer: nn.Module, places: Tensor) -> Iterator[MovedTensor]:
    """Yield the tensors of a module whose outputs move, at ``places`` (units, 1) of its outputs.

    Raises:
        ValueError: if a tensor has no entry for each output.
    """
    tensors = {**producer._parameters, **producer._buffers}
    if mixes_channels(producer) and "weight" not in producer._parameters:
        raise ValueError(f"the weight of {type(producer).__name__} is computed from other parameters")
    for name, tensor in tensors.items():
        if tensor is None or (tensor.numel() == 1 and not mixes_channels(producer)):
            continue
        dim = 1 if is_transposed_linear(producer) and name == "weight" else 0
        if tensor.dim() == 0 or tensor.shape[dim] <= int(places.max()):
            raise ValueError(f"{type(producer).__name__}.{name} of shape {tuple(tensor.shape)} has no entry an output")
        yield MovedTensor(producer, name, dim, places)
