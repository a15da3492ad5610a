"""Disturb some outputs of one module, and see which inputs of later layers that reaches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prox24_lightning.calibration.calls.hooks import remove_all
from prox24_lightning.calibration.free_orders.channels import channel_dim, takes_any_order
from prox24_lightning.calibration.input_groups import layer_input

_DISTURBANCE = 4.0
"""Of an output, relative to the rms of all: large enough to move a softmax in 16 bits."""


class Probe:
    """The inputs of layers in one run of a module, and how they change when outputs are disturbed.

    Args:
        modules: candidates: whatever holds parameters or buffers.
        run: calls the module that holds them, always on the same inputs.
        reads: whether the inputs of a module are compared.

    Attributes:
        order: those of ``modules`` that are called exactly once and return one tensor, in the order of their calls.
        channels: number of outputs of each of them.
        uncalled: those of ``modules`` that the run does not call.
        is_deterministic: whether a second run gives the very same inputs.
    """

    def __init__(
        self,
        modules: Iterable[nn.Module],
        run: Callable[[], Any],
        *,
        reads: Callable[[nn.Module], bool] = takes_any_order,
    ) -> None:
        self._run = run
        self._reads = reads
        self._calls: dict[nn.Module, int] = {}
        self._single: dict[nn.Module, int] = {}
        self._inputs: dict[nn.Module, Tensor] = {}
        modules = list(modules)
        handles = [module.register_forward_pre_hook(self._note_input, with_kwargs=True) for module in modules]
        handles += [module.register_forward_hook(self._note_output) for module in modules]
        try:
            run()
        finally:
            remove_all(handles)
        self.order = [module for module, calls in self._calls.items() if calls == 1 and module in self._single]
        self.uncalled = [module for module in modules if module not in self._calls]
        self.channels = {module: self._single[module] for module in self.order}
        self._readers = [module for module in self.order if reads(module) and module in self._inputs]
        self.is_deterministic = not any(len(reached) for reached in self._changes(lambda: None).values())

    @property
    def readers(self) -> list[nn.Module]:
        """The modules whose inputs are compared."""
        return self._readers

    def reached_by(self, module: nn.Module, outputs: Sequence[int]) -> dict[nn.Module, list[int]]:
        """Return which inputs of each layer change when these outputs of ``module`` are disturbed."""

        def disturb(_: nn.Module, args: Any, output: Tensor) -> Tensor:
            output = output.clone()
            dim = channel_dim(module, output)
            index = torch.tensor(outputs, device=output.device)
            part = output.index_select(dim, index)
            # Drawn on the device: half the outputs of a large batch take a CPU a tenth of a second.
            generator = torch.Generator(output.device).manual_seed(0)
            noise = torch.randn(part.shape, generator=generator, device=output.device).to(part)
            scale = _DISTURBANCE * output.float().square().mean().sqrt().to(part) + 1e-3
            return output.index_copy_(dim, index, part + scale * noise)

        return self._changes(lambda: module.register_forward_hook(disturb))

    def _changes(self, hook: Callable[[], Any]) -> dict[nn.Module, list[int]]:
        found: dict[nn.Module, list[int]] = {}

        def compare(reader: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            now, before = layer_input(args, kwargs), self._inputs[reader]
            dim = channel_dim(reader, before)
            if now.shape != before.shape:
                found[reader] = list(range(before.shape[dim]))
                return
            differs = (now != before).movedim(dim, 0).flatten(1).any(1)
            found[reader] = differs.nonzero().flatten().tolist()

        handles = [reader.register_forward_pre_hook(compare, with_kwargs=True) for reader in self._readers]
        handles += [handle for handle in [hook()] if handle is not None]
        try:
            self._run()
        finally:
            remove_all(handles)
        return found

    def _note_input(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._calls[module] = self._calls.get(module, 0) + 1
        if self._reads(module) and isinstance(given := layer_input(args, kwargs), Tensor):
            self._inputs[module] = given.detach().clone()

    def _note_output(self, module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.dim() and output.is_floating_point():
            self._single[module] = output.shape[channel_dim(module, output)]
