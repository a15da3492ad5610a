"""Report which layers of a model can run on sparse tensor cores, why others cannot, and the gain; no GPU is needed.

A gain is *expected* only where it was measured on this machine. The *limit* assumes equally good dense and sparse
kernels: with few tokens a layer's time is that of reading its weight (a packed one has 0.5625 of the bytes in 16 bits),
with many that of multiplying (sparse tensor cores skip half). The whole model's gain is Amdahl's law over the weights
of all linear layers; attention, norms and the rest are left out, so the true gain is lower.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field

import torch
from torch import nn

from prox24_lightning.convert.autotune.kernel_table import SAME, TINY
from prox24_lightning.convert.eligibility import LayerVerdict, State, Target, check_model, named_layers
from prox24_lightning.convert.format.packed_weight import packed_bytes
from prox24_lightning.weights.experts import expert_parameters
from prox24_lightning.weights.selection import select_weights

FEW_TOKENS = 64
"""Up to here reading a weight takes longer than multiplying by it. A token costs one operation a byte in 16 bits; by
their data sheets, GPUs with sparse tensor cores do 76 (RTX 3090) to 400 (L4) in the time of reading one."""

Gain = Callable[[LayerVerdict, int], float | None]
"""(layer, tokens) -> dense time over sparse time, as measured on this machine; None where it was not measured."""


@dataclass(frozen=True)
class LayerDiagnosis:
    """One layer.

    Attributes:
        name, kind, shape: as in :class:`~prox24_lightning.convert.eligibility.LayerVerdict`.
        state: "sparse" (it can run sparse here), "fits" (it could on a suitable GPU), "dense".
        once_pruned: it stays dense for its values alone: 2:4, it would be "sparse" or "fits".
        why: why it stays dense, and notes; "" if there are none.
        share: share of the weights of all linear layers; 0 for other layers.
        expected: tokens -> measured gain, None where it was not measured; empty for a layer that stays dense.
        limit: tokens -> largest gain with equally good kernels; empty for a layer that stays dense.
        forms: form of 8 bits ("dense, float8" needs no 2:4) -> tokens -> measured gain; empty for a dense layer.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    state: State
    why: str
    share: float
    expected: dict[int, float | None]
    limit: dict[int, float]
    once_pruned: bool = False
    forms: dict[str, dict[int, float | None]] = field(default_factory=dict)


@dataclass(frozen=True)
class Potential:
    """What a model gains once the weights that Prox24 takes by default are 2:4, those that are so already included.

    Attributes:
        layers: how many run sparse then.
        share: of the weights of all linear layers.
        expected, limit: as in :class:`LayerDiagnosis`, of the whole model.
    """

    layers: int
    share: float
    expected: dict[int, float | None]
    limit: dict[int, float]


@dataclass(frozen=True)
class Diagnosis:
    """Result of :func:`diagnose`; ``sparse_share`` is the share of the linear weights that can be sparse.

    ``once_pruned`` is None where pruning adds no layer; ``on_gpu`` says whether this machine's GPU runs sparse layers.
    ``forms`` holds the gain of all these layers together in each form of 8 bits, None where not all were measured.
    """

    machine: dict[str, str]
    dtype: str
    token_counts: tuple[int, ...]
    layers: tuple[LayerDiagnosis, ...]
    sparse_share: float
    expected: dict[int, float | None]
    limit: dict[int, float]
    notes: tuple[str, ...]
    once_pruned: Potential | None = None
    on_gpu: bool = False
    forms: dict[str, dict[int, float | None]] = field(default_factory=dict)

    @property
    def able(self) -> tuple[LayerDiagnosis, ...]:
        """The layers that can run sparse: here, or without a GPU here on a suitable one."""
        return tuple(layer for layer in self.layers if layer.state != "dense")

    def to_json(self) -> str:
        """Return everything as strict JSON."""
        return json.dumps(asdict(self), indent=2, allow_nan=False) + "\n"


def diagnose(
    model: nn.Module,
    *,
    dtype: torch.dtype = torch.bfloat16,
    target: Target | None = None,
    token_counts: Sequence[int] = (1, 16, 64, 1024, 4096),
    gain: Gain | None = None,
    form_gains: Mapping[str, Gain] | None = None,
    machine: Mapping[str, str] | None = None,
) -> Diagnosis:
    """Check every layer of a model and estimate its gain.

    Args:
        model: any module, on any device; unchanged.
        dtype: what the weights would be cast to.
        target: the GPU, from :func:`~prox24_lightning.convert.eligibility.find_target`; None: cuSPARSELt's rules
            for a GPU with sparse tensor cores.
        token_counts: rows of a layer's input at which gains are given.
        gain: gains that were measured here; None: none were.
        form_gains: the same of forms of 8 bits, by name.
        machine: facts for the report.
    """
    verdicts = check_model(model, dtype=dtype, target=target)
    prunable = _prunable(model, verdicts, dtype, target)
    sizes = {verdict.name: math.prod(verdict.shape) for verdict in verdicts if verdict.role == "linear"}
    sizes |= {name: sum(p.numel() for p in held) for name, m in named_layers(model) if (held := expert_parameters(m))}
    whole = max(1, sum(sizes.values()))
    layers = []
    for verdict in verdicts:
        # Without a GPU a layer that fits lacks nothing but the GPU.
        state: State = "dense"
        if verdict.runs:
            state = "sparse"
        elif verdict.fits and target is None:
            state = "fits"
        once_pruned = state == "dense" and verdict.name in prunable
        counts = token_counts if once_pruned or state != "dense" else ()
        layers.append(
            LayerDiagnosis(
                verdict.name,
                verdict.kind,
                verdict.shape,
                state,
                "; ".join(part for part in (verdict.why, verdict.note) if part),
                sizes.get(verdict.name, 0) / whole,
                {tokens: gain(verdict, tokens) if gain else None for tokens in counts},
                {tokens: _limit(verdict.shape, dtype, tokens) for tokens in counts},
                once_pruned,
                {
                    form: {tokens: found(verdict, tokens) for tokens in counts}
                    for form, found in (form_gains or {}).items()
                    if counts
                },
            )
        )
    able_layers = [layer for layer in layers if layer.state != "dense"]
    now = _potential(able_layers, token_counts)
    more = [layer for layer in layers if layer.once_pruned]
    counted = [*able_layers, *more]
    forms = {
        form: _together(counted, {layer.name: layer.forms[form] for layer in counted}, token_counts)
        for form in form_gains or {}
    }
    return Diagnosis(
        dict(machine or {}),
        str(dtype).removeprefix("torch."),
        tuple(token_counts),
        tuple(layers),
        now.share,
        now.expected,
        now.limit,
        (*_notes(verdicts, target), *_slow_notes(able_layers), *_tiny_notes([*able_layers, *more])),
        _potential([*able_layers, *more], token_counts) if more else None,
        target is not None and target.problem is None,
        forms,
    )


