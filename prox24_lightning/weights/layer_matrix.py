"""Linear layers and convolutions as matrices: the weight as (out, in), the inputs as (tokens, in).

A convolution is a linear layer on unfolded patches. The columns are ordered (kernel position, channel), so that
groups of four consecutive columns lie along input channels at every kernel position, as sparse kernels need them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prox24_lightning.weights.experts import is_expert_parameter


def is_transposed_linear(module: nn.Module) -> bool:
    """Whether ``module`` is Hugging Face's ``Conv1D``: a linear layer that stores its weight as (in, out)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and hasattr(module, "weight")


def transposed_kind(module: nn.Module) -> type[nn.Module] | None:
    """Return the class of a module that :func:`is_transposed_linear`, None for others."""
    return type(module) if is_transposed_linear(module) else None


def why_not_solvable(module: nn.Module, parameter_name: str = "weight") -> str | None:
    """Return why the layer-wise solvers cannot take a module's weight, or None if they can."""
    if isinstance(module, (nn.Conv1d, nn.Conv2d)):
        if module.groups != 1:
            return "grouped convolution: its filters see different inputs"
        if isinstance(module.padding, str) or module.padding_mode != "zeros":
            return f"padding {module.padding!r} ({module.padding_mode}) is not supported by the layer-wise solver"
        return None
    if is_expert_parameter(module, module.get_parameter(parameter_name)):
        return None
    if parameter_name == "weight" and (isinstance(module, nn.Linear) or is_transposed_linear(module)):
        return None
    kinds = "Linear, Conv1d, Conv2d, transposed linear layers and experts"
    return f"{type(module).__name__}: the layer-wise solver takes {kinds}"


def as_matrix(module: nn.Module, weight: Tensor | None = None) -> Tensor:
    """Return the layer's weight, or a tensor of its shape, as (out_features, columns) in float32; float64 stays."""
    weight = (module.get_parameter("weight") if weight is None else weight).detach()
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    if is_transposed_linear(module):
        return weight.T
    if weight.dim() > 2:
        return weight.movedim(1, -1).flatten(1)
    return weight


def matrix_columns(module: nn.Module) -> int:
    """Return the number of columns of :func:`as_matrix`."""
    weight = module.get_parameter("weight")
    return weight.numel() // weight.shape[1 if is_transposed_linear(module) else 0]


def matrix_rows(module: nn.Module, weight: Tensor) -> int:
    """Return the number of rows of :func:`as_matrix`."""
    return weight.shape[1 if is_transposed_linear(module) else 0]


def from_matrix(module: nn.Module, matrix: Tensor) -> Tensor:
    """Undo :func:`as_matrix` for a weight or a mask: return a tensor of the shape of the layer's weight."""
    shape = module.get_parameter("weight").shape
    if is_transposed_linear(module):
        return matrix.T.contiguous()
    if len(shape) > 2:
        moved = matrix.unflatten(1, (*shape[2:], shape[1])).movedim(-1, 1)
        return moved.clone(memory_format=torch.contiguous_format)  # the usual strides, in 1 x 1 convolutions too
    return matrix


def input_rows(module: nn.Module, inputs: Tensor) -> Tensor:
    """Return the layer's inputs as (tokens, columns) in their own dtype; patches for a convolution."""
    if isinstance(module, (nn.Conv1d, nn.Conv2d)):
        spatial = len(module.kernel_size)
        inputs = inputs if inputs.dim() == spatial + 2 else inputs.unsqueeze(0)
        padding = tuple(int(side) for side in module.padding)
        kernel, dilation, stride = tuple(module.kernel_size), tuple(module.dilation), tuple(module.stride)
        if spatial == 1:
            # unfold takes images only: a sequence is an image of height one.
            inputs = inputs.unsqueeze(-2)
            kernel, dilation, padding, stride = (1, *kernel), (1, *dilation), (0, *padding), (1, *stride)
        patches = F.unfold(inputs, kernel, dilation, padding, stride)
        # unfold orders its rows (channel, position).
        return patches.unflatten(1, (inputs.shape[1], -1)).permute(0, 3, 2, 1).flatten(2).flatten(0, 1)
    return inputs.reshape(-1, inputs.shape[-1])
