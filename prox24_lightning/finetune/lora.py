"""LoRA (peft) on a frozen 2:4 model: mask the product of the adapters, in training and when it is merged.

A merged adapter, ``W + B A``, is dense: the zeros are lost. Masking it only at the end gives another model than the
trained one. So each adapted layer computes with ``W + mask * (B A)`` while it trains, and :meth:`MaskedLora.merge`
stores exactly that. Needs the ``peft`` package (``pip install prox24_lightning[lora]``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from prox24_lightning.mask import is_24, mask_24
from prox24_lightning.utils.tensors import without_inference
from prox24_lightning.weights.eligibility import fit_groups
from prox24_lightning.weights.layer_matrix import is_transposed_linear


class MaskedLora:
    """Enforce the masks of a 2:4 model on its LoRA adapters.

    Each adapted layer costs one more product of its size a step.

    Args:
        model: the model that ``peft.get_peft_model`` returned.
        masks: bool, True stays, by the names of the weights before peft wrapped the model (``load_masks(...).masks``,
            or ``Prox24.masks``). None takes the zeros of the adapted weights that are 2:4 along their inputs.

    Raises:
        ValueError: if no adapted layer has a mask, a mask has another shape than its weight, a weight is not pruned by
            its mask, or the product of an adapter cannot be masked: another kind than LoRA, a variant of it (DoRA),
            dropout, or a copy of the layer that trains as a whole (``modules_to_save``).
    """

    @torch.inference_mode(False)  # the masks are part of what autograd differentiates
    def __init__(self, model: nn.Module, masks: Mapping[str, Tensor] | None = None) -> None:
        self.model = model
        self.masks: dict[str, Tensor] = without_inference(dict(_masks_of_zeros(model) if masks is None else masks))
        adapted: list[tuple[nn.Module, Tensor]] = []
        for name, layer in model.named_modules():
            mask = self.masks.get(_base_name(f"{name}.weight"))
            if mask is None or not _is_adapted(layer):
                continue
            _check(name, layer, mask)
            adapted.append((layer, mask))
        self._handles: list[RemovableHandle] = [
            layer.register_forward_hook(_MaskedProduct(mask)) for layer, mask in adapted
        ]
        if not any(map(_is_adapted, model.modules())):
            raise ValueError(
                f"{type(model).__name__} has no adapter: pass what peft.get_peft_model(model, config) returns"
            )
        if not self._handles and not self.masks:
            raise ValueError(
                "no weight under an adapter is 2:4 along its inputs, so there are no zeros to keep: prune the model "
                "before get_peft_model (prox24 prune), or train the adapter without MaskedLora"
            )
        if not self._handles:
            raise ValueError(
                f"none of the adapted layers has a mask; the masks are of {sorted(self.masks)[:3]}: adapt those layers "
                "with target_modules, and name the masks as in the model before get_peft_model"
            )

    def release(self) -> None:
        """Stop masking: the layers compute with the whole product again."""
        while self._handles:
            self._handles.pop().remove()

    @torch.no_grad()
    def merge(self) -> nn.Module:
        """Add the masked products to the weights, remove the adapters and return the base model, 2:4 as before."""
        self.release()
        merged = self.model.merge_and_unload()  # type: ignore[operator]
        for name, parameter in merged.named_parameters():
            if name in self.masks:
                parameter.masked_fill_(~self.masks[name].to(parameter.device), 0.0)
        return merged


@torch.no_grad()
def _is_adapted(layer: nn.Module) -> bool:
    """Whether peft has wrapped the layer, for an adapter or to train a copy of it as a whole."""
    return hasattr(layer, "get_base_layer") or hasattr(layer, "modules_to_save")


def _check(name: str, layer: Any, mask: Tensor) -> None:
    """Refuse a layer whose merged weight would not be the trained one."""
    if not hasattr(layer, "lora_A"):
        kind = "modules_to_save trains it as a whole" if hasattr(layer, "modules_to_save") else type(layer).__module__
        raise ValueError(f"{name} has an adapter that cannot be masked ({kind}); adapt it with peft.LoraConfig")
    weight = layer.get_base_layer().weight
    if mask.shape != weight.shape:
        raise ValueError(f"{name}: its mask has shape {tuple(mask.shape)}, its weight {tuple(weight.shape)}")
    if any(isinstance(dropout, nn.Dropout) and dropout.p for dropout in layer.lora_dropout.values()):
        raise ValueError(f"{name}: an adapter with dropout cannot be masked; set lora_dropout=0.0")
    if variants := {type(variant).__name__ for variant in getattr(layer, "lora_variant", {}).values()}:
        raise ValueError(
            f"{name}: an adapter that does more than add a product cannot be masked ({', '.join(sorted(variants))}); "
            "leave out use_dora and its like"
        )
    if alive := int(torch.count_nonzero(weight[~mask.to(weight.device)])):
        raise ValueError(
            f"{name} has {alive} non-zero weights where its mask prunes: prune it before get_peft_model, and leave out "
            "init_lora_weights, some of which ('pissa', 'olora') take the adapter out of the weight"
        )


class _MaskedProduct:
    """Forward hook that subtracts what the pruned entries of the product have added; copies and pickles keep it."""

    def __init__(self, mask: Tensor) -> None:
        self._mask = mask

    def __call__(self, layer: Any, args: tuple, output: Tensor) -> Tensor:
        if layer.merged or layer.disable_adapters:
            return output
        for adapter in layer.active_adapters:
            if adapter in layer.lora_A:
                inputs = args[0]
                kept = self._mask.to(inputs.device)
                pruned = layer.get_delta_weight(adapter).masked_fill(kept, 0.0).to(inputs.dtype)
                base = layer.get_base_layer()
                if isinstance(base, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
                    output = output - base._conv_forward(inputs, pruned, None)
                else:
                    output = output - F.linear(inputs, pruned.T if is_transposed_linear(base) else pruned)
        return output


def unmasked_adapters(model: nn.Module) -> list[str]:
    """Return the names of 2:4 weights under LoRA adapters whose product is not masked: merged, they end dense."""
    return [
        _base_name(f"{name}.weight")
        for name, layer, _ in _adapted_24(model)
        if not any(isinstance(hook, _MaskedProduct) for hook in layer._forward_hooks.values())
    ]


def _masks_of_zeros(model: nn.Module) -> dict[str, Tensor]:
    return {_base_name(f"{name}.weight"): mask_24(weight, dim=dim) for name, layer, (weight, dim) in _adapted_24(model)}


def _adapted_24(model: nn.Module) -> Iterator[tuple[str, nn.Module, tuple[Tensor, int]]]:
    """Yield name, layer, weight and group dimension of the adapted layers whose weight is 2:4 along its inputs."""
    for name, layer in model.named_modules():
        base = layer.get_base_layer() if hasattr(layer, "lora_A") and hasattr(layer, "get_base_layer") else None
        weight = getattr(base, "weight", None)
        if not isinstance(base, nn.Module) or not isinstance(weight, nn.Parameter) or weight.dim() < 2:
            continue
        reason, dim = fit_groups(base, "weight", weight, "row")
        values = weight.detach()
        if reason is None and isinstance(dim, int) and is_24(values, dim=dim) and bool((values != 0).any()):
            yield name, layer, (values, dim)


def _base_name(name: str) -> str:
    """Return the name that a parameter had before peft wrapped the model."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")
