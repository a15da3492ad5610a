"""Enforce frozen masks while training goes on: on weights, gradients and optimizer state."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from prox24_lightning.finetune.optimizer_state import OptimizerState
from prox24_lightning.finetune.optimizers import masters_of, wrapped_optimizers
from prox24_lightning.mask import pack_mask
from prox24_lightning.utils.devices.cuda import why_no_triton
from prox24_lightning.weights.sharded import local_part

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By bytes."""


class MaskedParameters:
    """Keep the pruned entries of parameters exactly zero.

    Masking gradients alone leaks: momentum from before the freeze brings pruned weights back. So three places are
    masked: the optimizer's state when the mask is set; every gradient as it is accumulated, before anything
    (clipping, a logged norm, an optimizer that is not elementwise) reads it; and the weights after each step, against
    optimizers and callbacks that write to pruned entries. On a GPU the last pass reads the weights, and writes only
    where a pruned entry is not zero.

    Each rank masks its own part of a sharded parameter, with the mask of that part.

    Attributes:
        masks: by name, bool, True stays.
        masters: parameter -> the tensor that an optimizer trains in its place (an fp32 master), and that is masked too.
    """

    def __init__(self) -> None:
        self.masks: dict[str, Tensor] = {}
        self.masters: Mapping[Tensor, Tensor] = {}
        self._pruned: dict[str, Tensor] = {}
        self._packed: dict[str, Tensor] = {}
        self._parameters: dict[str, nn.Parameter] = {}
        self._handles: dict[str, RemovableHandle] = {}
        self._step_handles: list[RemovableHandle] = []
        self._states: dict[int, OptimizerState] = {}
        self._versions: dict[str, int | None] = {}

    def apply(self, name: str, parameter: nn.Parameter, mask: Tensor) -> None:
        """Zero the pruned entries of ``parameter`` and its gradient, and mask every gradient from now on.

        Args:
            mask: bool, True stays; of the shape of this rank's part of ``parameter``.

        Raises:
            ValueError: if the shapes differ.
        """
        values = local_part(parameter)
        if mask.shape != values.shape:
            raise ValueError(
                f"the mask of {name!r} has shape {tuple(mask.shape)}, the weight {tuple(values.shape)}: "
                "they do not belong together"
            )
        self.release(name)
        self.masks[name] = mask.to(values.device)
        self._pruned.pop(name, None)
        self._packed.pop(name, None)
        self._parameters[name] = parameter
        with torch.no_grad():
            values.masked_fill_(~self.masks[name], 0.0)
            if parameter.grad is not None:
                local_part(parameter.grad).masked_fill_(~self.masks[name], 0.0)
        # Lightning's toggle_optimizer turns requires_grad off while another optimizer steps; hooks need it on.
        requires_grad = parameter.requires_grad
        parameter.requires_grad_(True)
        self._handles[name] = parameter.register_post_accumulate_grad_hook(
            lambda parameter, name=name: self._after_backward(parameter, name)
        )
        parameter.requires_grad_(requires_grad)

    def watch(self) -> None:
        """Warn, once, if the first step on a weight brings pruned entries back: by an optimizer that is not masked."""
        self._versions = dict.fromkeys(self._parameters)

    def enforce(self, optimizers: Iterable[Optimizer]) -> None:
        """Mask the state of ``optimizers`` now, and the weights after each of their steps."""
        optimizers = list(optimizers)
        self.masters = self.masters or masters_of(optimizers, self._parameters.values())
        self.mask_optimizer_state(optimizers)
        for optimizer in optimizers:
            for part in wrapped_optimizers(optimizer):  # SAM steps the optimizer that it wraps alone
                hook = part.register_step_post_hook(lambda *_, outer=optimizer: self.after_step(outer))
                self._step_handles.append(hook)

    def release(self, name: str) -> None:
        """Stop masking the gradients and weights of ``name``; the mask is kept."""
        handle = self._handles.pop(name, None)
        if handle is not None:
            handle.remove()
        self._parameters.pop(name, None)
        self._versions.pop(name, None)

    def release_all(self) -> None:
        """Stop masking every parameter and optimizer; the masks are kept."""
        for name in list(self._parameters):
            self.release(name)
        while self._step_handles:
            self._step_handles.pop().remove()
        self._states.clear()

    def after_step(self, optimizer: Optimizer, names: Iterable[str] | None = None) -> None:
        """Mask the weights ``names``, or all, and the copies of weights that ``optimizer`` keeps, after its step."""
        self.mask_weights(names)
        state = self._state_of(optimizer)
        if self._parameters and state.has_copies:
            state.mask(self._masks_by_parameter(), copies_alone=True)

    @contextmanager
    def carry_writes(self, optimizers: Iterable[Optimizer]) -> Iterator[None]:
        """Move the copies that ``optimizers`` keep of weights as the code inside of the context moves the weights."""
        with ExitStack() as stack:
            for optimizer in optimizers:
                stack.enter_context(self._state_of(optimizer).carry_writes())
            yield

    @torch.no_grad()
    def mask_weights(self, names: Iterable[str] | None = None) -> None:
        """Zero the pruned entries of the weights ``names``, or of all."""
        for name in self._parameters if names is None else names:
            if name in self._parameters:
                self._zero_pruned(self._parameters[name], name, mostly_zero=True)

    @torch.no_grad()
    def mask_optimizer_state(self, optimizers: Iterable[Optimizer]) -> None:
        """Zero the pruned entries of moments and of copies of the weights."""
        for optimizer in optimizers:
            self._state_of(optimizer).mask(self._masks_by_parameter())

    def _after_backward(self, parameter: nn.Parameter, name: str) -> None:
        self._zero_pruned(parameter.grad, name)
        if name not in self._versions:
            return
        values, before = local_part(parameter.detach()), self._versions[name]
        if before is None:
            self._versions[name] = values._version
        elif values._version != before:  # written to since the first backward pass: look once
            del self._versions[name]
            if values[~self.masks[name]].any():
                self._versions.clear()
                warnings.warn(
                    f"{name} has non-zero weights again where its mask prunes: only gradients are masked, and an "
                    "optimizer with state of its own moves the pruned entries; give it to load_masks as optimizers=",
                    stacklevel=2,
                )

    def _state_of(self, optimizer: Optimizer) -> OptimizerState:
        if id(optimizer) not in self._states:
            self._states[id(optimizer)] = OptimizerState(optimizer, self.masters)
        return self._states[id(optimizer)]

    def _masks_by_parameter(self) -> dict[Tensor, Tensor]:
        return {parameter: self.masks[name] for name, parameter in self._parameters.items()}

    @torch.no_grad()
    def _zero_pruned(self, tensor: Tensor | None, name: str, *, mostly_zero: bool = False) -> None:
        """Zero ``tensor``, or this rank's part of it, in place where the mask of ``name`` is False.

        ``mostly_zero``: pruned entries are expected to be zero already.
        """
        if tensor is None:
            return
        values = local_part(tensor)
        mask = self.masks[name]
        if mask.device != values.device:  # the model was moved since
            mask = self.masks[name] = mask.to(values.device)
        if values.device.type == "cpu":
            # Twice as fast as masked_fill_, and as exact: as integers, infinity and NaN times zero are zero.
            values.view(_INTEGERS[values.element_size()]).mul_(mask)
            return
        if values.is_cuda and values.is_contiguous() and why_no_triton(values.device) is None:
            from prox24_lightning.mask.triton_kernel import zero_pruned_triton

            packed = self._packed.get(name)
            if packed is None or packed.device != values.device:
                packed = self._packed[name] = pack_mask(mask)
            zero_pruned_triton(values, packed, mostly_zero=mostly_zero)
            return
        pruned = self._pruned.get(name)
        if pruned is None or pruned.device != values.device:  # kept: inverting takes as long as filling
            pruned = self._pruned[name] = ~mask
        values.masked_fill_(pruned, 0.0)
