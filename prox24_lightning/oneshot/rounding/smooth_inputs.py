"""Move outliers of layer inputs into weights before both are rounded to 8 bits, where that is free at run time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prox24_lightning.calibration.blocks import find_blocks
from prox24_lightning.calibration.free_orders.scales import proved_scales
from prox24_lightning.calibration.isolation.isolated import isolated
from prox24_lightning.calibration.smoothing import InputSample, smoothing_factors
from prox24_lightning.oneshot.block_inputs import BlockInputs, chain_of_blocks
from prox24_lightning.oneshot.progress import LayerProgress
from prox24_lightning.solvers.input_order.choose import holders
from prox24_lightning.utils.devices.cuda import exact_device
from prox24_lightning.utils.distributed import from_first
from prox24_lightning.weights.free_scale import FreeScale
from prox24_lightning.weights.layer_matrix import as_matrix
from prox24_lightning.weights.rounding import RoundedForm
from prox24_lightning.weights.sharded import is_sharded

logger = logging.getLogger(__name__)

SAMPLE_TOKENS = 512
"""Tokens of all calibration batches together on which factors are tried."""


@dataclass(frozen=True)
class SmoothedInputs:
    """What became of the input that some layers share.

    Attributes:
        names: of the layers that are rounded.
        exponent: ``a`` of SmoothQuant; None where factors gain nothing, or none are free.
        before, after: lost share of the squared norm of the outputs with weights and inputs rounded, each to its
            nearest value; None where no factors are free.
        reason: why none are free; "" where they are.
    """

    names: tuple[str, ...]
    exponent: float | None = None
    before: float | None = None
    after: float | None = None
    reason: str = ""


def smooth_inputs(
    model: nn.Module,
    batches: Iterable[Any],
    form: RoundedForm,
    layers: Mapping[str, nn.Module],
    *,
    device: str | torch.device | None = None,
    offload: str = "device",
    progress: bool = True,
) -> list[SmoothedInputs]:
    """Divide inputs of linear layers by factors, in place, so that rounding them and the weights loses less.

    The factors move into what computes the inputs: the weight of a norm, or the rows of the layer before. Which do is
    found and proved by equal outputs, block by block; nothing about an architecture is written down. Factors are powers
    of two, so that the model computes the same as before bit for bit, and zeros stay where they are.

    Args:
        model: any module with repeated blocks; its parameters change in place.
        batches: calibration batches, as of :func:`~prox24_lightning.oneshot.prune.prune_layerwise`. Read once.
        form: that the layers will be rounded to; fp8_e4m3 gains little, since its error is relative to each value.
        layers: those that will be rounded, by name.
        device: where blocks run; None is where the model is.
        offload: where hidden states wait: ``"device"``, ``"cpu"`` or a folder.
        progress: show a bar.

    Returns:
        one entry for each input, and one for each layer whose input has no free factors. Layers outside the blocks
        are in none.

    Raises:
        ValueError: if there are no batches, or they reach not every block.
    """
    home = next(model.parameters()).device
    names = {module: name for name, module in layers.items()}
    blocks = find_blocks(model, holding=names)
    smoother = _Smoother(names, form, holders(model))
    done: list[SmoothedInputs] = []
    with isolated(model), LayerProgress(len(blocks), enabled=progress) as bar:
        blocks, batches = chain_of_blocks(model, blocks, batches, home, None)
        work = exact_device(home if device is None else device)
        recorded = BlockInputs.recorded(model, blocks, batches, home=home, device=work, offload=offload)
        with recorded as inputs:
            for index in range(len(blocks)):
                bar.describe(f"scales of inputs in {blocks.names[index] or type(model).__name__}")
                with inputs.on_device(index) as block:
                    done += smoother.smooth(block, inputs.runs(index, block))
                    inputs.advance(index, block)
                bar.step(1, blocks.names[index])
    return done


class _Smoother:
    """Smooths one block after the other.

    Args:
        names: layer -> its name, of those that will be rounded.
        form: of these.
        shared: parameter -> in how many places of the model it is.
    """

    def __init__(self, names: Mapping[nn.Module, str], form: RoundedForm, shared: Mapping[Tensor, int]) -> None:
        self._names = names
        self._form: RoundedForm = form
        self._shared = shared
        self._known: tuple[nn.Module, list[FreeScale]] | None = None

    def smooth(self, block: nn.Module, runs: Sequence[Callable[[], Any]]) -> list[SmoothedInputs]:
        """Scale the inputs of a block's layers, on its calibration batches."""
        inside = [module for module in block.modules() if module in self._names]
        if not inside:
            return []
        try:
            scales, reasons = proved_scales(block, runs[0], inside, fixed=self._fixed, guesses=self._guesses(block))
        except Exception as error:  # of the user's forward
            scales, reasons = [], dict.fromkeys(inside, f"{type(error).__name__}: {error}")
        self._known = block, scales
        for layer, reason in reasons.items():
            logger.info("the inputs of %s are not smoothed: %s", self._names[layer], reason)
        samples = {scale: InputSample(scale.consumers[0], max(1, SAMPLE_TOKENS // len(runs))) for scale in scales}
        try:
            for run in runs if scales else ():
                run()
        finally:
            for sample in samples.values():
                sample.remove()
        done = [self._scale(scale, samples[scale]) for scale in scales]
        return done + [SmoothedInputs((self._names[layer],), reason=reason) for layer, reason in reasons.items()]

    def _guesses(self, block: nn.Module) -> list[FreeScale]:
        """Return the scales of the block before, in this one."""
        if self._known is None:
            return []
        try:
            return [scale.in_region(self._known[0], block) for scale in self._known[1]]
        except LookupError:
            return []

    def _fixed(self, tensor: Tensor) -> str | None:
        if is_sharded(tensor):
            return "the weights are sharded"
        return "a weight is shared" if self._shared.get(tensor, 1) > 1 else None

    def _scale(self, scale: FreeScale, sample: InputSample) -> SmoothedInputs:
        rounded = [layer for layer in scale.consumers if layer in self._names]
        labels = tuple(self._names[layer] for layer in rounded)
        if sample.largest is None or not sample.largest.isfinite().all():
            return SmoothedInputs(labels, reason="it is called with nothing, or with inputs that are not finite")
        weights = [as_matrix(layer).float() for layer in rounded]
        found = from_first(smoothing_factors(sample.tokens, sample.largest, weights, scale.columns, self._form))
        if found.exponent is not None:
            scale.scale(found.factors)
        return SmoothedInputs(labels, found.exponent, found.before, found.after)
