"""Record what training calls a module with, in its last batches."""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from prox24_lightning.calibration.calls.hooks import after_call, before_call, in_backward, remove_all
from prox24_lightning.calibration.calls.module_call import ModuleCall, device_of
from prox24_lightning.calibration.dense_reference import DenseWeights
from prox24_lightning.calibration.isolation.isolated import isolated
from prox24_lightning.calibration.isolation.module_state import ModuleState
from prox24_lightning.calibration.isolation.reproduction import (
    NotReproducedError,
    RerunSettings,
    Trial,
    check_same,
    rounding_tolerance,
)
from prox24_lightning.utils.distributed import gathered_objects, rank, world_size
from prox24_lightning.utils.module_copy import frozen_copy
from prox24_lightning.utils.tensors import tensors_in


class HookedModule:
    """A module that training calls, and the calls of the last batches.

    Only calls under enabled gradients count, made between the begin of a training batch (:meth:`begin_batch`) and its
    end. A call in the backward pass counts where the forward pass made none with gradients: reentrant activation
    checkpointing; it is numbered by the forward pass. Arguments are copied when the call is made.

    Args:
        module: an outermost module that holds weights to prune.
        batches: how many batches are remembered.
        numbers: counts the calls of all hooked modules of a model.
        compiled: the module's calls are part of compiled code, so that its hooks must stay.

    Attributes:
        called: whether training has called the module.
        settings: how the module is called again; None before that is known.
        problem: why it cannot be called again; None where it can, or that is not known yet.
        reference: the dense reference, if one is kept.
    """

    def __init__(
        self, module: nn.Module, batches: int, numbers: Iterator[int] | None = None, *, compiled: bool = False
    ) -> None:
        self.module = module
        self.called = False
        self.settings: RerunSettings | None = None
        self.problem: str | None = None
        self.reference: nn.Module | DenseWeights | None = None
        self._numbers = itertools.count() if numbers is None else numbers
        self._compiled = compiled
        self._batches: deque[list[ModuleCall | dict[str, Any]]] = deque(maxlen=batches)
        self._templates: dict[str, ModuleCall] = {}
        self._open = self._recording = self._trying = False
        self._heard: int | None = None
        self._forward_calls = 0
        self._before: ModuleState | None = None
        self._trial: tuple[Trial, int] | None = None
        self._depth = 0
        self._handles: list[RemovableHandle] = []

    @property
    def calls(self) -> list[ModuleCall]:
        """The remembered calls, oldest first."""
        calls = [call for batch in self._decoded() for call in batch]
        if self.settings is not None and not self.settings.random:
            calls = [replace(call, random=None) for call in calls]
        return calls

    @property
    def listens(self) -> bool:
        """Whether the module's calls are heard at present."""
        return bool(self._handles)

    def attach(self) -> None:
        """Register the hooks that compiled code has to find when it is compiled."""
        if self._compiled:
            self._listen()

    def detach(self) -> None:
        """Remove every hook."""
        self._open = False
        remove_all(self._handles)
        self._handles.clear()
        self._trial, self._before = None, None

    def begin_batch(self, *, record: bool, trial: bool = False) -> None:
        """A training batch begins.

        Args:
            record: remember its calls.
            trial: make the first of its calls again at once, which sets :attr:`settings` or :attr:`problem`.
        """
        self._open, self._recording, self._trying = True, record, trial
        self._heard, self._forward_calls, self._depth, self._trial = None, 0, 0, None
        self._before = ModuleState(self.module, values=False) if trial else None
        if record and (not self._batches or self._batches[-1]):
            self._batches.append([])
        if record or trial or not self.called:
            self._listen()

    def end_batch(self) -> None:
        """The training batch has ended: what is called now is none of training."""
        self._open = False
        self._trial, self._before = None, None
        if not self._compiled:
            self.detach()

    def leave_out_unsound(self) -> int:
        """Forget the batches that hold NaN or infinity on any rank, unless all do; how many. All ranks call it."""
        batches = self._decoded()
        flags = [all(map(_is_sound, batch)) for batch in batches]
        together = gathered_objects(flags)
        if len({len(flags) for flags in together}) > 1:
            return 0
        sound = [batch for batch, *flags in zip(batches, *together, strict=True) if all(flags)]
        left_out = len(batches) - len(sound)
        if not any(sound) or not left_out:
            return 0
        self._batches.clear()
        self._batches.extend(list(batch) for batch in sound)
        return left_out

    def keep_reference(self, *, sharded: bool) -> nn.Module | DenseWeights:
        """Keep the module as it is now: in a frozen copy, which training does not change.

        Args:
            sharded: the module has sharded parameters and cannot be copied: keep their values alone.

        Raises:
            Exception: whatever copying the user's module raises.
        """
        if sharded:
            self.reference = DenseWeights(self.module)
        else:
            self.reference = frozen_copy(self.module)
            for parameter in self.reference.parameters() if self.settings and self.settings.gradients else ():
                parameter.requires_grad_(parameter.is_floating_point())
        return self.reference

    def counterparts(self) -> dict[nn.Module, nn.Module]:
        """Return every module inside -> the same in the dense reference: itself where only values are kept."""
        if self.reference is None:
            raise RuntimeError("no dense reference has been kept")
        if isinstance(self.reference, DenseWeights):
            return {module: module for module in self.module.modules()}
        # The copy has no wrappers of compiled modules.
        plain = [module for module in self.module.modules() if not hasattr(module, "_orig_mod")]
        found = dict(zip(plain, self.reference.modules(), strict=True))
        return {module: found[getattr(module, "_orig_mod", module)] for module in self.module.modules()}

    @contextmanager
    def rerunning(self) -> Iterator[None]:
        """Let the module be called again without effects on the training, as :attr:`settings` say."""
        settings = self.settings or RerunSettings()
        with ExitStack() as stack:
            if isinstance(self.reference, nn.Module):
                for module, counterpart in self.counterparts().items():
                    counterpart.training = module.training
                stack.enter_context(isolated(self.reference, as_trained=True, gradients=settings.gradients))
            stack.enter_context(
                isolated(self.module, as_trained=True, gradients=settings.gradients, hooks=settings.hooks)
            )
            yield

    def check_reference(self) -> None:
        """Check that the dense reference, just made, computes what the module does.

        Raises:
            NotReproducedError: if it does not.
            Exception: whatever the user's forward raises.
        """
        if not isinstance(self.reference, nn.Module) or not (calls := self.calls):
            return
        with self.rerunning():
            tolerance = rounding_tolerance(self.module, calls[0])
            check_same(calls[0](self.module), calls[0](self.reference), tolerance)

    def _listen(self) -> None:
        if not self._handles:
            self._handles = [before_call(self.module, self._begins, first=True), after_call(self.module, self._ended)]

    def _begins(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if not self._open:
            return
        self._depth += 1
        backward = in_backward()
        if not backward and self._heard is None:
            self._heard = next(self._numbers)
        if not torch.is_grad_enabled() or (backward and self._forward_calls):
            return
        self._forward_calls += not backward
        self.called = True
        wanted = self._trying and self._trial is None and self._before is not None
        if not self._recording and not wanted:
            return
        random = self.settings is None or self.settings.random
        try:
            number = next(self._numbers) if self._heard is None else self._heard
            call = ModuleCall.record(module, args, kwargs, number, random=random).copied()
        except Exception as error:  # an argument that cannot be copied
            self._fail(f"cannot be called again ({error})")
            return
        self._templates.setdefault(call.form, call)
        if self._recording:
            self._batches[-1].append(call)
        if wanted and self._before is not None:
            self._trying = False
            self._trial = Trial(module, call, self._before), self._depth

    def _ended(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        if not self._open:
            return
        trial, depth = self._trial or (None, 0)
        if trial is not None and depth == self._depth:
            self._trial = None
            try:
                self.settings = trial.settings(output)
            except NotReproducedError as error:
                self._fail(str(error))
            except Exception as error:
                self._fail(f"cannot be called again ({type(error).__name__}: {error})")
        self._depth -= 1

    def _fail(self, problem: str) -> None:
        self.problem = self.problem or f"the forward of {type(self.module).__name__} {problem}"
        self._trying = False

    def _decoded(self) -> list[list[ModuleCall]]:
        """The remembered batches; calls that were read from a checkpoint and whose form no call has are left out."""
        device = device_of(self.module)
        for batch in self._batches:
            for index, call in enumerate(batch):
                if isinstance(call, dict):
                    known = ModuleCall.from_state_dict(call, device, self._templates.get(call.get("form", "")))
                    batch[index] = call if known is None else known
        return [[call for call in batch if isinstance(call, ModuleCall)] for batch in self._batches]

    def state_dict(self) -> dict[str, Any]:
        """Return plain types and tensors."""
        batches = [[call if isinstance(call, dict) else call.state_dict() for call in batch] for batch in self._batches]
        settings = self.settings
        return {
            "batches": batches,
            "called": self.called,
            "settings": None if settings is None else [settings.gradients, settings.hooks, settings.random],
        }

    def reference_state(self) -> dict[str, Tensor] | None:
        """Return the values of the dense reference, whole, or None without one; all ranks call it."""
        return None if self.reference is None else dict(self.reference.state_dict())

    def load_reference(self, state: Mapping[str, Tensor] | None, *, sharded: bool) -> None:
        """Undo :meth:`reference_state`."""
        if state is not None:
            self.keep_reference(sharded=sharded).load_state_dict(state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undo :meth:`state_dict`."""
        self._batches.clear()
        self._batches.extend(list(batch) for batch in state["batches"])
        self.called = state["called"]
        self.settings = None if state["settings"] is None else RerunSettings(*state["settings"])
        self._decoded()


def share_of(saved: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return this rank's share of what the ranks had recorded, by as many of them as there were then.

    Of more than now each takes several; of fewer, several take the same, which leaves means as they are.
    """
    mine = list(saved[rank() :: world_size()]) or [saved[rank() % len(saved)]]
    together = zip(*(part["batches"] for part in mine), strict=False)
    batches = [[call for calls in batch for call in calls] for batch in together]
    return {
        "batches": batches,
        "called": all(part["called"] for part in mine),
        "settings": next((part["settings"] for part in mine if part["settings"]), None),
    }


def _is_sound(call: ModuleCall) -> bool:
    """Masks that are added hold minus infinity."""
    tensors = [_values(tensor) for tensor in tensors_in((call.args, call.kwargs)) if tensor.is_floating_point()]
    return not any(bool((tensor.isnan() | (tensor == math.inf)).any()) for tensor in tensors)


def _values(tensor: Tensor) -> Tensor:
    if tensor.layout is torch.strided:
        return tensor
    return tensor.coalesce().values() if tensor.layout is torch.sparse_coo else tensor.values()
