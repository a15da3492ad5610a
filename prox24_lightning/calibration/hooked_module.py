"""Record what training calls a module with, in its last batches."""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from prox24_lightning.calibration.dense_reference import DenseWeights
from prox24_lightning.calibration.isolation import isolated
from prox24_lightning.calibration.module_call import ModuleCall, device_of
from prox24_lightning.utils.distributed import gathered_objects, rank, world_size
from prox24_lightning.utils.module_copy import frozen_copy
from prox24_lightning.utils.tensors import map_tensors, tensors_in

_RANDOM = ("drop", "jitter", "noise")


class HookedModule:
    """A module that training calls, and the calls of the last batches.

    Tensors are copied when they are recorded. Only calls under enabled gradients count, so that neither validation nor
    our own reruns are recorded.

    Args:
        module: an outermost module that holds weights to prune.
        batches: how many batches are remembered.
        numbers: counts the calls of all hooked modules of a model.
    """

    def __init__(self, module: nn.Module, batches: int, numbers: Iterator[int] | None = None) -> None:
        self.module = module
        self._numbers = itertools.count() if numbers is None else numbers
        self.recording = False
        self.dense: nn.Module | DenseWeights | None = None
        self.called = False
        self._batches: deque[list[ModuleCall]] = deque(maxlen=batches)
        self._trained: set[nn.Module] = set()
        self._handle: RemovableHandle | None = None

    @property
    def calls(self) -> list[ModuleCall]:
        """The remembered calls, oldest first."""
        return [call for batch in self._batches for call in batch]

    def attach(self) -> None:
        # A compiled model that contains this module must not try to trace the recording.
        hook = torch.compiler.disable(self._record)
        self._handle = self.module.register_forward_pre_hook(hook, with_kwargs=True)

    def detach(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def next_batch(self, recording: bool) -> None:
        """A batch begins."""
        self.recording = recording
        if recording and (not self._batches or self._batches[-1]):
            self._batches.append([])

    def leave_out_unsound(self) -> int:
        """Forget the batches that hold NaN or infinity on any rank, unless all do; how many. All ranks call it."""
        flags = [all(map(_is_sound, batch)) for batch in self._batches]
        together = gathered_objects(flags)
        if len({len(flags) for flags in together}) > 1:
            return 0
        sound = [batch for batch, *flags in zip(self._batches, *together, strict=True) if all(flags)]
        left_out = len(self._batches) - len(sound)
        if not any(sound) or not left_out:
            return 0
        self._batches.clear()
        self._batches.extend(sound)
        return left_out

    def keep_dense(self, *, sharded: bool) -> nn.Module | DenseWeights:
        """Remember the module as it is now: in a frozen copy that :meth:`rerunning` leaves alone.

        Args:
            sharded: the module has sharded parameters and cannot be copied: remember their values alone.
        """
        self.dense = DenseWeights(self.module) if sharded else frozen_copy(self.module)
        return self.dense

    def reference_of(self) -> dict[nn.Module, nn.Module]:
        """Every module inside -> its counterpart in the dense copy, which is itself where only values are kept."""
        if self.dense is None:
            raise RuntimeError("no dense reference has been kept")
        if isinstance(self.dense, DenseWeights):
            return {module: module for module in self.module.modules()}
        # The copy has no wrappers of compiled modules.
        plain = [module for module in self.module.modules() if not hasattr(module, "_orig_mod")]
        counterparts = dict(zip(plain, self.dense.modules(), strict=True))
        return {module: counterparts[getattr(module, "_orig_mod", module)] for module in self.module.modules()}

    @contextmanager
    def rerunning(self) -> Iterator[None]:
        """As :func:`~prox24_lightning.calibration.isolation.isolated`; remembers what was in training mode."""
        self._trained = {module for module in self.module.modules() if module.training}
        with isolated(self.module):
            yield

    @contextmanager
    def as_trained(self, module: nn.Module) -> Iterator[None]:
        """Inside of :meth:`rerunning`, what training compiled of ``module``, inside of which nothing is listened to.

        It serves only in training mode, which is taken where something is compiled and it makes no difference; else
        evaluation mode stays, and the compiler works anew.
        """
        modules = list(module.modules())
        takes = any(map(_is_compiled, modules)) and not any(map(_trains_otherwise, modules))
        inner = self._trained.intersection(modules) if takes else ()
        for one in inner:
            one.training = True
        try:
            with torch.compiler.set_stance("default"):
                yield
        finally:
            for one in inner:
                one.training = False

    def _record(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if not torch.is_grad_enabled():
            return
        self.called = True
        if self.recording:
            self._batches[-1].append(ModuleCall.record(module, args, kwargs, next(self._numbers)).copied())

    def state_dict(self) -> dict[str, Any]:
        """Plain types and tensors; batches whose arguments are of other kinds are left out."""
        plain = [batch for batch in self._batches if all(call.plain for call in batch)]
        batches = [[call.state_dict() for call in batch] for batch in plain]
        return {"batches": map_tensors(lambda tensor: tensor.cpu(), batches), "called": self.called}

    def dense_state(self) -> dict[str, Tensor] | None:
        """The dense copy's values, whole, or None without one; all ranks call it."""
        return None if self.dense is None else dict(self.dense.state_dict())

    def load_dense(self, state: Mapping[str, Tensor] | None, *, sharded: bool) -> None:
        """Undo :meth:`dense_state`."""
        if state is not None:
            self.keep_dense(sharded=sharded).load_state_dict(state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        device = device_of(self.module)
        self._batches.clear()
        for batch in state["batches"]:
            self._batches.append([ModuleCall.from_state_dict(call, device) for call in batch])
        self.called = state["called"]


def _is_sound(call: ModuleCall) -> bool:
    """Masks that are added hold minus infinity."""
    tensors = [tensor for tensor in tensors_in((call.args, call.kwargs)) if tensor.is_floating_point()]
    return not any(bool((tensor.isnan() | (tensor == math.inf)).any()) for tensor in tensors)


def _is_compiled(module: nn.Module) -> bool:
    """Whether it may be: a forward of its own, in place of its class's, is what compilers leave."""
    compiled = hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
    return compiled or "forward" in vars(module)


def _trains_otherwise(module: nn.Module) -> bool:
    """Whether the module may work in another way in training mode: at random, say. Told by what it says of itself."""
    if isinstance(module, nn.modules.batchnorm._NormBase) or getattr(module, "gradient_checkpointing", False):
        return True
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    settings = {**getattr(getattr(module, "config", None), "__dict__", {}), **vars(module)}
    return any(
        isinstance(value, (int, float)) and value > 0 and any(word in name for word in _RANDOM)
        for name, value in settings.items()
    )


def share_of(saved: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """This rank's share of what the ranks had recorded, by as many of them as there were then.

    Of more than now each takes several; of fewer, several take the same, which leaves means as they are.
    """
    mine = list(saved[rank() :: world_size()]) or [saved[rank() % len(saved)]]
    together = zip(*(part["batches"] for part in mine), strict=False)
    batches = [[call for calls in batch for call in calls] for batch in together]
    return {"batches": batches, "called": all(part["called"] for part in mine)}
