"""Time a whole model dense, with every possible layer sparse, and with the chosen ones, in turn."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from prox24_lightning.convert.benchmark.alternating import LayerSets, peak_bytes, time_alternating
from prox24_lightning.convert.benchmark.report import ModelVariant, Report
from prox24_lightning.convert.benchmark.settings import ExampleInputs, Settings
from prox24_lightning.convert.convert import convert_dense_fp8, convert_model, expand_model
from prox24_lightning.convert.eligibility import named_layers
from prox24_lightning.convert.layers.semi_structured_linear import SemiStructuredLinear
from prox24_lightning.convert.measurement import relative_error, release_memory
from prox24_lightning.utils.errors import describe
from prox24_lightning.utils.module_copy import bare_copy, move_inputs
from prox24_lightning.utils.tensors import tensors_in


def time_model(
    report: Report,
    model: nn.Module,
    inputs: ExampleInputs,
    settings: Settings,
    device: torch.device,
    shared: Sequence[object],
) -> Report:
    """Add the model's times to the report: dense, with every measured layer sparse, with the chosen ones sparse."""
    scope = f"{inputs.module_name}." if inputs.module_name else ""
    measured = [name for shape in report.shapes if shape.tokens for name in shape.layers]
    in_fp8 = {name.removeprefix(scope) for name in report.dense_fp8_names if name.startswith(scope)}
    chosen = [name for shape in report.shapes if shape.sparse or shape.dense_fp8 for name in shape.layers]
    inside = [name.removeprefix(scope) for name in measured if name.startswith(scope)]
    kept = [name.removeprefix(scope) for name in chosen if name.startswith(scope)]
    if not inside:
        return report
    variants: list[ModelVariant] = []
    try:
        part = dict(named_layers(model))[inputs.module_name]
        args, kwargs = move_inputs((inputs.args, dict(inputs.kwargs)), device=device, dtype=settings.dtype)

        def copied() -> tuple[nn.Module, Callable[[], Any]]:
            module = bare_copy(part, device=device, dtype=settings.dtype, shared=shared)
            return module, lambda: module(*args, **kwargs)

        with suppress(torch.OutOfMemoryError):
            variants = _time_in_turn(*copied(), inside, kept, in_fp8, settings)
        if not variants:
            release_memory()
            variants = _time_one_by_one(*copied(), inside, kept, in_fp8, settings)
            report = report.with_note(
                "Whole model: dense and sparse layers did not fit into memory together, so the variants were timed one "
                "after the other; a machine whose speed drifts shows in x."
            )
    except Exception as error:
        report = report.with_note(f"Whole model not timed: {describe(error)}")
    report = replace(report, model=tuple(variants), model_scope=inputs.module_name)
    if settings.only_if_faster and kept and len(variants) > 1:
        dense, last = (variant.median_us(settings.run_mode) for variant in (variants[0], variants[-1]))
        if dense is not None and last is not None and last > dense:
            why = f"the whole model is slower with it ({dense / last:.2f} x, {settings.run_mode}): stays dense"
            shapes = (
                replace(s, sparse=False, dense_fp8=False, decision=why) if s.sparse or s.dense_fp8 else s
                for s in report.shapes
            )
            report = replace(report, shapes=tuple(shapes))
    return report


def _time_in_turn(
    module: nn.Module,
    run: Callable[[], Any],
    inside: Sequence[str],
    kept: Sequence[str],
    in_fp8: Collection[str],
    settings: Settings,
) -> list[ModelVariant]:
    reference = [leaf.clone() for leaf in _floats(run())]
    dense = {name: layer for name, layer in named_layers(module) if name in set(inside)}
    convert_model(module, inside, keep_dense=settings.keep_dense, weights=settings.weights)
    sparse = {name: layer for name, layer in named_layers(module) if name in set(inside)}
    sets = {"dense": dense, "all_sparse": sparse}
    if kept and (len(kept) < len(inside) or in_fp8):
        fp8 = {name: convert_dense_fp8(dense[name], name=name) for name in inside if name in in_fp8}
        sets["chosen"] = {name: fp8.get(name, (sparse if name in set(kept) else dense)[name]) for name in inside}
    return _time_variants(LayerSets(module, sets), sets, run, settings, reference)


def _time_one_by_one(
    module: nn.Module,
    run: Callable[[], Any],
    inside: Sequence[str],
    kept: Sequence[str],
    in_fp8: Collection[str],
    settings: Settings,
) -> list[ModelVariant]:
    """Time the variants without ever keeping a layer in two forms."""
    reference = [leaf.clone() for leaf in _floats(run())]

    def timed(name: str) -> list[ModelVariant]:
        return _time_variants(LayerSets(module, {name: {}}), [name], run, settings, reference)

    variants = timed("dense")
    convert_model(module, inside, keep_dense=settings.keep_dense, weights=settings.weights)
    variants += timed("all_sparse")
    if kept and (len(kept) < len(inside) or in_fp8):
        expand_model(module, [name for name in inside if name not in kept or name in in_fp8])
        convert_model(module, sorted(in_fp8), weights=settings.weights, dense_fp8=in_fp8)
        variants += timed("chosen")
    return variants


def _time_variants(
    layers: LayerSets, names: Iterable[str], run: Callable[[], Any], settings: Settings, reference: Sequence[Tensor]
) -> list[ModelVariant]:
    peaks, errors, counts = {}, {}, {}
    for name in names:
        layers.use(name)
        _, peaks[name] = peak_bytes(layers.model, lambda: run)
        errors[name] = relative_error(reference, _floats(run()))
        counts[name] = [type(module) for module in layers.model.modules()].count(SemiStructuredLinear)
    times = time_alternating(dict.fromkeys(names, run), layers.use, settings.rounds)
    return [
        ModelVariant(name, counts[name], found.eager, found.graph, found.graph_problem, peaks[name], errors[name])
        for name, found in times.items()
    ]


def _floats(outputs: Any) -> list[Tensor]:
    found = [tensor for tensor in tensors_in(outputs) if tensor.is_floating_point()]
    if not found:
        raise ValueError(f"the model returned {type(outputs).__name__} without a floating-point tensor to compare")
    return found
