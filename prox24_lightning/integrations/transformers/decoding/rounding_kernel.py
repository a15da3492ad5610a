"""What stands before a product of 8 bits, each in one launch with Triton: its last step rounds the tokens.

A program takes one token. The rounding is that of the kernel that rounds alone, to the bit
(:mod:`prox24_lightning.convert.kernels.round_tokens`). As behind that one, the product starts early
(:mod:`.early_start`) and loads its weight meanwhile.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from prox24_lightning.convert.kernels.round_tokens.kernel import Rounding, form_macro
from prox24_lightning.integrations.transformers.decoding import early_start
from prox24_lightning.integrations.transformers.decoding.early_start import start_early
from prox24_lightning.weights.rounding import LARGEST, SMALLEST_SCALE

_SMALLEST = tl.constexpr(SMALLEST_SCALE)
_FP8_LARGEST, _INT8_LARGEST = tl.constexpr(LARGEST["fp8_e4m3"]), tl.constexpr(LARGEST["int8"])
_ROUNDER = tl.constexpr(12582912.0)  # 1.5 * 2**23: a smaller float32 added to it and taken off is rounded to an integer

_ENTRIES_A_WARP = 512


@triton.jit
def _round(token, entry, x, wanted, values, scales, COLUMNS: tl.constexpr, FORM: tl.constexpr):  # noqa: N803
    """Store a token ``x`` in 8 bits, FORM 1 in float8_e4m3 and 2 in int8; behind its end are zeros."""
    largest: tl.constexpr = _FP8_LARGEST if FORM == 1 else _INT8_LARGEST
    x = x.to(tl.float32)
    # As bits, NaN is the largest magnitude.
    most = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0).to(tl.float32, bitcast=True)
    scale = most * (1 / largest)
    scale = tl.where((wanted > 0) & (scale * 0 == 0), wanted, scale)
    scale = tl.where(scale < _SMALLEST, _SMALLEST, scale)
    x = x * tl.math.div_rn(1.0, scale)
    x = tl.where(x > largest, largest, tl.where(x < -largest, -largest, x))
    if FORM == 2:
        x = (tl.where(x == x, x, 0.0) + _ROUNDER) - _ROUNDER
    tl.store(values + token * COLUMNS + entry, x.to(values.dtype.element_ty), mask=entry < COLUMNS)
    tl.store(scales + token, scale)


@triton.jit
def _add_norm(
    residual,
    update,
    weight,
    total,
    normed,
    given,
    values,
    scales,
    epsilon,
    FEATURES: tl.constexpr,  # noqa: N803
    COLUMNS: tl.constexpr,  # noqa: N803
    WIDTH: tl.constexpr,  # noqa: N803
    ADD: tl.constexpr,  # noqa: N803
    FORM: tl.constexpr,  # noqa: N803
    EARLY: tl.constexpr,  # noqa: N803
):
    start_early(EARLY)
    token, entry = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    inside, place = entry < FEATURES, token * FEATURES + entry
    x = tl.load(residual + place, mask=inside, other=0.0)
    gain = tl.load(weight + entry, mask=inside, other=0.0)
    wanted = tl.load(given) if FORM else 0.0
    if ADD:
        x = (x.to(tl.float32) + tl.load(update + place, mask=inside, other=0.0).to(tl.float32)).to(x.dtype)
        tl.store(total + place, x, mask=inside)
    wide = x.to(tl.float32)
    mean = tl.sum(wide * wide, 0) / FEATURES
    unit = (wide * tl.rsqrt(mean + epsilon)).to(x.dtype)
    x = (gain.to(tl.float32) * unit.to(tl.float32)).to(x.dtype)
    tl.store(normed + place, x, mask=inside)
    if FORM:
        _round(token, entry, x, wanted, values, scales, COLUMNS, FORM)


@triton.jit
def _silu_multiply(
    both,
    given,
    values,
    scales,
    FEATURES: tl.constexpr,  # noqa: N803
    COLUMNS: tl.constexpr,  # noqa: N803
    WIDTH: tl.constexpr,  # noqa: N803
    FORM: tl.constexpr,  # noqa: N803
    EARLY: tl.constexpr,  # noqa: N803
):
    start_early(EARLY)
    token, entry = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    inside, place = entry < FEATURES, both + token * (2 * FEATURES) + entry
    gate = tl.load(place, mask=inside, other=0.0)
    up = tl.load(place + FEATURES, mask=inside, other=0.0)
    wanted = tl.load(given)
    wide = gate.to(tl.float32)
    active = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype)
    x = (active.to(tl.float32) * up.to(tl.float32)).to(gate.dtype)
    _round(token, entry, x, wanted, values, scales, COLUMNS, FORM)


def add_norm(
    residual: Tensor, update: Tensor | None, weight: Tensor, epsilon: float, rounding: Rounding | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As :func:`~prox24_lightning.integrations.transformers.decoding.rounded_inputs.add_norm`, on a GPU."""
    features = residual.shape[-1]
    tokens = residual.numel() // features
    total = residual if update is None else torch.empty_like(residual)
    normed = torch.empty_like(residual)
    rounded, parts, columns = _result(residual, tokens, features, rounding)
    with torch.cuda.device(residual.device):
        _add_norm[(tokens,)](
            residual,
            residual if update is None else update,
            weight,
            total,
            normed,
            *parts,
            epsilon,
            FEATURES=features,
            ADD=update is not None,
            **_settings(residual, columns, rounding),
        )
    return normed, total, rounded


def silu_multiply(both: Tensor, rounding: Rounding) -> Tensor:
    """As :func:`~prox24_lightning.integrations.transformers.decoding.rounded_inputs.silu_multiply`, on a GPU."""
    features = both.shape[-1] // 2
    tokens = both.numel() // (2 * features)
    rounded, parts, columns = _result(both, tokens, features, rounding)
    with torch.cuda.device(both.device):
        _silu_multiply[(tokens,)](both, *parts, FEATURES=features, **_settings(both, columns, rounding))
    assert rounded is not None
    return rounded


def _result(
    inputs: Tensor, tokens: int, features: int, rounding: Rounding | None
) -> tuple[Tensor | None, tuple[Tensor, Tensor, Tensor], int]:
    """Return the buffer of rounded tokens, the kernel's pointers for it, and values of a token in it."""
    if rounding is None:
        return None, (inputs, inputs, inputs), features
    rounded, values, scales = rounding.empty(tokens)
    return rounded, (rounding.given, values, scales), rounding.columns


def _settings(inputs: Tensor, columns: int, rounding: Rounding | None) -> dict[str, Any]:
    width = triton.next_power_of_2(columns)
    return {
        "COLUMNS": columns,
        "WIDTH": width,
        "FORM": form_macro(None if rounding is None else rounding.form),
        "num_warps": min(32, max(1, width // _ENTRIES_A_WARP)),
        **early_start.settings(inputs.device),
    }
