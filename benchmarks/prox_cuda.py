"""The CUDA half of benchmarks/prox.py: the kernel against copying, the batched path and the published operator."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from alternating import alternating_minimisation
from torch import Tensor

from prox24_lightning.prox import critical_strength_24, prox_24, prox_path
from prox24_lightning.prox.batched import prox_24_batched

CHECKED = 1 << 22
"""Groups whose objective is compared with that of the batched path in float64."""


def rows(sizes: Sequence[int], strengths: Sequence[float], repeats: int, sweeps: int) -> list[dict[str, Any]]:
    """One row for every size, dtype and strength: milliseconds, share of copy bandwidth, exactness, extra memory."""
    table = []
    for size in sizes:
        for dtype in (torch.float32, torch.bfloat16):
            weight = torch.randn(size, size, device="cuda", generator=torch.Generator("cuda").manual_seed(0)).to(dtype)
            out = torch.empty_like(weight)
            copy = _milliseconds(lambda w=weight, o=out: o.copy_(w), repeats)
            critical = _milliseconds(lambda w=weight: critical_strength_24(w), 3)
            for strength in strengths:
                table.append(_row(weight, out, strength, copy, critical, repeats, sweeps))
    return table


def _row(
    weight: Tensor, out: Tensor, strength: float, copy: float, critical: float, repeats: int, sweeps: int
) -> dict[str, Any]:
    lam = torch.tensor(strength, device="cuda")
    kernel = _milliseconds(lambda: prox_24(weight, lam, out=out), repeats)
    column = _milliseconds(lambda: prox_24(weight, lam, dim=0, out=out), repeats)
    batched = _milliseconds(lambda: prox_24_batched(weight, lam), 3)
    groups = weight.view(-1, 4)
    published = _milliseconds(lambda: alternating_minimisation(groups.float(), strength, sweeps=sweeps), 1)
    prox_24(weight, lam, out=out)
    sample, result = groups[:CHECKED].double(), out.view(-1, 4)[:CHECKED]
    least = _objective(prox_24_batched(sample, strength), sample, strength)
    if weight.dtype != torch.float32:  # what rounding the answer to the dtype costs is not the solver's
        result = prox_24(groups[:CHECKED].float(), lam)
    suboptimal = float((_objective(result, sample, strength) > least * (1 + 1e-6)).double().mean())
    sparse = float((out.view(-1, 4) != 0).sum(-1).le(2).float().mean())
    mine = alternating_minimisation(groups[:CHECKED].float(), strength, sweeps=sweeps)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    prox_24(out, lam, out=out)
    extra = (torch.cuda.max_memory_allocated() - before) / (out.numel() * out.element_size())
    return {
        "size": weight.shape[0],
        "dtype": str(weight.dtype).removeprefix("torch."),
        "strength": strength,
        "groups 2:4": sparse,
        "path": prox_path(weight),
        "copy ms": copy,
        "kernel ms": kernel,
        "of copy": f"{copy / kernel:.0%}",
        "dim 0 ms": column,
        "critical ms": critical,
        "batched ms": batched,
        f"alternating {sweeps} ms": published,
        "ratio": round(published / kernel),
        "suboptimal": suboptimal,
        "suboptimal, alternating": float((_objective(mine, sample, strength) > least * (1 + 1e-6)).double().mean()),
        "extra memory, in place": extra,
    }


def _milliseconds(call: Callable[[], Any], repeats: int) -> float:
    call()
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def _objective(w: Tensor, y: Tensor, strength: float) -> Tensor:
    a, b, c, d = w.double().abs().unbind(-1)
    return ((w.double() - y) ** 2).sum(-1) / 2 + strength * (a * b * (c + d) + c * d * (a + b))
