"""Time a causal language model of transformers dense and converted: prefill, decode, memory, logits, perplexity."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from prox24_lightning.convert.benchmark.alternating import LayerSets, module_bytes, peak_bytes, time_alternating
from prox24_lightning.convert.benchmark.language_report import LanguageReport, LanguageVariant, PhaseResult, Workload
from prox24_lightning.convert.benchmark.settings import Settings
from prox24_lightning.convert.convert import convert_model, insert_layers
from prox24_lightning.convert.eligibility import named_layers
from prox24_lightning.convert.layers.semi_structured_linear import SemiStructuredLinear
from prox24_lightning.convert.measurement import relative_error, release_memory
from prox24_lightning.utils.long_work import between_pieces
from prox24_lightning.utils.module_copy import bare_copy
from prox24_lightning.weights.layer_matrix import is_transposed_linear

_COMPARED = (1, 64)
"""Sequences and tokens of the logits that are compared."""


@torch.no_grad()
def time_language_model(
    model: nn.Module,
    names: Sequence[str],
    workloads: Sequence[Workload],
    settings: Settings,
    device: torch.device,
    *,
    score: Callable[[nn.Module], float] | None = None,
    text: str | None = None,
    dense_fp8: Collection[str] = (),
    keep: Callable[[LanguageReport], None] = lambda report: None,
) -> LanguageReport:
    """Convert a copy of ``model`` on the GPU, and time it with its dense and its converted layers in turn.

    Args:
        model: callable as ``model(input_ids, past_key_values=..., use_cache=True)``; unchanged.
        names: the layers to convert.
        workloads: what is timed.
        settings: dtype, form, rounds and whether the dense weights are kept.
        device: a CUDA GPU, the current one.
        score: function that returns the perplexity of a model; None for none.
        text: name of the text, for the report.
        dense_fp8: those of ``names`` that become dense in float8.
        keep: called with what has been measured so far, after each workload that both forms are timed at.

    Raises:
        ValueError: for a model that keeps no cache of layers.
    """
    between_pieces("language model: memory, logits and perplexity, dense and converted")
    copied = bare_copy(model, device=device, dtype=settings.dtype)
    chosen = set(names)
    largest = max(layer.get_parameter("weight").nbytes for name, layer in named_layers(copied) if name in chosen)
    vocabulary = copied.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    generator = torch.Generator(device=device).manual_seed(0)
    batch, length = max(w.batch for w in workloads), max(w.length for w in workloads)
    size = max(batch, _COMPARED[0]), max(length, _COMPARED[1])
    ids = torch.randint(vocabulary, size, generator=generator, device=device)
    reference = _logits(copied, ids)

    def variant(name: str, count: int) -> LanguageVariant:
        layers = dict(named_layers(copied))
        return LanguageVariant(
            name,
            count,
            linear_work(copied)[0],
            sum(_linear_bytes(layers[layer]) for layer in names),
            (),
            relative_error(reference, _logits(copied, ids)),
            None if score is None else score(copied),
        )

    dense = variant("dense", 0)
    release_memory()
    # Of the tensors themselves: what is allocated by now includes the libraries' workspaces.
    dense_bytes = module_bytes(copied)
    allocated = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats()
    start = perf_counter()
    convert_model(copied, names, keep_dense=settings.keep_dense, weights=settings.weights, dense_fp8=dense_fp8)
    torch.cuda.synchronize()
    seconds = perf_counter() - start
    peak = torch.cuda.max_memory_allocated() - allocated + dense_bytes
    converted = variant("converted", len(names) - len(dense_fp8))
    source = dict(named_layers(model))

    def report(phases: Mapping[str, tuple[PhaseResult, ...]], in_turn: bool) -> LanguageReport:
        variants = replace(dense, phases=phases["dense"]), replace(converted, phases=phases["converted"])
        return LanguageReport(dense_bytes, largest, peak, seconds, text, variants, in_turn)

    phases: dict[str, tuple[PhaseResult, ...]] | None = None
    with suppress(torch.OutOfMemoryError):
        dense_layers = {name: bare_copy(source[name], device=device, dtype=settings.dtype) for name in names}
        phases = _time_in_turn(
            copied, dense_layers, workloads, ids, settings, lambda measured: keep(report(measured, in_turn=True))
        )
    dense_layers = {}
    in_turn = phases is not None
    if phases is None:
        release_memory()
        phases = _time_one_by_one(copied, source, names, workloads, ids, settings)
    return report(phases, in_turn)


class DecodeStep:
    """A call that computes the logits of one more token for each sequence of ``prompt``, the same at every call.

    Every call begins with the key-value cache of the prompt: the layers of the cache are copied as objects, which costs
    no GPU work, because those of transformers replace their tensors instead of writing into them.

    Raises:
        ValueError: if the model returns no cache of layers.
    """

    @torch.no_grad()
    def __init__(self, model: Any, prompt: Tensor) -> None:
        self._model = model
        self._token = prompt[:, -1:].clone()
        self._cache = model(prompt, use_cache=True, **_last_logits_only(model)).past_key_values
        if not hasattr(self._cache, "layers"):
            raise ValueError(
                f"{type(model).__name__} keeps a {type(self._cache).__name__}, which has no layers to keep"
            )

    @property
    def cache_bytes(self) -> int:
        """Bytes of the keys and values, which every step reads."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self._cache.layers)

    def __call__(self) -> Tensor:
        fresh = copy.copy(self._cache)
        fresh.layers = [copy.copy(layer) for layer in self._cache.layers]
        return self._model(self._token, past_key_values=fresh, use_cache=True).logits


