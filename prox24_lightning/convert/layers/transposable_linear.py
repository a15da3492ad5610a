"""Train a linear layer with a frozen transposable mask: two of its three products on sparse tensor cores.

A transposable mask (``geometry="block"``) is 2:4 along the inputs and along the outputs, so both the weight and its
transpose can be packed: the forward pass ``y = x W^T`` and the input gradient ``dx = dy W`` run sparse, the weight
gradient ``dy^T x`` stays dense (arXiv 2102.08124). The mask is frozen, so the metadata is packed once; the values
are gathered after each optimizer step, instead of the cast to 16 bits that autocast would make.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from prox24_lightning.convert.format.packed_weight import PackedWeight, pack_24
from prox24_lightning.convert.kernels.packed_buffer import MULTIPLE, to_buffer
from prox24_lightning.convert.kernels.registry import Kernel, prepare

DTYPES = (torch.float16, torch.bfloat16)
SMALLEST_WORK = 2**38
"""Tokens x inputs x outputs from which sparse products made a step faster on an H200 (benchmarks/masked_step.py)."""

_MOST_PRODUCTS = 64  # numbers of tokens that a layer keeps products for: each has plans of about 100 KB on the host

Shape = tuple[int, int]


class PackedPair:
    """A weight with a transposable mask and its transpose, both packed for the GPU, in a 16-bit dtype.

    Args:
        weight: (out_features, in_features), zero outside ``mask``; both sizes multiples of 64.
        mask: bool, two True in every four entries of every row and of every column.
        dtype: of the packed values.

    Raises:
        ValueError: if the mask is not transposable, or the sizes do not divide.
    """

    def __init__(self, weight: Tensor, mask: Tensor, dtype: torch.dtype) -> None:
        if problem := why_not(weight, mask):
            raise ValueError(problem)
        self.dtype = dtype
        self._gathered = (-1, 0)  # version and address of the weight whose values the buffers hold
        # Packed from the mask, not from the weight: a kept weight may be zero now.
        self.forward = _pack_mask(mask, dtype)
        self.backward = _pack_mask(mask.t(), dtype)
        self._rows, self._columns = (to_buffer(packed) for packed in (self.forward, self.backward))
        self.refresh(weight)

    def refresh(self, weight: Tensor) -> None:
        """Gather the values of ``weight``, unless it has not changed since the last call."""
        current = weight._version, weight.data_ptr()
        if current == self._gathered:
            return
        gather_values(weight.detach(), self.forward.indices, self._rows.view(self.dtype), transposed=False)
        gather_values(weight.detach(), self.backward.indices, self._columns.view(self.dtype), transposed=True)
        self._gathered = current

    @property
    def buffer(self) -> Tensor:
        """The packed weight, in the layout of :mod:`~prox24_lightning.convert.kernels.packed_buffer`."""
        return self._rows

    @property
    def transposed_buffer(self) -> Tensor:
        """The packed transpose."""
        return self._columns


def why_not(weight: Tensor, mask: Tensor) -> str | None:
    """Return why a layer cannot train with sparse products; None if it can."""
    if weight.dim() != 2 or any(size % MULTIPLE for size in weight.shape):
        return f"its shape {tuple(weight.shape)} is not (out, in) in multiples of {MULTIPLE}"
    if not weight.is_contiguous():
        return "its weight is not contiguous, row by row, in memory"
    for one, along in ((mask, "inputs"), (mask.t(), "outputs")):
        if not bool((one.reshape(-1, 4).sum(-1) == 2).all()):
            return f"its mask does not keep two of every four along the {along}: use geometry='block'"
    return None


def _pack_mask(mask: Tensor, dtype: torch.dtype) -> PackedWeight:
    return pack_24(mask.to(dtype).contiguous(), name="mask")


def gather_values(weight: Tensor, indices: Tensor, buffer: Tensor, *, transposed: bool) -> None:
    """Write the kept entries of ``weight``, or of its transpose, into the values of a packed buffer.

    Args:
        weight: (out_features, in_features), contiguous.
        indices: those of a :class:`~prox24_lightning.convert.format.packed_weight.PackedWeight`.
        buffer: values first, row by row, in its own dtype.
    """
    rows, eighths = indices.shape
    values = buffer.view(-1)[: rows * eighths * 4].view(rows, eighths * 4)
    if weight.is_cuda:
        from prox24_lightning.convert.kernels.gather.kernel import gather
    else:
        from prox24_lightning.convert.kernels.gather.reference import gather
    gather(weight, indices, values, transposed)


@dataclass(frozen=True)
class Products:
    """The two sparse products for one shape, number of tokens and dtype."""

    forward: Any
    input_gradient: Any

    @staticmethod
    def prepared(
        shape: Shape, tokens: int, dtype: torch.dtype, device: int, kernels: tuple[Kernel, Kernel]
    ) -> Products:
        transposed = shape[1], shape[0]
        return Products(
            prepare(kernels[0], dtype, shape, tokens, device), prepare(kernels[1], dtype, transposed, tokens, device)
        )


def _aligned(rows: Tensor) -> Tensor:
    """Return the rows contiguous and aligned to 16 bytes, as the kernels read them."""
    if rows.is_contiguous() and rows.data_ptr() % 16 == 0:
        return rows
    return rows.clone(memory_format=torch.contiguous_format)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None, pair: PackedPair, made: Products
    ) -> Tensor:
        pair.refresh(weight)
        ctx.save_for_backward(rows)
        ctx.pair, ctx.made = pair, made
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        return made.forward(rows, pair.buffer, None, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gradient = _aligned(gradients[0])
        (rows,) = ctx.saved_tensors
        of_rows = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            of_rows = ctx.made.input_gradient(gradient, ctx.pair.transposed_buffer, None, None)
        if ctx.needs_input_grad[1]:
            of_weight = (gradient.t() @ rows).to(ctx.dtypes[0])
        if ctx.needs_input_grad[2]:
            of_bias = gradient.sum(0).to(ctx.dtypes[1])
        return of_rows, of_weight, of_bias, None, None


class TransposableForward:
    """The ``forward`` of an ``nn.Linear`` that trains on sparse tensor cores where the input is on a GPU in 16 bits.

    Elsewhere (CPU, float32 without autocast) the layer multiplies densely. :meth:`attach` sets it on the layer,
    :meth:`remove` removes it; parameters, names and hooks stay.

    Args:
        linear: its weight is zero outside ``mask``.
        mask: frozen and transposable.
        kernels: for the forward pass and the input gradient.
        smallest_work: tokens x inputs x outputs below which a call is dense, because the launches would cost more than
            the sparse products save.

    Raises:
        ValueError: if the layer cannot train with sparse products (:func:`why_not`).
    """

    def __init__(
        self,
        linear: nn.Linear,
        mask: Tensor,
        kernels: tuple[Kernel, Kernel] | None = None,
        *,
        smallest_work: int = SMALLEST_WORK,
    ) -> None:
        if problem := why_not(linear.weight, mask):
            raise ValueError(problem)
        self.linear = linear
        self.mask = mask
        self.kernels = kernels or (Kernel("cusparselt"), Kernel("cusparselt"))
        self.smallest_work = smallest_work
        self._pair: PackedPair | None = None
        self._products: dict[int, Products] = {}

    def attach(self) -> None:
        # The object itself, not a bound method: a deep copy of the layer then gets a copy of its own.
        self.linear.forward = self  # type: ignore[method-assign]

    def remove(self) -> None:
        vars(self.linear).pop("forward", None)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_pair": None, "_products": {}}

    @torch.compiler.disable
    def __call__(self, input: Tensor) -> Tensor:
        linear, kind = self.linear, input.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else input.dtype
        work = input.numel() * linear.out_features
        if not input.is_cuda or autocast not in DTYPES or work < self.smallest_work:
            return F.linear(input, linear.weight, linear.bias)
        if self._pair is None or self._pair.dtype != autocast:
            self._pair, self._products = PackedPair(linear.weight, self.mask, autocast), {}
        rows = _aligned(input.to(autocast).reshape(-1, linear.in_features))
        shape = linear.out_features, linear.in_features
        if len(rows) not in self._products:
            if len(self._products) >= _MOST_PRODUCTS:
                self._products.clear()
            self._products[len(rows)] = Products.prepared(shape, len(rows), autocast, input.device.index, self.kernels)
        with torch.autocast(kind, enabled=False):
            out = _Product.apply(rows, linear.weight, linear.bias, self._pair, self._products[len(rows)])
        return out.view(*input.shape[:-1], linear.out_features)
