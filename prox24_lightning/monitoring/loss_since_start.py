"""How the loss of a model on batches that are new to it has changed since training began."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from prox24_lightning.calibration.calls.hooks import after_call, before_call, in_backward, remove_all
from prox24_lightning.calibration.calls.module_call import ModuleCall, device_of
from prox24_lightning.calibration.calls.random_state import RandomState
from prox24_lightning.calibration.isolation.module_state import kept
from prox24_lightning.calibration.recognised_loss import LossOf, own_loss, possible_losses, recognised
from prox24_lightning.finetune import memory_bytes
from prox24_lightning.utils.devices.cpu_memory import available_memory
from prox24_lightning.utils.distributed import world_size
from prox24_lightning.utils.module_copy import frozen_copy
from prox24_lightning.weights.sharded import is_sharded

_ROOM_ON_CPU, _ROOM_ON_GPU = 8, 2
"""A copy is made, and goes to the GPU, if so many times its bytes are free there."""


class LossSinceStart:
    """The loss of a module on a batch before it is trained on, and that of the module as it was on the same batch.

    The loss is the one that training minimises, where
    :mod:`~prox24_lightning.calibration.recognised_loss` recognises it. A batch that was trained on would not do: it is
    remembered for tens of steps. A copy of the module waits on the CPU until a batch is compared, and then stays on the
    module's device until :meth:`offload` or :meth:`close`.

    Args:
        module: what training calls, and not from compiled code, which hooks would have compiled anew.
        root: what holds the module, or the module itself: its state is as before after a comparison.
        shared: objects that the module may hold and that are not to be copied (a trainer, say).

    Raises:
        ValueError: if its parameters have no values yet, there are several ranks, for which its forward may wait, or
            there is no room for the copy.
        Exception: whatever copying the user's module raises.
    """

    def __init__(self, module: nn.Module, root: nn.Module, *, shared: Sequence[object] = ()) -> None:
        if any(map(is_sharded, module.parameters())):
            raise ValueError("the parameters are sharded over ranks")
        if world_size() > 1:
            raise ValueError("the forward may wait for other ranks")
        if memory_bytes(module) * _ROOM_ON_CPU > available_memory():
            raise ValueError("there is no room for a copy of the module")
        self._module, self._root = module, root
        self._start = frozen_copy(module, device=torch.device("cpu"), shared=shared)
        self._handles: list[RemovableHandle] = []
        self._call: ModuleCall | None = None
        self._targets: list[Tensor] = []
        self._losses: list[tuple[LossOf, Tensor]] = []
        self._own_is_minimised = False

    def listen(self, batch: Any = None) -> None:
        """Record the next call with gradients: a training batch begins, in which targets may be."""
        self._forget()
        self._targets = list(_tensors(batch))
        if not self._handles:
            self._handles = [before_call(self._module, self._begins, first=True), after_call(self._module, self._ended)]

    def compare(self, minimised: Tensor | None = None) -> tuple[float, float]:
        """Return the loss of the recorded batch and that of the module as it was on it; call it after the batch.

        Args:
            minimised: the loss that training minimises on that batch; None takes what the module returns as ``loss``,
                if the backward pass has come to it.

        Raises:
            ValueError: if no call was recorded, the loss is not recognised, or the device has no room for the copy.
            Exception: whatever the user's forward raises.
        """
        self._stop_listening()
        call, losses, is_own = self._call, self._losses, self._own_is_minimised
        self._forget()
        found = recognised(losses, minimised)
        if call is None or found is None or (minimised is None and not is_own):
            raise ValueError("the loss that training minimises cannot be computed from what the module returns")
        loss_of, now = found
        device = device_of(self._module)
        if device_of(self._start) != device:
            self._move(device)
        for module, copy in zip(_plain(self._module), self._start.modules(), strict=True):
            copy.training = module.training
        before = RandomState.now(device)
        try:
            with torch.no_grad(), kept(self._root):  # what the copy may share with it: a closure, an argument
                start = loss_of(call(self._start))
        finally:
            before.restore(device)
        return float(now), float(start)

    def offload(self) -> None:
        """Move the copy to the CPU until the next comparison."""
        self._start.cpu()

    def close(self) -> None:
        """Remove the hooks, and give the memory of the copy back."""
        self._stop_listening()
        self._forget()
        self._start = nn.Module()

    def _move(self, device: torch.device) -> None:
        if device.type == "cuda":
            unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
            if torch.cuda.mem_get_info(device)[0] + unused < _ROOM_ON_GPU * memory_bytes(self._start):
                raise ValueError("the GPU has no room for a copy of the module")
        self._start.to(device)

    def _forget(self) -> None:
        self._call, self._targets, self._losses, self._own_is_minimised = None, [], [], False

    def _stop_listening(self) -> None:
        remove_all(self._handles)
        self._handles = []

    def _begins(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if self._call is None and torch.is_grad_enabled() and not in_backward():
            with suppress(Exception):  # an argument that cannot be copied: the batch is left out
                self._call = ModuleCall.record(module, args, kwargs, random=True).copied()

    def _ended(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        if self._call is None:
            return
        self._stop_listening()
        with suppress(Exception), torch.no_grad():  # of the user's classes, or for want of memory
            ids = self._call.kwargs.get("input_ids", next(iter(self._call.args), None))
            losses = possible_losses(output, ids, self._targets)
            self._losses = [(loss_of, loss_of(output)) for loss_of in losses]
            if (loss := own_loss(output)) is not None and loss.requires_grad:
                loss.register_hook(self._note_gradient)

    def _note_gradient(self, gradient: Tensor) -> None:
        self._own_is_minimised = True


def _plain(module: nn.Module) -> list[nn.Module]:
    """Return the modules inside without the wrappers of compiled ones, which a copy does not have."""
    return [inner for inner in module.modules() if not hasattr(inner, "_orig_mod")]


def _tensors(batch: Any, depth: int = 3) -> Iterator[Tensor]:
    """Yield the tensors of a batch that is made of plain containers: others may load what is asked for."""
    if isinstance(batch, Tensor):
        yield batch
    elif depth and type(batch) is dict:
        for value in batch.values():
            yield from _tensors(value, depth - 1)
    elif depth and isinstance(batch, (list, tuple)):
        for value in batch:
            yield from _tensors(value, depth - 1)