def _prunable(
    model: nn.Module, verdicts: Sequence[LayerVerdict], dtype: torch.dtype, target: Target | None
) -> frozenset[str]:
    """Return the layers that Prox24 takes by default and that would run sparse, here or on a suitable GPU, if 2:4."""
    try:
        chosen = {weight.name.removesuffix(".weight") for weight in select_weights(model).chosen}
    except ValueError:  # weights without values, which say nothing
        return frozenset()
    dense = {verdict.name for verdict in verdicts if not verdict.fits}
    as_if = check_model(model, dtype=dtype, target=target, values=False)
    suits = {verdict.name for verdict in as_if if verdict.runs or (verdict.fits and target is None)}
    return frozenset(chosen & dense & suits)


def _potential(layers: Sequence[LayerDiagnosis], token_counts: Sequence[int]) -> Potential:
    expected = _together(layers, {layer.name: layer.expected for layer in layers}, token_counts)
    limits = {tokens: _amdahl(layers, {layer.name: layer.limit[tokens] for layer in layers}) for tokens in token_counts}
    return Potential(len(layers), sum(layer.share for layer in layers), expected, limits)


def _together(
    layers: Sequence[LayerDiagnosis], gains: Mapping[str, Mapping[int, float | None]], token_counts: Sequence[int]
) -> dict[int, float | None]:
    """Return the gain of all layers at each number of tokens; None where one of them was not measured."""
    found: dict[int, float | None] = {}
    for tokens in token_counts:
        known = {name: value for name, of_layer in gains.items() if (value := of_layer[tokens]) is not None}
        found[tokens] = _amdahl(layers, known) if known and len(known) == len(gains) else None
    return found


def _limit(shape: tuple[int, ...], dtype: torch.dtype, tokens: int) -> float:
    if tokens > FEW_TOKENS:
        return 2.0
    return math.prod(shape) * dtype.itemsize / packed_bytes(shape, dtype.itemsize)


def _amdahl(layers: Sequence[LayerDiagnosis], gains: Mapping[str, float]) -> float:
    """Return dense time over the new time, if each layer takes its share of the dense time (Amdahl's law)."""
    return 1 / (1 - sum(layer.share * (1 - 1 / gains[layer.name]) for layer in layers))


def _notes(verdicts: Sequence[LayerVerdict], target: Target | None) -> list[str]:
    notes = []
    if target is None:
        notes.append(
            "No CUDA GPU here: checked against the rules of cuSPARSELt, for a GPU of compute capability 8.0 or newer."
        )
    elif target.problem is not None:
        notes.append(f"Nothing runs sparse on this machine: {target.problem}.")
    if any(verdict.role == "convolution" for verdict in verdicts):
        notes.append(
            "Convolutions run dense in torch, zeros and all. TensorRT may use an ONNX export of the pruned model "
            "(torch.onnx.export keeps the zeros) if the groups lie along the input channels; "
            "prox24_lightning.convert.check_onnx says which nodes meet its rule. Whether TensorRT then takes its "
            "sparse kernels is its own choice, by its own timing: nothing is promised here."
        )
    return notes


def _tiny_notes(layers: Sequence[LayerDiagnosis]) -> list[str]:
    """Say that no gain is to be expected of tiny layers, whatever their limit, unless it was measured."""
    tiny = sum(math.prod(layer.shape) < TINY and None in layer.expected.values() for layer in layers)
    if not tiny:
        return []
    which = "All of these layers" if tiny == len(layers) else f"{tiny} of these {len(layers)} layers"
    return [
        f"{which} are too small to gain (less than {TINY:,} weights): starting a kernel takes longer than its work, "
        "dense or sparse."
    ]


def _slow_notes(layers: Sequence[LayerDiagnosis]) -> list[str]:
    slow = sum(any(value is not None and value < SAME for value in layer.expected.values()) for layer in layers)
    if not slow:
        return []
    return [
        f"{slow} layers would be slower at some of these numbers of tokens: conversion with these "
        "token_counts leaves them dense, unless the dense weights are kept as well (keep_dense)."
    ]
