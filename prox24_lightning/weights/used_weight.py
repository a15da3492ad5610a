"""Whether a layer multiplies its inputs by the weight that it stores, so that zeros in the one are zeros in the other.

A weight that is recomputed before it is used (normalised, standardised, masked, reparametrised) cannot be pruned by
changing what is stored: a standardised weight has no zeros, whatever the stored one has.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized
from torch.overrides import TorchFunctionMode

from prox24_lightning.weights.sharded import is_sharded

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d, torch.conv1d, torch.conv2d, torch.conv3d, torch.convolution)
_PRODUCTS = (F.linear, torch.matmul, torch.mm, torch.addmm, torch.einsum, Tensor.matmul, Tensor.__matmul__, Tensor.mm)
_REPARAMETRISED = {
    "weight_g": ("weight_norm", "torch.nn.utils.remove_weight_norm(layer)"),
    "weight_v": ("weight_norm", "torch.nn.utils.remove_weight_norm(layer)"),
    "weight_orig": ("spectral_norm", "torch.nn.utils.remove_spectral_norm(layer)"),
}
"""Parameters that torch's hook-based reparametrisations put in the place of ``weight``: kind and how to undo it."""


def why_recomputed(module: nn.Module, parameter_name: str) -> str | None:
    """Return why the tensor that is stored is not the weight that is used, with the remedy; None if it is."""
    if isinstance(module, ParametrizationList) or is_parametrized(module, parameter_name):
        return (
            "parametrized: the stored tensor is not the weight that is used; undo it with "
            "torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight')"
        )
    if parameter_name in _REPARAMETRISED and "weight" not in module._parameters:
        kind, remedy = _REPARAMETRISED[parameter_name]
        if "weight_mask" in module._buffers:
            kind, remedy = "torch.nn.utils.prune", "torch.nn.utils.prune.remove(layer, 'weight')"
        return f"{kind}: the stored tensor is not the weight that is used; undo it with {remedy}"
    if parameter_name == "weight" and _overrides_forward(module) and _keeps_zeros(module) is False:
        return (
            f"{type(module).__name__} has a forward of its own, which recomputes the weight: zeros in the stored one "
            "would not be zeros in the one that is used; store the recomputed weight in a plain layer first"
        )
    return None


def why_unknown(module: nn.Module, parameter_name: str) -> str | None:
    """Return why nobody can tell whether the stored weight is the one that is used; None if it is known."""
    weight = module._parameters.get(parameter_name)
    if weight is None or is_sharded(weight) or parameter_name != "weight" or not _overrides_forward(module):
        return None
    if _keeps_zeros(module) is not None:
        return None
    return (
        f"{type(module).__name__} has a forward of its own, of which one call with ones did not show by what it "
        "multiplies; name the weight in targets if that is the stored weight"
    )


def _overrides_forward(module: nn.Module) -> bool:
    base = next((cls for cls in _LAYERS if isinstance(module, cls)), None)
    return base is not None and any(
        getattr(type(module), name, None) is not getattr(base, name, None) for name in ("forward", "_conv_forward")
    )


class _Multiplied(TorchFunctionMode):
    """Records what products and convolutions are computed with, of the shape of a weight or of its transpose."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self._shape = shape
        self.found: Tensor | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _CONVOLUTIONS or func in _PRODUCTS:
            tensors = [value for value in pytree.tree_leaves((args[1:], args[:1], kwargs)) if isinstance(value, Tensor)]
            for tensor in tensors if self.found is None else ():
                if tensor.shape == self._shape:
                    self.found = tensor
                elif tensor.dim() == 2 and tensor.T.shape == self._shape:
                    self.found = tensor.T
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def _keeps_zeros(module: nn.Module) -> bool | None:
    """Return whether zeros of the stored weight are zeros of what inputs are multiplied by; None if unknown.

    The forward runs on ones in a copy of the layer that stores a 2:4 test weight, without hooks; the random state stays
    as it was.
    """
    weight: Tensor = module.get_parameter("weight")
    if is_sharded(weight) or weight.is_meta or not weight.is_floating_point() or not weight.numel():
        return None
    # Positive values: where a mean is subtracted, that of the test weight must not be zero.
    stored = torch.linspace(0.5, 1.5, weight.numel(), device=weight.device).to(weight.dtype).view_as(weight)
    stored[:, 1::2] = 0
    devices = [weight.device] if weight.is_cuda else []
    for tokens in ((1,), (1, 1)):
        mode = _Multiplied(stored.shape)
        # A forward that fails after the product has shown its weight; one that wants other arguments shows none.
        with suppress(Exception), torch.random.fork_rng(devices), mode:
            _copy_with(module, stored).forward(_test_input(module, weight, tokens))
        if mode.found is not None:
            return not bool((mode.found[stored == 0] != 0).any())
    return None


def _copy_with(module: nn.Module, weight: Tensor) -> nn.Module:
    """Return a copy of the layer that shares nothing that its forward may change, and stores ``weight``."""
    layer = copy.copy(module)
    layer._parameters = {**module._parameters, "weight": nn.Parameter(weight, requires_grad=False)}
    layer._buffers = {name: None if held is None else held.clone() for name, held in module._buffers.items()}
    layer._modules = copy.deepcopy(module._modules)
    layer.__dict__.pop("forward", None)
    return layer.eval()


def _test_input(module: Any, weight: Tensor, tokens: tuple[int, ...]) -> Tensor:
    if isinstance(module, nn.Linear):
        return weight.new_ones((*tokens, module.in_features))
    span = [(kernel - 1) * step + 1 for kernel, step in zip(module.kernel_size, module.dilation, strict=True)]
    return weight.new_ones((1, module.in_channels, *span))
