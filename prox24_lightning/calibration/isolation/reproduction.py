"""Whether a module can be called again later: tried at once, against what training has just computed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from prox24_lightning.calibration.calls.eager_code import inside_compiled
from prox24_lightning.calibration.calls.module_call import ModuleCall, device_of, no_cache
from prox24_lightning.calibration.calls.random_state import RandomState
from prox24_lightning.calibration.isolation.isolated import has_hooks, isolated, set_modes, trains_otherwise
from prox24_lightning.calibration.isolation.module_state import ModuleState
from prox24_lightning.utils.tensors import tensors_in

_TOLERANCES = {torch.bfloat16: 0.05, torch.float16: 0.02}
_TOLERANCE = 2e-3
_TOLERANCE_ON_CUDA = 0.02  # float32 may be multiplied in TF32
"""Relative to the norm of an output: compiled code and other kernels round differently; 30 blocks in bfloat16, compiled
in training and not in the rerun, lie 0.012 apart."""
_SAMPLE = 2**20
"""So many entries of an output are compared."""


@dataclass(frozen=True)
class RerunSettings:
    """How a module is called again.

    Attributes:
        gradients: its forward differentiates, and needs them.
        hooks: the forward hooks of others take part in what it computes.
        random: it draws random numbers even where dropout is off.
    """

    gradients: bool = False
    hooks: bool = True
    random: bool = True


class NotReproducedError(RuntimeError):
    """A module does not compute the same again; the message says why, after "its forward"."""


class Trial:
    """The state around one call of training, which :meth:`settings` makes again.

    Args:
        module: that is about to be called.
        before_batch: its state when the batch began.
    """

    def __init__(self, module: nn.Module, call: ModuleCall, before_batch: ModuleState) -> None:
        self._module = module
        # Weights that are cast here without gradients must not be found by calls of the training.
        self._call = replace(call, autocast_cache=False)
        self._state = ModuleState(module)
        self._written = {name: parameter._version for name, parameter in module.named_parameters()}
        self._set = before_batch.changed_attributes(self._state)

    def settings(self, output: Any) -> RerunSettings:
        """Return with which settings the call gives ``output`` again; it has just been made.

        Raises:
            NotReproducedError: if it does with none.
        """
        module = self._module
        if self._set:
            raise NotReproducedError(f"uses what the training step sets ({', '.join(self._set[:3])})")
        written = [name for name, one in module.named_parameters() if one._version != self._written.get(name)]
        if written:
            raise NotReproducedError(f"writes to parameters ({', '.join(written[:3])})")
        after = ModuleState(module, values=False)
        hooks = (False, True) if has_hooks(module) else (False,)
        problem = ""
        for gradients, with_hooks in product((False, True), hooks):
            settings = RerunSettings(gradients, with_hooks)
            try:
                draws = self._try(settings, output, after)
            except NotReproducedError as error:
                problem = str(error)
            except torch.OutOfMemoryError:  # a rerun after the step, when activations are gone, may still fit
                return RerunSettings()
            except Exception as error:  # of the user's forward: it must not end the run
                first = str(error).splitlines()[0] if str(error) else ""
                problem = f"fails when it is called again ({type(error).__name__}: {first[:160]})"
            else:
                return RerunSettings(gradients, with_hooks, draws)
        raise NotReproducedError(problem)

    def _try(self, settings: RerunSettings, output: Any, after: ModuleState) -> bool:
        """Make the call again; whether it draws random numbers without dropout."""
        module, device = self._module, device_of(self._module)
        tolerance = rounding_tolerance(module, self._call)
        with isolated(module, as_trained=True, gradients=settings.gradients, hooks=settings.hooks):
            # With dropout as in training, from the same random state: the same must come out.
            self._state.install(again=True)
            check_same(output, self._call(module), tolerance, self._draws_elsewhere())
            # With what the call, and the training step, have left behind: a later rerun finds the module so.
            self._state.install(again=True)
            after.install_attributes()
            if not self._draws_elsewhere():
                check_same(
                    *(output, self._call(module), tolerance, False),
                    "depends on what earlier calls leave in the module",
                )
            # As reruns are: without dropout.
            set_modes(module, as_trained=True)
            self._call(module)
            drawn = RandomState.now(device)
        start = self._call.random
        return start is None or not start.same_as(drawn)

    def _draws_elsewhere(self) -> bool:
        """Whether compiled code draws random numbers from generators of its own."""
        compiled = hasattr(self._module, "_orig_mod") or inside_compiled(self._module)
        return bool(compiled) and any(map(trains_otherwise, self._module.modules()))


def rounding_tolerance(module: nn.Module, call: ModuleCall) -> float:
    """Return how far two outputs of one call may lie apart by rounding, relative to their norm.

    The coarsest dtype in which the call computes decides: that of autocast or of the weights, whatever the output's.
    """
    dtypes = {call.autocast, *(parameter.dtype for parameter in module.parameters())}
    least = _TOLERANCE_ON_CUDA if device_of(module).type == "cuda" else _TOLERANCE
    return max((_TOLERANCES.get(dtype, least) for dtype in dtypes if dtype is not None), default=least)


def check_same(
    expected: Any,
    found: Any,
    tolerance: float,
    loosely: bool = False,
    problem: str = "does not compute the same again",
) -> None:
    """Compare two outputs of a module: up to rounding, or ``loosely`` in shapes and dtypes alone.

    Args:
        expected: of the first call.
        found: of the second.
        tolerance: the largest difference, relative to the norm; see :func:`rounding_tolerance`.
        loosely: compare shapes and dtypes alone.
        problem: text of the error.

    Raises:
        NotReproducedError: with ``problem`` and the difference.
    """
    before, again = _outputs(expected), _outputs(found)
    if len(before) != len(again):
        before, again = before[:1], again[:1]
    for one, other in zip(before, again, strict=True):
        if one.shape != other.shape or one.dtype != other.dtype:
            raise NotReproducedError(
                f"{problem}: {tuple(other.shape)} {other.dtype} for {tuple(one.shape)} {one.dtype}"
            )
        if loosely or not one.numel():
            continue
        if (difference := _difference(one, other)) > max(tolerance, _TOLERANCES.get(one.dtype, 0.0)):
            raise NotReproducedError(f"{problem}: relative difference {difference:.2g}")


def _difference(one: Tensor, other: Tensor) -> float:
    """The norm of the difference, relative to that of ``one``; NaN where that is not finite."""
    one, other = (_sample(tensor.detach()) for tensor in (one, other))
    norm = torch.linalg.vector_norm
    return float(norm(one - other) / norm(one).clamp_min(torch.finfo(one.dtype).tiny))


def _sample(tensor: Tensor) -> Tensor:
    dense = tensor if tensor.layout is torch.strided else tensor.to_dense()
    sample = dense.reshape(-1)[:: max(1, dense.numel() // _SAMPLE)]
    return sample if sample.dtype == torch.float64 else sample.float()


def _outputs(output: Any) -> list[Tensor]:
    """The tensors of an output, key-value caches left aside."""
    if isinstance(output, dict):
        output = {key: no_cache(value) for key, value in output.items()}
    elif isinstance(output, (tuple, list)):
        output = [no_cache(value) for value in output]
    return tensors_in(output)