def prefill_call(model: Any, prompt: Tensor) -> Callable[[], Tensor]:
    """Return a call that reads ``prompt`` into a new key-value cache and computes the logits of its last token."""
    options = _last_logits_only(model)
    return lambda: model(prompt, use_cache=True, **options).logits


def linear_work(model: nn.Module) -> tuple[int, int]:
    """Return the bytes of the weights of all linear layers as stored, and the number of dense weights."""
    layers = [layer for _, layer in named_layers(model)]
    weights = 0
    for layer in layers:
        if isinstance(layer, SemiStructuredLinear):
            weights += layer.out_features * layer.in_features
        elif isinstance(layer, nn.Linear) or is_transposed_linear(layer):
            weights += layer.get_parameter("weight").numel()
    return sum(map(_linear_bytes, layers)), weights


def linear_operations(model: Any, workload: Workload) -> int:
    """Return the multiplications and additions of all linear layers in one call.

    In prefill a head that computes the last logits alone multiplies one token a sequence.
    """
    skipped = 0
    if workload.phase == "prefill" and _last_logits_only(model):
        head = model.get_output_embeddings()
        skipped = 0 if head is None else linear_work(head)[1] * (workload.tokens - workload.batch)
    return 2 * (linear_work(model)[1] * workload.tokens - skipped)


def _linear_bytes(layer: nn.Module) -> int:
    if isinstance(layer, SemiStructuredLinear):
        return layer.stored_bytes
    matrix = isinstance(layer, nn.Linear) or is_transposed_linear(layer)
    return layer.get_parameter("weight").nbytes if matrix else 0


def _last_logits_only(model: Any) -> dict[str, int]:
    """Return the options for the last logits alone, as in generation: those of a long prompt may exceed the model."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


def _logits(model: Any, ids: Tensor) -> Tensor:
    return model(ids[: _COMPARED[0], : _COMPARED[1]], use_cache=False).logits.float()


def _time_in_turn(
    converted: nn.Module,
    dense_layers: Mapping[str, nn.Module],
    workloads: Sequence[Workload],
    ids: Tensor,
    settings: Settings,
    keep: Callable[[dict[str, tuple[PhaseResult, ...]]], None],
) -> dict[str, tuple[PhaseResult, ...]]:
    sparse_layers = {name: layer for name, layer in named_layers(converted) if name in dense_layers}
    layers = LayerSets(converted, {"dense": dense_layers, "converted": sparse_layers})
    phases: dict[str, tuple[PhaseResult, ...]] = {"dense": (), "converted": ()}
    try:
        for workload in workloads:
            found = _time(layers, ("dense", "converted"), ids, workload, settings)
            phases = {name: (*measured, found[name]) for name, measured in phases.items()}
            keep(phases)
    finally:
        layers.use("converted")
    return phases


def _time_one_by_one(
    converted: nn.Module,
    source: Mapping[str, nn.Module],
    names: Sequence[str],
    workloads: Sequence[Workload],
    ids: Tensor,
    settings: Settings,
) -> dict[str, tuple[PhaseResult, ...]]:
    """Time the converted model, then the dense one, without ever keeping a layer in both forms."""

    def timed(name: str) -> tuple[PhaseResult, ...]:
        layers = LayerSets(converted, {name: {}})
        return tuple(_time(layers, [name], ids, workload, settings)[name] for workload in workloads)

    phases = {"converted": timed("converted")}
    dense = ((name, bare_copy(source[name], device=ids.device, dtype=settings.dtype)) for name in names)
    insert_layers(converted, dense)
    return {**phases, "dense": timed("dense")}


def _time(
    layers: LayerSets, variants: Sequence[str], ids: Tensor, workload: Workload, settings: Settings
) -> dict[str, PhaseResult]:
    between_pieces(f"{workload.phase}, {workload.batch} x {workload.length} tokens")
    model = layers.model
    prompt = ids[: workload.batch, : workload.length].contiguous()

    def make() -> Callable[[], Tensor]:
        return DecodeStep(model, prompt) if workload.phase == "decode" else prefill_call(model, prompt)

    calls: dict[str, Callable[[], Tensor]] = {}
    peaks, moved, work = {}, {}, {}
    for name in variants:
        layers.use(name)
        calls[name], peaks[name] = peak_bytes(model, make)
        call = calls[name]
        moved[name] = linear_work(model)[0] + (call.cache_bytes if isinstance(call, DecodeStep) else 0)
        work[name] = linear_operations(model, workload)
    times = time_alternating(calls, layers.use, settings.rounds)
    return {
        name: PhaseResult(workload, found.eager, found.graph, found.graph_problem, peaks[name], moved[name], work[name])
        for name, found in times.items()
    }
