"""Training that sees the rounding: the forward of 2:4 layers multiplies what their 8-bit form will multiply."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prox24_lightning.calibration.straight_through import round_inputs, round_matrix
from prox24_lightning.convert.eligibility import named_layers, why_not_linear
from prox24_lightning.sparsify.phases import check_step, resolve_step
from prox24_lightning.sparsify.zeros import weights_24
from prox24_lightning.utils.names import counted
from prox24_lightning.weights.layer_matrix import is_transposed_linear
from prox24_lightning.weights.rounding import RoundedForm
from prox24_lightning.weights.selection import GroupedWeight, select_weights
from prox24_lightning.weights.sharded import is_sharded, local_part

_PATIENCE = 8  # batches after which a layer that was not called is named
_CALLED = "_rounded_call"


class RoundedTraining:
    """Decide from which step on 2:4 layers train rounded, switch their forward, and switch it back.

    A layer's own weight, its name and its dtype do not change. Its forward rounds the weight as
    :func:`~prox24_lightning.convert.convert.convert_model` will, from the layer's 16-bit dtype (bfloat16 where it
    computes in more bits), and the inputs token by token as the kernels do. Gradients pass straight through.

    Args:
        form: of the weights.
        start: first rounded step, int, or float fraction of the run; never before the masks are frozen.
        inputs: round the inputs too.

    Attributes:
        start_step: ``start`` as a step of the present run.
        unrounded: weight name -> why its layer trains as before; known once rounding has begun.
        batches: how many have been trained on rounded.

    Raises:
        ValueError, TypeError: for a form or a start that cannot be.
    """

    def __init__(self, form: RoundedForm, start: int | float, *, inputs: bool) -> None:
        if form not in get_args(RoundedForm):
            raise ValueError(f"weights={form!r} is no form of 8 bits; use one of {', '.join(get_args(RoundedForm))}")
        check_step(start, "start")
        self.form = form
        self.inputs = inputs
        self.start = start
        self.start_step = 0
        self.unrounded: dict[str, str] = {}
        self._forwards = {transposed: _forward(form, inputs, transposed) for transposed in (False, True)}
        self._layers: dict[nn.Module, GroupedWeight] = {}
        self._seen: tuple[GroupedWeight, ...] | None = None
        self.batches = 0
        self._named = False

    @property
    def layers(self) -> int:
        """The number of layers that train rounded now."""
        return len(self._layers)

    def prepare(self, total_steps: int | float, *, exact: bool = True) -> None:
        """Lay ``start`` out over a run of so many steps; ``inf`` or negative if the length is not known.

        Raises:
            ValueError: if ``start`` lies beyond the run, or is a fraction of a run of unknown length.
        """
        self.start_step = resolve_step(self.start, "start", total_steps)
        if exact and math.isfinite(total_steps) and 0 <= total_steps <= self.start_step:
            raise ValueError(
                f"start={self.start!r} is step {self.start_step} of a run of {int(total_steps)}: no step would see the "
                f"rounding to {self.form}; lower it"
            )

    def update(self, model: nn.Module, weights: Sequence[GroupedWeight], step: int, *, frozen: bool) -> bool:
        """Begin if it is time, and follow weights that were exchanged; return whether rounding begins now.

        Args:
            model: holds the weights.
            weights: those that are 2:4.
            step: finished optimizer steps.
            frozen: whether their masks are final.
        """
        if not frozen or step < self.start_step or (self._seen is not None and _same(weights, self._seen)):
            return False
        begins, self._seen = self._seen is None, tuple(weights)
        parents = {id(child): parent for parent in model.modules() for child in parent.children()}
        uses = Counter(id(held) for _, module in named_layers(model) for held in module._parameters.values())
        for weight in weights:
            module = weight.module
            if module in self._layers:
                continue
            if reason := _why_not(weight, parents.get(id(module)), uses):
                self.unrounded[weight.name] = reason
                continue
            self._layers[module] = weight
            module.forward = MethodType(self._forwards[is_transposed_linear(module)], module)
        return begins

    def headline(self) -> str:
        """Return in words what has begun."""
        what = "weights and inputs" if self.inputs else "weights"
        return (
            f"{counted(self.layers, 'layer')} with {what} rounded to {self.form} from now on, in validation too; the "
            "weights that are saved are not rounded"
        )

    def exceptions(self) -> str | None:
        """Return which 2:4 weights train unrounded, and why; None if none does."""
        if not self.unrounded:
            return None
        name, reason = next(iter(self.unrounded.items()))
        left = len(self.unrounded)
        whole = left + self.layers
        return f"{left} of {whole} 2:4 weights train without rounding to {self.form}: {name} ({reason}){_more(left)}"

    def uncalled(self, *, last: bool = False) -> str | None:
        """Count a batch; after some, or the ``last``, return once which layers were not called as layers."""
        if self._seen is None:
            return None
        self.batches += not last
        if self._named or not self.batches or (self.batches < _PATIENCE and not last):
            return None
        self._named = True
        names = [weight.module_name for module, weight in self._layers.items() if _CALLED not in vars(module)]
        if not names:
            return None
        return (
            f"{names[0]}{_more(len(names))} trained without rounding to {self.form}: the forward was not called "
            "(the weight is used in another way), or tensor parallelism cuts the weight"
        )

    def unused(self, step: int) -> str | None:
        """Return at the end of a run, after ``step`` steps, that no batch was rounded; None if one was."""
        if self.batches:
            return None
        return (
            f"the run ended at step {step} before the rounding to {self.form} began (start={self.start!r}, and all "
            "masks frozen): no step has seen it; start and freeze earlier"
        )

    @torch.no_grad()
    def errors(self) -> dict[str, float]:
        """Return the relative change of each weight by rounding, and of all together as "".

        Of a sharded weight this rank's rows count.
        """
        names, sums = [], []
        for module, weight in self._layers.items():
            part = local_part(weight.parameter)
            matrix = (part.t() if is_transposed_linear(module) else part).float()
            names.append(weight.name)
            rounded = round_matrix(matrix, self.form, torch.float32, _sixteen(part.dtype))
            sums.append(torch.stack([(rounded - matrix).square().sum(), matrix.square().sum()]))
        if not sums:
            return {}
        found = torch.stack([torch.stack(sums).sum(0), *sums]).double()
        relative = (found[:, 0] / found[:, 1].clamp_min(1e-300)).sqrt().tolist()
        return dict(zip(["", *names], relative, strict=True))

    def summary(self) -> str | None:
        """Return in words how far rounding the weights changes them; None if nothing trains rounded."""
        errors = self.errors()
        if not errors:
            return None
        whole = errors.pop("")
        most = max(errors, key=lambda name: errors[name])
        return (
            f"{counted(self.layers, 'layer')} trained for {self.form}, which changes their weights by {whole:.2%} "
            f"(norm of the change over norm of the weights), most of all {most} by {errors[most]:.2%}"
        )

    def remove(self) -> None:
        """Give every layer its own forward back."""
        for module in self._layers:
            vars(module).pop("forward", None)
            vars(module).pop(_CALLED, None)
        self._layers.clear()
        self.unrounded.clear()
        self._seen, self._named, self.batches = None, False, 0


def sparse_weights(model: nn.Module) -> tuple[GroupedWeight, ...]:
    """Return the weights of a model that are 2:4 already. All ranks call it.

    Raises:
        ValueError: if there is none.
    """
    found = tuple(weights_24(select_weights(model).chosen))
    if not found:
        raise ValueError("no weight of the model is 2:4, and no Prox24 makes it so: add one, or load a 2:4 model")
    return found


def _forward(form: RoundedForm, rounds_inputs: bool, transposed: bool) -> Callable[..., Tensor]:
    """Return the forward of all layers of a kind: one function, so that compiled blocks still share their code."""

    def multiply(layer: Any, inputs: Tensor) -> Tensor:
        weight = layer.weight
        if is_sharded(weight):  # by tensor parallelism; FSDP2 has gathered it
            return type(layer).forward(layer, inputs)
        setattr(layer, _CALLED, True)
        kind = inputs.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else inputs.dtype
        matrix = weight.t() if transposed else weight
        rounded = round_matrix(matrix, form, dtype, _sixteen(dtype))
        if rounds_inputs:
            inputs = round_inputs(inputs, form, dtype, _sixteen(dtype))
        return F.linear(inputs, rounded, layer.bias)

    # Named as the methods in whose place they stand: a pickled layer gets that of its class.
    def forward(self: Any, input: Tensor) -> Tensor:
        return multiply(self, input)

    def forward_transposed(self: Any, x: Tensor) -> Tensor:
        return multiply(self, x)

    forward_transposed.__name__ = "forward"
    return forward_transposed if transposed else forward


def _sixteen(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that a packed layer has where training computes in ``dtype``."""
    return dtype if dtype.itemsize == 2 else torch.bfloat16


def _why_not(weight: GroupedWeight, parent: nn.Module | None, uses: Counter[int]) -> str | None:
    """Return why a layer cannot train rounded; None if it can."""
    if (reason := why_not_linear(weight.module, parent)) is not None:
        return reason
    if weight.parameter_name != "weight" or weight.geometry == "column":
        return "its groups do not lie along the inputs: it is not multiplied packed"
    if uses[id(weight.module._parameters["weight"])] > 1:
        return "tied: other layers share its weight"
    return None


def _same(one: Sequence[GroupedWeight], other: Sequence[GroupedWeight]) -> bool:
    return len(one) == len(other) and all(a is b for a, b in zip(one, other, strict=True))


def _more(names: int) -> str:
    return f" and {names - 1} more" if names > 1 else ""
