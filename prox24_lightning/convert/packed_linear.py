"""A linear layer that holds a packed 2:4 weight and multiplies on sparse tensor cores.

Weights are packed by ``torch.sparse.SparseSemiStructuredTensor*``, but that tensor subclass is not kept: as a
parameter it breaks ``Module.to``, ``state_dict`` and ``copy.deepcopy``. The layer holds the packed bits as an
integer buffer, which every one of these can move, and calls torch's operator on it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prox24_lightning.convert.eligibility import Backend

_ROW_MULTIPLE = 8  # tokens are padded to this multiple: both libraries ask for it in 16-bit types
_EXPAND_COLUMNS = 4096  # input features expanded at a time, which bounds the scratch memory of the dense weight


class SemiStructuredLinear(nn.Module):
    """A linear layer whose 2:4 weight is stored as half its values plus two bits an entry kept. Forward only.

    :func:`~prox24_lightning.convert.semi_structured.convert_linear` makes them. ``packed`` (and ``meta`` for CUTLASS)
    are int16 buffers in the library's own layout, so they stay what they are under ``.to(dtype)``, ``state_dict()``
    and ``deepcopy``.
    """

    packed: Tensor
    meta: Tensor | None

    def __init__(
        self, packed: Tensor, meta: Tensor | None, bias: Tensor | None, shape: Sequence[int], backend: Backend
    ):
        super().__init__()
        self.out_features, self.in_features = shape
        self.dtype = packed.dtype
        self.backend: Backend = backend
        self.register_buffer("packed", packed.view(torch.int16))
        self.register_buffer("meta", meta)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @property
    def weight(self) -> Tensor:
        """The dense (out_features, in_features) weight, expanded anew at every access: right, but slow."""
        columns = range(0, self.in_features, _EXPAND_COLUMNS)
        return torch.cat([self._columns(start) for start in columns], dim=1)

    @property
    def stored_bytes(self) -> int:
        """Bytes of the packed weight, bias not counted."""
        return sum(part.numel() * part.element_size() for part in (self.packed, self.meta) if part is not None)

    def forward(self, input: Tensor) -> Tensor:
        """``(..., in_features)`` to ``(..., out_features)``.

        Raises:
            RuntimeError: on the CPU, for a dtype other than the weight's (outside autocast), and when a gradient
                would be needed.
        """
        if torch.is_grad_enabled() and input.requires_grad:
            raise RuntimeError(
                "a converted 2:4 layer has no backward: run it under torch.no_grad() or torch.inference_mode(), or "
                "train the dense model (prox24_lightning.convert.expand_model brings it back)"
            )
        if not (input.is_cuda and self.packed.is_cuda):
            raise RuntimeError(
                f"a converted 2:4 layer runs on CUDA only; input is on {input.device}, weight on {self.packed.device}"
            )
        if input.dtype != self.dtype:
            if not torch.is_autocast_enabled(input.device.type):
                raise RuntimeError(f"input is {input.dtype}, the packed weight {self.dtype}: cast the input")
            input = input.to(self.dtype)
        rows = input.reshape(-1, self.in_features)
        bias = None if self.bias is None else self.bias.to(self.dtype)
        return self._multiply(rows, bias).reshape(*input.shape[:-1], self.out_features)

    def _multiply(self, rows: Tensor, bias: Tensor | None) -> Tensor:
        tokens = rows.shape[0]
        if tokens == 0:
            return rows.new_empty(0, self.out_features)
        padding = _padded(tokens) - tokens
        # The kernel reads rows.t() as "transposed, row-major", which is only true of contiguous rows.
        rows = F.pad(rows, (0, 0, 0, padding)) if padding else rows.contiguous()
        if self.backend == "cusparselt":
            # The library's default algorithm. Its own search (`_cslt_sparse_mm_search`) is left alone: on a Hopper GPU
            # it ended in an illegal instruction for a small float16 layer, which takes the whole process's CUDA down.
            result = torch._cslt_sparse_mm(self.packed.view(self.dtype), rows.t(), bias=bias, transpose_result=True)
        else:
            weight = torch.sparse.SparseSemiStructuredTensorCUTLASS(
                torch.Size((self.out_features, self.in_features)),
                packed=self.packed.view(self.dtype),
                meta=self.meta,
                packed_t=None,
                meta_t=None,
                compressed_swizzled_bitmask=None,
            )
            result = F.linear(rows, weight, bias).contiguous()
        return result[:tokens]

    @torch.no_grad()
    def _columns(self, start: int) -> Tensor:
        """The product with unit vectors is a column of the weight exactly: one term is the weight, the rest zeros."""
        width = min(_EXPAND_COLUMNS, self.in_features - start)
        rows = torch.zeros(width, self.in_features, dtype=self.dtype, device=self.packed.device)
        rows.diagonal(start).fill_(1)
        return self._multiply(rows, None).t()

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"dtype={self.dtype}, backend={self.backend}"
        )


def _padded(tokens: int) -> int:
    return max(1, -(-tokens // _ROW_MULTIPLE)) * _ROW_MULTIPLE
