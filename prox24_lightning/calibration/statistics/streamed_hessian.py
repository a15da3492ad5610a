"""The Hessian of a layer's inputs, summed up from the training batches themselves: nothing is run twice."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from prox24_lightning.calibration.calls.hooks import before_call, in_backward
from prox24_lightning.calibration.expert_inputs import expert_inputs
from prox24_lightning.calibration.input_groups import layer_input
from prox24_lightning.calibration.statistics.expert_hessians import ExpertHessians
from prox24_lightning.calibration.statistics.hessian import HessianAccumulator
from prox24_lightning.weights.layer_matrix import input_rows
from prox24_lightning.weights.selection import GroupedWeight
from prox24_lightning.weights.sharded import gathered


class StreamedHessian:
    """Sums up the Hessian of what one layer is called with in training batches.

    Only calls under enabled gradients count; a call in the backward pass counts where the forward pass made none with
    gradients (reentrant activation checkpointing). Inputs that are not finite are left out: a gradient scaler skips
    the step of such a batch. Memory: float32 ``(in_features, in_features)``.

    Experts are called once more by themselves, to see what each multiplies
    (:func:`~prox24_lightning.calibration.expert_inputs.expert_inputs`).

    Args:
        weight: of a linear layer or convolution, or of experts.

    Attributes:
        accumulator: what has been summed up, of this rank; of experts for each of them.
        problem: why the inputs cannot be counted; None where they can.
    """

    def __init__(self, weight: GroupedWeight) -> None:
        self.accumulator: HessianAccumulator | ExpertHessians = HessianAccumulator()
        if weight.is_experts:
            self.accumulator = ExpertHessians(range(len(weight.parameter)))
        self.problem: str | None = None
        self._weight = weight
        self._forward_calls = 0
        self._handle: RemovableHandle | None = None

    def begin_batch(self) -> None:
        """Count what the layer is called with from now on."""
        self._forward_calls = 0
        if self._handle is None:
            self._handle = before_call(self._weight.module, self._add)

    def end_batch(self) -> None:
        """Stop counting."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _add(self, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        backward = in_backward()
        if not torch.is_grad_enabled() or (backward and self._forward_calls):
            return
        self._forward_calls += not backward
        try:
            with torch.no_grad():
                if isinstance(self.accumulator, ExpertHessians):
                    inputs = expert_inputs(layer, args, kwargs).get(self._weight.parameter_name, {})
                    if all(bool(rows.isfinite().all()) for rows in inputs.values()):
                        self.accumulator.add(inputs)
                    return
                rows = input_rows(layer, gathered(layer_input(args, kwargs)))
                if bool(rows.isfinite().all()):
                    self.accumulator.add(rows)
        except Exception as error:  # an input of another kind: it must not end the run
            self.problem = f"{type(error).__name__}: {error}"
