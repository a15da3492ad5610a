"""Which parameters of a model become 2:4, and why each of the others stays dense."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import nn

from prox24_lightning.weights.eligibility import UNKNOWN_KIND, fit_groups
from prox24_lightning.weights.experts import expert_input_dim, is_expert_parameter
from prox24_lightning.weights.groups import MATRIX_DIMS, Dim, Geometry
from prox24_lightning.weights.heads import output_heads
from prox24_lightning.weights.names import clean_name, matching
from prox24_lightning.weights.used_weight import why_unknown

_LORA = frozenset({"lora_A", "lora_B", "lora_a", "lora_b"})
_ADAPTER = "LoRA adapter: a weight into which a 2:4 adapter is merged is not 2:4"
_ADAPTED = (
    "frozen (requires_grad=False) under a LoRA adapter: prune the model before get_peft_model, and keep its zeros with "
    "prox24_lightning.finetune.MaskedLora"
)


@dataclass(frozen=True)
class GroupedWeight:
    """A parameter that will be 2:4: where it lives and along which dimension its groups lie.

    ``name`` is the parameter's name as in ``model.named_parameters()``, without ``torch.compile``'s prefix. ``dim`` is
    what ``mask_24``, ``prox_24``, ``violations_24`` and the like take: for the block geometry a pair. ``sharded``
    is the parameter itself if it is a ``DTensor``: FSDP2 puts gathered copies in its place for a while, and what is
    written into those is lost.
    """

    name: str
    module_name: str
    module: nn.Module
    parameter_name: str
    dim: Dim
    sharded: nn.Parameter | None = None
    geometry: Geometry = "row"

    @property
    def parameter(self) -> nn.Parameter:
        return getattr(self.module, self.parameter_name) if self.sharded is None else self.sharded

    @property
    def groups(self) -> int:
        """Number of groups of four in the weight; in the block geometry those of the rows and of the columns."""
        return self.parameter.numel() // 4 * (1 if isinstance(self.dim, int) else 2)

    @property
    def is_experts(self) -> bool:
        """Whether the parameter holds one matrix for each of several experts."""
        return is_expert_parameter(self.module, self.parameter)

    @property
    def input_dim(self) -> int:
        """The dimension along which the inputs of each expert's matrix lie."""
        return expert_input_dim(self.module, self.parameter_name) or 0

    @property
    def matrix_dim(self) -> Dim:
        """The groups once the weight, or each expert's, is laid out as (out_features, in_features)."""
        return MATRIX_DIMS[self.geometry]


@dataclass(frozen=True)
class SkippedWeight:
    """A parameter that stays dense, and why."""

    name: str
    kind: str
    shape: tuple[int, ...]
    reason: str
    experts: bool = False


@dataclass(frozen=True)
class Selection:
    """What :func:`select_weights` decided about every parameter of a model that has at least two dimensions."""

    chosen: tuple[GroupedWeight, ...]
    skipped: tuple[SkippedWeight, ...]

    def __iter__(self) -> Iterator[GroupedWeight]:
        return iter(self.chosen)

    def __len__(self) -> int:
        return len(self.chosen)

    def warning(self) -> str | None:
        """Return a warning about large parts that stay dense though nobody asked for it, None if there are none.

        These are experts (most of a mixture), layers under LoRA adapters, and modules of unknown kinds that hold a
        tenth of the weights or more. A model with such a part is far from 2:4, whatever becomes of the rest.
        """
        own = ("skip=", "not among", "frozen", "output head", "tied")
        experts = [w for w in self.skipped if w.experts and not w.reason.startswith(own)]
        adapted = [w for w in self.skipped if w.reason == _ADAPTED] if self.chosen else []
        unknown = [w for w in self.skipped if w.reason.endswith(UNKNOWN_KIND) and not w.experts]
        whole = sum(weight.parameter.numel() for weight in self.chosen) + sum(math.prod(w.shape) for w in self.skipped)
        if 10 * sum(math.prod(weight.shape) for weight in unknown) < whole:
            unknown = []
        parts = [part for part in (experts, adapted, unknown) if part]
        if not parts:
            return None
        texts = []
        for part in parts:
            share = 100 * sum(math.prod(weight.shape) for weight in part) / whole
            more = f" and {len(part) - 1} more" if len(part) > 1 else ""
            texts.append(f"{part[0].name}{more} stay dense, {share:.0f} % of the weights: {part[0].reason}")
        return "; ".join(texts)


