"""Time a whole model dense, with every possible layer sparse, and with the chosen ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from prox24_lightning.convert.benchmark.report import ModelVariant, Report
from prox24_lightning.convert.benchmark.settings import ExampleInputs, Settings
from prox24_lightning.convert.convert import convert_model, expand_model
from prox24_lightning.convert.eligibility import named_layers
from prox24_lightning.convert.measurement import Timing, relative_error, release_memory, time_calls
from prox24_lightning.utils.cuda_graphs import capture
from prox24_lightning.utils.errors import describe
from prox24_lightning.utils.module_copy import bare_copy, move_inputs


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
    chosen = [name for shape in report.shapes if shape.sparse for name in shape.layers]
    inside = [name.removeprefix(scope) for name in measured if name.startswith(scope)]
    kept = [name.removeprefix(scope) for name in chosen if name.startswith(scope)]
    if not inside:
        return report
    variants: list[ModelVariant] = []
    try:
        part = dict(named_layers(model))[inputs.module_name]
        before = torch.cuda.memory_allocated(device)
        copied = bare_copy(part, device=device, dtype=settings.dtype, shared=shared)
        args, kwargs = move_inputs((inputs.args, dict(inputs.kwargs)), device=device, dtype=settings.dtype)

        def run() -> Any:
            return copied(*args, **kwargs)

        reference = [leaf.clone() for leaf in _floats(run())]
        variants.append(_variant("dense", 0, run, settings, before, reference))
        convert_model(copied, inside, keep_dense=settings.keep_dense)
        variants.append(_variant("all_sparse", len(inside), run, settings, before, reference))
        if kept and len(kept) < len(inside):
            expand_model(copied, [name for name in inside if name not in kept])
            variants.append(_variant("chosen", len(kept), run, settings, before, reference))
    except Exception as error:
        report = report.with_note(f"Whole model not timed: {describe(error)}")
    report = replace(report, model=tuple(variants), model_scope=inputs.module_name)
    if settings.only_if_faster and kept and len(variants) > 1:
        dense, last = (variant.median_us(settings.run_mode) for variant in (variants[0], variants[-1]))
        if dense is not None and last is not None and last > dense:
            why = f"the whole model is slower with it ({dense / last:.2f} x, {settings.run_mode}): stays dense"
            shapes = tuple(replace(s, sparse=False, decision=why) if s.sparse else s for s in report.shapes)
            report = replace(report, shapes=shapes)
    return report


def _variant(
    name: str, layers: int, run: Callable[[], Any], settings: Settings, before: int, reference: Sequence[Tensor]
) -> ModelVariant:
    release_memory()
    torch.cuda.reset_peak_memory_stats()
    outputs = _floats(run())
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    error = relative_error(reference, outputs)
    eager = time_calls({name: run}, rounds=settings.rounds)[name]
    graph: Timing | None = None
    problem: str | None = None
    try:
        graph = time_calls({name: capture(run).replay}, rounds=settings.rounds)[name]
    except Exception as failure:  # whatever a model does on the host can end the capture
        problem = describe(failure)
    return ModelVariant(name, layers, eager, graph, problem, peak, error)


def _floats(outputs: Any) -> list[Tensor]:
    found = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    if not found:
        raise ValueError(f"the model returned {type(outputs).__name__} without a floating-point tensor to compare")
    return found
