"""Linear layers and convolutions as matrices: the weight as (out, in), the inputs as (tokens, in).

A convolution is a linear layer on unfolded patches. The columns are ordered (kernel position, channel), so that
groups of four consecutive columns lie along input channels at every kernel position, as sparse kernels need them.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from prox24_lightning.utils.distributed import gathered_objects, world_size
from prox24_lightning.weights.selection import is_transposed_linear


def why_not_solvable(module: nn.Module, parameter_name: str = "weight") -> str | None:
    """Why the layer-wise solver cannot take a module's weight, or None if it can."""
    if isinstance(module, (nn.Conv1d, nn.Conv2d)):
        if module.groups != 1:
            return "grouped convolution: its filters see different inputs"
        if isinstance(module.padding, str) or module.padding_mode != "zeros":
            return f"padding {module.padding!r} ({module.padding_mode}) is not supported by the layer-wise solver"
        return None
    if parameter_name == "weight" and (isinstance(module, nn.Linear) or is_transposed_linear(module)):
        return None
    return f"{type(module).__name__}: the layer-wise solver takes Linear, Conv1d, Conv2d and transposed linear layers"


def as_matrix(module: nn.Module, weight: Tensor | None = None) -> Tensor:
    """The layer's weight, or a tensor of its shape, as float32 (out_features, columns)."""
    weight = (module.get_parameter("weight") if weight is None else weight).detach().float()
    if is_transposed_linear(module):
        return weight.T
    if weight.dim() > 2:
        return weight.movedim(1, -1).flatten(1)
    return weight


def matrix_columns(module: nn.Module) -> int:
    """Number of columns of :func:`as_matrix`."""
    weight = module.get_parameter("weight")
    return weight.numel() // weight.shape[1 if is_transposed_linear(module) else 0]


def matrix_rows(module: nn.Module, weight: Tensor) -> int:
    """Number of rows of :func:`as_matrix`."""
    return weight.shape[1 if is_transposed_linear(module) else 0]


def from_matrix(module: nn.Module, matrix: Tensor) -> Tensor:
    """Undo :func:`as_matrix` for a weight or a mask: a tensor of the shape of the layer's weight."""
    shape = module.get_parameter("weight").shape
    if is_transposed_linear(module):
        return matrix.T.contiguous()
    if len(shape) > 2:
        return matrix.unflatten(1, (*shape[2:], shape[1])).movedim(-1, 1).contiguous()
    return matrix


def input_rows(module: nn.Module, inputs: Tensor) -> Tensor:
    """The layer's inputs as (tokens, columns) in their own dtype; patches for a convolution."""
    if isinstance(module, (nn.Conv1d, nn.Conv2d)):
        spatial = len(module.kernel_size)
        inputs = inputs if inputs.dim() == spatial + 2 else inputs.unsqueeze(0)
        padding = tuple(int(side) for side in module.padding)
        kernel, dilation, stride = tuple(module.kernel_size), tuple(module.dilation), tuple(module.stride)
        if spatial == 1:
            # unfold knows images only: a sequence is an image of height one.
            inputs = inputs.unsqueeze(-2)
            kernel, dilation, padding, stride = (1, *kernel), (1, *dilation), (0, *padding), (1, *stride)
        patches = F.unfold(inputs, kernel, dilation, padding, stride)
        # unfold orders its rows (channel, position).
        return patches.unflatten(1, (inputs.shape[1], -1)).permute(0, 3, 2, 1).flatten(2).flatten(0, 1)
    return inputs.reshape(-1, inputs.shape[-1])


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total += left^T right`` in float32. Tensor cores multiply 16-bit entries exactly, and add up in float32."""
    if left.is_cuda and left.dtype == right.dtype and left.dtype in (torch.bfloat16, torch.float16):
        total.add_(torch.mm(left.T, right, out_dtype=torch.float32))
    else:
        total.addmm_(left.float().T, right.float())


class SecondMoments:
    """Running ``H = X^T X / tokens`` of a layer's inputs, and optionally ``C = X_dense^T X / tokens``, in float32.

    ``X`` is what the layer sees now, with everything before it pruned; ``X_dense`` what it saw in the dense model.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self._sum: Tensor | None = None
        self._cross: Tensor | None = None

    @torch.no_grad()
    def add(self, rows: Tensor, dense_rows: Tensor | None = None) -> None:
        """Count a batch: both (tokens, in_features), any floating dtype."""
        if self._sum is None:
            self._sum = torch.zeros(rows.shape[1], rows.shape[1], device=rows.device)
        _add_product(self._sum, rows, rows)
        self.tokens += rows.shape[0]
        if dense_rows is not None:
            if self._cross is None:
                self._cross = torch.zeros_like(self._sum)
            _add_product(self._cross, dense_rows, rows)

    @property
    def moments(self) -> Tensor:
        """``H``, (in_features, in_features)."""
        if self._sum is None:
            raise RuntimeError("no input has been counted")
        return self._sum / max(1, self.tokens)

    @property
    def cross(self) -> Tensor | None:
        """``C``, or None if no dense inputs were given."""
        return None if self._cross is None else self._cross / max(1, self.tokens)

    def all_reduce(self, columns: int, device: torch.device) -> None:
        """Add up the sums of all ranks of the process group, if there is one; a rank that counted nothing adds zeros.

        Args:
            columns: number of the layer's inputs.
            device: where a rank that has counted nothing puts its zeros.
        """
        if world_size() == 1:
            return
        counted = gathered_objects((self.tokens, self._cross is not None))
        self.tokens = sum(tokens for tokens, _ in counted)
        if self._sum is None:
            self._sum = torch.zeros(columns, columns, device=device)
        dist.all_reduce(self._sum)
        # What one rank could not compare with the dense model none of them does.
        if not any(cross for _, cross in counted) or not all(cross for tokens, cross in counted if tokens):
            self._cross = None
            return
        if self._cross is None:
            self._cross = torch.zeros_like(self._sum)
        dist.all_reduce(self._cross)