def select_weights(
    model: nn.Module,
    *,
    targets: Sequence[str] | None = None,
    skip: Sequence[str] | None = None,
    geometry: Geometry = "row",
) -> Selection:
    """Decide which weights of ``model`` become 2:4.

    Without ``targets`` every linear and convolution weight qualifies, except output heads
    (:func:`~prox24_lightning.weights.heads.output_heads`), adapters, and weights that an embedding or another module
    shares.

    Args:
        model: any module.
        targets: patterns; only weights that match one of them are taken. A pattern is matched, with shell
            wildcards, against the parameter's name, the module's name, and the names of the module's class
            and its bases (``"*.mlp.*"``, ``"Conv2d"``). Heads and tied weights are taken when a
            pattern without wildcards names them.
        skip: patterns of the same kind; weights that match stay dense.
        geometry: ``"row"`` lays the groups along the input dimension, ``"column"`` along the output dimension,
            ``"block"`` along both; a weight whose sizes do not divide by 4 there stays dense, with the reason.

    Raises:
        ValueError: for an unknown geometry, a pattern that matches nothing, a target named without wildcards that
            cannot be 2:4, or a weight that has no storage yet (lazy or meta).
    """
    if geometry not in get_args(Geometry):
        raise ValueError(f"geometry={geometry!r} is unknown; use one of {', '.join(get_args(Geometry))}")
    _check_values(model)
    owners = _owners(model)
    heads = {parameter for head in output_heads(model) for parameter in head.parameters()}
    adapters = _adapter_parameters(model)
    chosen: list[GroupedWeight] = []
    skipped: list[SkippedWeight] = []
    matched: set[str] = set()
    seen: set[int] = set()

    for module_name, module in _modules(model):
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() < 2 or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            name = f"{module_name}.{parameter_name}" if module_name else parameter_name
            aliases = {name, module_name, *(cls.__name__ for cls in type(module).__mro__)}
            hits = matching(aliases, targets or ())
            skips = matching(aliases, skip or ())
            matched.update(hits, skips)
            by_name = any(pattern in (name, module_name) for pattern in hits)
            reason, dim = fit_groups(module, parameter_name, parameter, geometry)
            if not reason and not parameter.numel():
                reason = "the layer has no inputs or no outputs"
            if reason and by_name:
                raise ValueError(f"target {name!r} of shape {tuple(parameter.shape)} cannot be 2:4: {reason}")
            if skips:
                reason = f"skip={skips[0]!r}"
            if not reason:
                if targets is not None and not hits:
                    reason = "not among the targets"
                elif not by_name and len(owners[id(parameter)]) > 1:
                    reason = "tied: shared by " + " and ".join(owners[id(parameter)])
                elif not by_name and parameter in heads:
                    reason = "output head"
                elif not by_name and parameter in adapters:
                    reason = adapters[parameter]
                elif not parameter.requires_grad:
                    reason = "frozen (requires_grad=False)"
                elif not by_name:
                    reason = why_unknown(module, parameter_name)
            if reason:
                shape, experts = tuple(parameter.shape), is_expert_parameter(module, parameter)
                skipped.append(SkippedWeight(name, type(module).__name__, shape, reason, experts))
            else:
                sharded = parameter if hasattr(parameter, "placements") else None
                chosen.append(GroupedWeight(name, module_name, module, parameter_name, dim, sharded, geometry))

    for label, patterns in (("targets", targets or ()), ("skip", skip or ())):
        for pattern in patterns:
            if pattern not in matched:
                raise ValueError(
                    f"{label} pattern {pattern!r} matches no weight of the model; check it for typing errors"
                )
    return Selection(tuple(chosen), tuple(skipped))


def _check_values(model: nn.Module) -> None:
    """Refuse parameters without values; an uninitialized one has not even a shape."""
    for module_name, module in _modules(model):
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if isinstance(parameter, torch.nn.parameter.UninitializedParameter) or parameter.is_meta:
                raise ValueError(
                    f"{module_name or type(module).__name__}.{parameter_name} has no values yet (lazy or meta "
                    "parameter); run one forward pass, or materialise the model, before it is made sparse"
                )


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        yield clean_name(name), module


def _owners(model: nn.Module) -> dict[int, list[str]]:
    """Parameter id -> the names of every module that holds it."""
    owners: dict[int, list[str]] = {}
    for module_name, module in _modules(model):
        for parameter in module.parameters(recurse=False):
            names = owners.setdefault(id(parameter), [])
            names.append(module_name or type(module).__name__)
    return owners


def _adapter_parameters(model: nn.Module) -> dict[nn.Parameter, str]:
    """Return the parameters of adapted layers, the adapters' and the frozen base's, and why each stays dense."""
    found: dict[nn.Parameter, str] = {}
    for name, module in model.named_modules():
        base = getattr(module, "base_layer", None)
        if isinstance(base, nn.Module) and any(cls.__name__ == "BaseTunerLayer" for cls in type(module).__mro__):
            found.update(dict.fromkeys(module.parameters(), _ADAPTER))
            found.update({p: _ADAPTED for p in base.parameters() if not p.requires_grad})
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if _LORA.intersection([*name.split("."), parameter_name]):
                found[parameter] = _ADAPTER
    return found
