"""Factors that divide a layer's inputs, and multiply its weight's columns, so that 8 bits lose least of its output.

SmoothQuant (arXiv 2211.10438) divides channel ``j`` by ``max|x_j|^a / max|w_j|^(1 - a)``: channels with outliers
shrink, and the scale of a token no longer leaves the others a few values of int8. Here every ``a`` of a list is tried
on a sample of the layer's own tokens, and factors are powers of two, which change no output before something is
rounded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prox24_lightning.calibration.input_groups import layer_input
from prox24_lightning.calibration.rounded_inputs import rounded_like_tokens
from prox24_lightning.weights.rounding import RoundedForm, round_weight

EXPONENTS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Tried values of ``a``."""

_SMALLEST = 1e-6
"""Relative to the largest channel: channels below count as that large."""


@dataclass(frozen=True, eq=False)
class Smoothing:
    """The factors of a layer's inputs.

    Attributes:
        factors: (units,), on the CPU, powers of two; all 1 where nothing is gained.
        exponent: ``a`` of SmoothQuant; None where nothing is gained.
        before, after: lost share of the squared norm of the outputs, both rounded: without and with the factors.
    """

    factors: Tensor
    exponent: float | None
    before: float
    after: float


class InputSample:
    """Some tokens of what a layer is called with, and the largest magnitude of each input over all tokens.

    Args:
        layer: whose calls are watched from now on, until :meth:`remove`.
        tokens: to keep of each call, at equal distances; the first one, where outliers are most common, is among them.

    Attributes:
        largest: (in_features,), float32; None before the first call.
    """

    def __init__(self, layer: nn.Module, tokens: int) -> None:
        self._tokens = tokens
        self._parts: list[Tensor] = []
        self.largest: Tensor | None = None
        self._handle = layer.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        inputs = layer_input(args, kwargs).detach()
        rows = inputs.reshape(-1, inputs.shape[-1])
        if not len(rows):
            return
        most = rows.abs().amax(0).float()
        self.largest = most if self.largest is None else torch.maximum(self.largest, most)
        self._parts.append(rows[:: max(1, len(rows) // self._tokens)][: self._tokens].float())

    @property
    def tokens(self) -> Tensor:
        """The kept tokens, float32 (tokens, in_features)."""
        return torch.cat(self._parts)

    def remove(self) -> None:
        """Watch no longer."""
        self._handle.remove()


def smoothing_factors(
    inputs: Tensor, largest: Tensor, weights: Sequence[Tensor], columns: Tensor, form: RoundedForm
) -> Smoothing:
    """Return the factors among those of :data:`EXPONENTS`, and none at all, with which rounding loses least.

    Args:
        inputs: float32 (tokens, in_features), what the layers are called with.
        largest: float32 (in_features,), the largest magnitude of each input.
        weights: of the layers that are rounded, float32 (out_features, in_features).
        columns: (units, copies), the inputs that have a factor in common.
        form: of weights and inputs.
    """
    places = columns.to(inputs.device)
    most = _floored(largest[places].amax(1))
    column = _floored(torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)[places].amax(1))
    targets = [inputs @ weight.T for weight in weights]
    squares = [target.square().sum().clamp_min(1e-30) for target in targets]

    def loss(factors: Tensor) -> float:
        each = torch.ones_like(largest)
        each[places] = factors.unsqueeze(1)
        rounded = rounded_like_tokens(inputs / each, form)
        errors = [
            (rounded @ round_weight(weight * each, form).T - target).square().sum()
            for weight, target in zip(weights, targets, strict=True)
        ]
        return float((torch.stack(errors) / torch.stack(squares)).mean())

    none = torch.ones_like(most)
    before = loss(none)
    best = Smoothing(none.cpu(), None, before, before)
    for exponent in EXPONENTS:
        octaves = exponent * most.log2() - (1 - exponent) * column.log2()
        factors = (octaves - octaves.median()).round().exp2()
        after = loss(factors)
        if after < best.after:
            best = Smoothing(factors.cpu(), exponent, before, after)
    return best


def _floored(magnitudes: Tensor) -> Tensor:
    return magnitudes.clamp_min(max(_SMALLEST * float(magnitudes.max()), torch.finfo(torch.float32).tiny))
