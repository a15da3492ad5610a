"""Time a model dense against 2:4, decide layer by layer what becomes sparse, and report both.

Dense and sparse run alternately in one process, on the same inputs and in the same dtype. A layer that would be slower
stays dense.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone

import torch
from torch import nn

from prox24_lightning.convert.benchmark.chip_limits import measure_limits
from prox24_lightning.convert.benchmark.recommend import compare_forms, recommendation
from prox24_lightning.convert.benchmark.report import LayerOutcome, Report, ShapeResult
from prox24_lightning.convert.benchmark.settings import ExampleInputs, Settings
from prox24_lightning.convert.benchmark.time_layers import time_shapes
from prox24_lightning.convert.benchmark.time_model import time_model
from prox24_lightning.convert.eligibility import LayerVerdict, State, Target, check_model, find_target
from prox24_lightning.convert.form_choice import form_problem
from prox24_lightning.utils.errors import describe


def run_benchmark(
    model: nn.Module,
    settings: Settings,
    *,
    device: torch.device | None = None,
    inputs: ExampleInputs | None = None,
    reasons: Mapping[str, str] | None = None,
    shared: Sequence[object] = (),
    keep: Callable[[Report], None] = lambda report: None,
) -> Report:
    """Check every layer, time those that can run sparse, then the whole model; ``model`` itself is not changed.

    Args:
        model: on any device, in any floating dtype.
        settings: see :class:`Settings`.
        device: a CUDA GPU; None takes the current one. Without one the layers are checked and nothing is timed.
        inputs: for the whole model; None times layers only.
        reasons: layer name -> what is added to the reasons of a layer that is not 2:4.
        shared: see :func:`~prox24_lightning.utils.module_copy.bare_copy`.
        keep: called with what has been measured so far, after each shape of layers.

    A layer that cannot be measured (out of memory, say) stays dense with the error as its reason; so does the whole
    model's part of the report.

    Raises:
        ValueError: if the GPU does not multiply the form of the settings.
    """
    on_gpu = device is None or device.type == "cuda"
    target = find_target(device) if on_gpu else None
    if target is not None and (problem := form_problem(settings.form, target)) is not None:
        raise ValueError(problem)
    verdicts = check_model(model, dtype=settings.dtype, target=target)
    report = empty_report(settings, target)
    if target is None or not any(verdict.runs for verdict in verdicts):
        return replace(report, layers=_outcomes(verdicts, (), reasons or {}))
    with torch.cuda.device(device), torch.no_grad():
        here = torch.device("cuda", torch.cuda.current_device())
        try:
            report = replace(report, limits=measure_limits(settings.dtype, here))
        except RuntimeError as error:  # out of memory, which says nothing about the layers
            report = report.with_note(f"The chip's limits were not measured: {describe(error)}")
        fp8 = form_problem("fp8_e4m3", target) is None
        runs = [verdict for verdict in verdicts if verdict.runs]

        def with_shapes(shapes: tuple[ShapeResult, ...]) -> Report:
            return replace(report, shapes=shapes, layers=_outcomes(verdicts, shapes, reasons or {}))

        shapes = time_shapes(model, runs, settings, here, fp8=fp8, keep=lambda measured: keep(with_shapes(measured)))
        report = replace(report, shapes=shapes)
        if inputs is not None:
            report = time_model(report, model, inputs, settings, here, shared)
    report = replace(report, layers=_outcomes(verdicts, report.shapes, reasons or {}))
    advice = recommendation(compare_forms(report.shapes, settings.form), settings.max_error)
    report = replace(report, recommendation=advice)
    return report.with_note(note) if (note := _other_run_mode(report)) else report


def _other_run_mode(report: Report) -> str | None:
    """Say which shapes the other way of running would decide otherwise, and what to do about it."""
    graph = report.run_mode == "graph"
    differing = []
    for shape in report.shapes:
        if graph:
            counts = [r.tokens for r in shape.tokens if shape.sparse and (r.speedup("eager") or 1) < 1]
        else:
            counts = [r.tokens for r in shape.tokens if not shape.sparse and (r.speedup("graph") or 0) > 1]
        if counts:
            differing.append(f"{shape.title} at {', '.join(map(str, counts))} tokens")
    if not differing:
        return None
    shapes = "; ".join(differing)
    if graph:
        return (
            f"Called one by one (eager), the host's work makes sparse slower than dense for {shapes}: run the model "
            "from CUDA graphs (vLLM, or prox24_lightning.accelerate_generation), or decide with run_mode='eager'."
        )
    return (
        f"Replayed from a CUDA graph, sparse wins for {shapes}: measure with these token counts only and "
        "run_mode='graph' if that is how the model is served."
    )


def empty_report(settings: Settings, target: Target | None = None) -> Report:
    """Return a report without results."""
    return Report(
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        machine=_machine(target),
        dtype=str(settings.dtype).removeprefix("torch."),
        run_mode=settings.run_mode,
        token_counts=settings.token_counts,
        only_if_faster=settings.only_if_faster,
        weights=settings.form,
        max_error=settings.max_error,
    )


def _outcomes(
    verdicts: Sequence[LayerVerdict], shapes: Sequence[ShapeResult], reasons: Mapping[str, str]
) -> tuple[LayerOutcome, ...]:
    decided = {name: shape for shape in shapes for name in shape.layers}
    outcomes = []
    for verdict in verdicts:
        shape = decided.get(verdict.name)
        why = verdict.why if shape is None else shape.decision
        if verdict.name in reasons and not verdict.fits:
            why = f"{why}; {reasons[verdict.name]}"
        if verdict.note:
            why = f"{why} ({verdict.note})"
        state: State = "dense"
        if shape is None:
            state = "fits" if verdict.fits else "dense"
        elif shape.sparse:
            state = "sparse"
        outcomes.append(LayerOutcome(verdict.name, verdict.kind, verdict.shape, state, why))
    return tuple(outcomes)


def _machine(target: Target | None) -> dict[str, str]:
    software = {"torch": str(torch.__version__), "python": platform.python_version()}
    if target is None:
        return {"GPU": "none in use", **software}
    version = torch.backends.cusparselt.version() if target.backend == "cusparselt" else None
    return {
        "GPU": target.name,
        "compute capability": f"{target.capability[0]}.{target.capability[1]}",
        "backend": f"{target.backend} {version or ''}".strip(),
        "CUDA": str(torch.version.cuda),
        **software,
    }
