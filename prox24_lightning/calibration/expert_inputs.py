"""What each expert of a mixture multiplies by its matrices, where those of all experts are one 3-D parameter.

The module of experts is called once more, by itself, on the arguments of a call that the model made. Under a mode that
sees each product, the inputs of expert ``e`` are what its slice of the parameter is multiplied with: nothing about
routers, activations or arguments is written down here, and ``down_proj`` is seen as well as ``gate_up_proj``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from prox24_lightning.weights.sharded import is_sharded

ExpertInputs = dict[str, dict[int, Tensor]]
"""Parameter name -> expert -> its inputs, (tokens, in_features); experts without a token are left out."""

_SLICES: tuple[Any, ...] = (Tensor.__getitem__, Tensor.select, torch.select, Tensor.unbind, torch.unbind)
_VIEWS: tuple[Any, ...] = (Tensor.t, Tensor.transpose, torch.t, torch.transpose, Tensor.contiguous)
_VIEWS += tuple(getattr(Tensor, name).__get__ for name in ("T", "mT"))
_CASTS: tuple[Any, ...] = (Tensor.to, Tensor.type_as, Tensor.float, Tensor.bfloat16, Tensor.half)
_PRODUCTS = (F.linear, torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.__matmul__, Tensor.mm, Tensor.bmm)


@torch.no_grad()
def expert_inputs(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> ExpertInputs:
    """Return what a call of ``module`` with these arguments multiplies by each expert's matrices.

    Hooks do not run; arguments, buffers and random state stay as they were. Rows of zeros, which experts that take all
    tokens get in the place of those of others, are left out. A parameter whose products are not seen is missing.

    Args:
        module: holds 3-D parameters, one matrix for each expert.
        args, kwargs: as the model calls the module.

    Raises:
        Exception: whatever the module's forward raises.
    """
    parameters = {name: p for name, p in module.named_parameters(recurse=False) if p.dim() == 3}
    if any(map(is_sharded, parameters.values())):
        return {}
    args, kwargs = pytree.tree_map(lambda value: value.clone() if isinstance(value, Tensor) else value, (args, kwargs))
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    # transformers puts grouped products in the place of the loop over experts that the class writes down.
    forward = inspect.unwrap(type(module).forward)
    mode = _ExpertProducts(parameters)
    devices = [parameter.device for parameter in parameters.values() if parameter.is_cuda][:1]
    try:
        with torch.random.fork_rng(devices), mode:
            forward(module, *args, **kwargs)
    finally:
        for name, buffer in module.named_buffers():
            buffer.copy_(buffers[name])
    return {
        name: {expert: torch.cat(rows) for expert, rows in sorted(found.items())} for name, found in mode.found.items()
    }


class _ExpertProducts(TorchFunctionMode):
    """Follows slices of 3-D parameters to the products that they enter."""

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        super().__init__()
        self.found: dict[str, dict[int, list[Tensor]]] = {}
        # Tensors are held, so that no id is used twice. Expert None: the whole parameter.
        self._origins: dict[int, tuple[Tensor, str, int | None]] = {
            id(parameter): (parameter, name, None) for name, parameter in parameters.items()
        }

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _PRODUCTS and len(args) > 1:
            self._multiply(args[0], args[1])
        result = func(*args, **(kwargs or {}))
        origin = self._origins.get(id(args[0])) if args else None
        if origin is not None:
            _, name, expert = origin
            if func in _SLICES and expert is None:
                self._take(func, args, kwargs or {}, name, result)
            elif func in (*_VIEWS, *_CASTS) and isinstance(result, Tensor):
                self._origins[id(result)] = result, name, expert
        return result

    def _take(self, func: Callable[..., Any], args: tuple, kwargs: dict[str, Any], name: str, result: Any) -> None:
        if isinstance(result, (tuple, list)):  # unbind along the experts
            if (args[1:] or (kwargs.get("dim", 0),))[0] == 0:
                for expert, part in enumerate(result):
                    self._origins[id(part)] = part, name, expert
            return
        index = args[-1]
        if func in (Tensor.select, torch.select) and args[1:2] != (0,):
            return
        with suppress(TypeError, ValueError, RuntimeError):  # slices and lists of indices are not followed
            self._origins[id(result)] = result, name, int(index)

    def _multiply(self, left: Any, right: Any) -> None:
        origin = self._origins.get(id(right))
        if origin is None or not isinstance(left, Tensor):
            return
        _, name, expert = origin
        rows = self.found.setdefault(name, {})
        if expert is not None:
            rows.setdefault(expert, []).append(left.detach().reshape(-1, left.shape[-1]))
            return
        for number, part in enumerate(left.detach()):
            kept = part[part.any(-1)]
            if len(kept):
                rows.setdefault(number, []).append(kept)


def expert_inputs_of(module: nn.Module, run: Callable[[], Any]) -> list[ExpertInputs]:
    """Call ``run`` and return :func:`expert_inputs` of each call of ``module`` in it."""
    found: list[ExpertInputs] = []

    def note(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        found.append(expert_inputs(module, args, kwargs))

    handle = module.register_forward_pre_hook(note, with_kwargs=True)
    try:
        run()
    finally:
        handle.remove()
    return found
