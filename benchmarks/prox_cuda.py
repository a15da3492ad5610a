"""The CUDA half of benchmarks/prox.py: the kernel against copying, the batched path and the published operator."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from alternating import alternating_minimisation
from safetensors.torch import load_file
from torch import Tensor

from prox24_lightning.prox import critical_strength_24, prox_24, prox_path, settle_24
from prox24_lightning.prox.batched import prox_24_batched

CHECKED = 1 << 22
"""Groups whose objective is compared with that of the batched path in float64."""

REPEATED = 10
"""Calls in one CUDA graph: the time of a call is then the device's, not that of the host's launches."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """What is measured: the main table at ``size`` x ``size``, then other sizes and real weights by the kernel only."""

    size: int
    numels: Sequence[int]
    strengths: Sequence[float]
    few: Sequence[float]
    sweeps: Sequence[int]
    weights: Path | None


def rows(plan: Plan) -> Iterator[Row]:
    """A row for each matrix, dtype and strength, those first that the bars are about."""
    device = torch.device("cuda")
    gaussian = torch.randn(plan.size, plan.size, device=device, generator=torch.Generator(device).manual_seed(0))
    for dtype in (torch.float32, torch.bfloat16):
        weight = gaussian.to(dtype)
        copy = _copy_ms(weight)
        for strength in plan.strengths:
            yield _row("Gaussian", weight, strength, copy, slow=plan.sweeps if strength in plan.few else ())
    del gaussian
    if plan.weights is not None:
        real = _unit_rows(load_file(plan.weights), device)
        for dtype in (torch.float32, torch.bfloat16):
            weight = real.to(dtype)
            copy = _copy_ms(weight)
            for strength in plan.few:
                yield _row(plan.weights.stem, weight, strength, copy)
    for numel in plan.numels:
        weight = torch.randn(numel // 1024, 1024, device=device, generator=torch.Generator(device).manual_seed(0))
        copy = _copy_ms(weight)
        for strength in plan.few:
            yield _row("Gaussian", weight, strength, copy)


def _unit_rows(tensors: Mapping[str, Tensor], device: torch.device) -> Tensor:
    """All weights as one matrix of rms one each, so that strengths compare with those of Gaussian weights."""
    parts = [tensor.to(device).float().flatten() for tensor in tensors.values()]
    return torch.cat([part / part.square().mean().sqrt() for part in parts]).reshape(-1, 64)


def _row(source: str, weight: Tensor, strength: float, copy: float, *, slow: Sequence[int] = ()) -> Row:
    lam = torch.tensor(strength, device=weight.device)
    out = torch.full_like(weight, torch.nan)
    kernel = graph_ms(lambda: prox_24(weight, lam, out=out))
    sparse = float((out.view(-1, 4) != 0).sum(-1).le(2).float().mean())
    row: Row = {
        "weights": source,
        "entries": weight.numel(),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "strength": strength,
        "groups 2:4": sparse,
        "path": prox_path(weight),
        "copy ms": copy,
        "kernel ms": kernel,
        "of copy": f"{copy / kernel:.0%}",
        "suboptimal": _suboptimal(_kernel_on_groups, weight, strength),
        "extra memory, in place": _extra_memory(out, lam),
        "dim 0 ms": None,
        "settle ms": None,
        "critical ms": None,
        "batched ms": None,
        "alternating ms": None,
        "times faster": None,
        "suboptimal, alternating": None,
    }
    if slow:
        row["dim 0 ms"] = graph_ms(lambda: prox_24(weight, lam, dim=0, out=out))
        row["settle ms"] = graph_ms(lambda: settle_24(weight, lam, out=out))
        row["critical ms"] = _once_ms(lambda: critical_strength_24(weight))
        row["batched ms"] = _once_ms(lambda: prox_24_batched(weight, lam))
        groups = weight.view(-1, 4)
        row["alternating ms"] = _once_ms(lambda: alternating_minimisation(groups.float(), strength))
        row["times faster"] = round(row["alternating ms"] / kernel)
        row["suboptimal, alternating"] = _suboptimal(alternating_minimisation, weight, strength)
    for sweeps in (24, 100):
        row[f"fused, {sweeps} sweeps, ms"] = _fused_ms(weight, lam, out, sweeps) if sweeps in slow else None
    return row


def _fused_ms(weight: Tensor, lam: Tensor, out: Tensor, sweeps: int) -> float:
    from alternating_triton import alternating_triton  # triton is imported only on a GPU

    return graph_ms(lambda: alternating_triton(weight, lam, out, sweeps=sweeps))


def _copy_ms(weight: Tensor) -> float:
    out = torch.empty_like(weight)
    return graph_ms(lambda: out.copy_(weight))


def graph_ms(call: Callable[[], Any], replays: int = 3) -> float:
    """Milliseconds of the device for one call: the median over replays of a CUDA graph of :data:`REPEATED`."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(REPEATED):
            call()
    graph.replay()
    return statistics.median(_timed(graph.replay) for _ in range(replays)) / REPEATED


def _once_ms(call: Callable[[], Any]) -> float:
    call()
    return _timed(call)


def _timed(call: Callable[[], Any]) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def _suboptimal(operator: Callable[[Tensor, float], Tensor], weight: Tensor, strength: float) -> float:
    """Share of groups whose objective is above the least by more than 1e-6 of it, before rounding to the dtype."""
    groups = weight.reshape(-1, 4)[:CHECKED]
    found = operator(groups.float(), strength)
    exact = float(torch.tensor(strength))
    least = _objective(prox_24_batched(groups.double(), exact), groups, exact)
    return float((_objective(found, groups, exact) > least * (1 + 1e-6)).double().mean())


def _kernel_on_groups(groups: Tensor, strength: float) -> Tensor:
    return prox_24(groups.reshape(-1, 64), strength).reshape(-1, 4)  # the same kernel as for wide rows


def _extra_memory(weight: Tensor, lam: Tensor) -> float:
    """Peak of what a prox in place allocates, in units of the weight."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    prox_24(weight, lam, out=weight)
    return (torch.cuda.max_memory_allocated() - before) / (weight.numel() * weight.element_size())


def _objective(w: Tensor, y: Tensor, strength: float) -> Tensor:
    a, b, c, d = w.double().abs().unbind(-1)
    return ((w.double() - y.double()) ** 2).sum(-1) / 2 + strength * (a * b * (c + d) + c * d * (a + b))


def plot(table: Sequence[Row], path: Path) -> None:
    """Time over that of a copy against the strength, for the matrix of the main table."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    main = [row for row in table if row["entries"] == table[0]["entries"] and row["weights"] == table[0]["weights"]]
    for dtype in dict.fromkeys(row["dtype"] for row in main):
        mine = [row for row in main if row["dtype"] == dtype]
        strengths = [row["strength"] for row in mine]
        axes.plot(strengths, [row["kernel ms"] / row["copy ms"] for row in mine], "o-", label=f"kernel, {dtype}")
        for name in ("fused, 24 sweeps, ms", "fused, 100 sweeps, ms", "alternating ms"):
            some = [row for row in mine if row[name] is not None]
            times = [row[name] / row["copy ms"] for row in some]
            axes.plot([row["strength"] for row in some], times, "x--", label=f"{name.removesuffix(' ms')}, {dtype}")
    axes.set(xscale="log", yscale="log", xlabel="strength x rms of the weights", ylabel="time over that of a copy")
    axes.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
