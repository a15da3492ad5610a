"""The product with a packed weight as one operator, opaque to ``torch.compile``.

In eager mode the layer calls :func:`multiply` directly: torch's dispatcher costs more than the launch.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, library

from prox24_lightning.convert.kernels.product import Product
from prox24_lightning.convert.kernels.registry import kernel_for, missing_inputs, prepare, takes_any_shape
from prox24_lightning.weights.rounding import RoundedForm

_BYTES_16 = 16
_PREPARED = 4096  # products kept at most, one a shape and number of tokens; a plan takes about 100 KB on the host

_library = library.Library("prox24", "FRAGMENT")
_library.define(
    "packed_linear(Tensor input, Tensor buffer, Tensor? dense, Tensor? bias, ScalarType dtype, SymInt out_features, "
    "SymInt in_features, str kernels, str? form=None) -> Tensor"
)


def multiply(
    input: Tensor,
    buffer: Tensor,
    dense: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
    out_features: int,
    in_features: int,
    kernels: str,
    form: RoundedForm | None = None,
) -> Tensor:
    """Return ``input @ weight.t() + bias`` for ``(..., in_features)`` input of any strides on a GPU.

    Args:
        input: in ``dtype``.
        buffer: see :mod:`~prox24_lightning.convert.kernels.packed_buffer`, and with ``form``
            :mod:`~prox24_lightning.convert.kernels.rounded_buffer`.
        dense: int16 (out_features, in_features), the weight's bits, if it is kept.
        bias: (out_features,) in any floating dtype.
        dtype: float16 or bfloat16.
        kernels: see :mod:`~prox24_lightning.convert.kernels.registry`.
        form: of a weight of 8 bits, whose inputs the kernels round; None for one in ``dtype``.
    """
    tokens = input.numel() // in_features
    if tokens == 0:
        return input.new_empty(*input.shape[:-1], out_features)
    device = buffer.get_device()
    product, missing, any_shape = _prepared(kernels, dtype, out_features, in_features, tokens, device, form)
    as_given = any_shape or input.dim() == 2
    rows = input if as_given else input.reshape(tokens, in_features)
    if missing:
        rows = F.pad(rows, (0, missing))
    elif not rows.is_contiguous() or rows.data_ptr() % _BYTES_16:
        rows = rows.clone(memory_format=torch.contiguous_format)
    if device == torch._C._cuda_getDevice():
        out = product(rows, buffer, dense, bias)
    else:
        with torch.cuda.device(device):
            out = product(rows, buffer, dense, bias)
    return out if as_given else out.view(*input.shape[:-1], out_features)


def multiply_rounded(
    rounded: Tensor,
    tokens: int,
    buffer: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    shape: tuple[int, int],
    kernels: str,
    form: RoundedForm,
) -> Tensor:
    """Return (tokens, out_features) as :func:`multiply` of tokens that are rounded already.

    Args:
        rounded: what a :data:`~prox24_lightning.convert.kernels.round_tokens.kernel.RoundTokens` returns.
        tokens: how many.
        buffer, bias, dtype, kernels, form: see :func:`multiply`.
        shape: (out_features, in_features).
    """
    device = buffer.device.index
    product, *_ = _prepared(kernels, dtype, *shape, tokens, device, form)
    with torch.cuda.device(device):
        return product(rounded, buffer, None, bias)


@lru_cache(maxsize=_PREPARED)
def _prepared(
    kernels: str,
    dtype: torch.dtype,
    out_features: int,
    in_features: int,
    tokens: int,
    device: int,
    form: RoundedForm | None = None,
) -> tuple[Product, int, bool]:
    """Return the prepared product, by how many zeros it wants each row padded, and whether it takes any shape."""
    kernel, shape = kernel_for(kernels, tokens), (out_features, in_features)
    product = prepare(kernel, dtype, shape, tokens, device, form)
    return product, missing_inputs(kernel, shape, form), takes_any_shape(kernel, form)


@library.register_fake("prox24::packed_linear", lib=_library)
def _shape_only(
    input: Tensor,
    buffer: Tensor,
    dense: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
    out_features: int,
    in_features: int,
    kernels: str,
    form: RoundedForm | None = None,
) -> Tensor:
    return input.new_empty(*input.shape[:-1], out_features)


_library.impl("packed_linear", multiply, "CUDA")

packed_linear = torch.ops.prox24.packed_linear
