"""Time, memory and exactness of the 2:4 prox against the published alternating minimisation, in one run.

    python benchmarks/prox.py --size 2048 --threads 2
    python benchmarks/prox.py --device cuda --size 8192 --few 0.1 1.0 --numels 1048576 16777216

Every method runs in turn on the same Gaussian matrix; the figure is the median of the repeats. A group counts as
suboptimal where its objective exceeds that of the float64 reference by more than 1e-6 of it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import prox_cuda
import torch
from alternating import alternating_minimisation
from result_files import result_path, write_result
from torch import Tensor

from prox24_lightning.prox import critical_strength_24, prox_24, prox_24_reference

CHECKED = 1 << 16
"""Groups that are compared with the reference."""

CUDA_NOTE = (
    "Gaussian weights of sigma 1, or real ones brought to rms 1 layer by layer: the strength is lambda * sigma. "
    "Times are the device's, from CUDA graphs of 10 calls (alternating minimisation with 100 sweeps in eager torch, "
    "the batched path and critical_strength_24: one call). The share of copy bandwidth is the time of copying the "
    "matrix over that of the kernel into another matrix. Suboptimal: share of up to 4.2M groups whose objective "
    "exceeds that of the batched path in float64 by more than 1e-6 of it, before rounding to the dtype."
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--size", type=int, default=2048, help="the matrix is size x size")
    parser.add_argument("--numels", type=int, nargs="*", default=[], help="cuda: numbers of entries of more matrices")
    parser.add_argument("--few", type=float, nargs="*", default=[], help="cuda: strengths that get the slow columns")
    parser.add_argument("--weights", type=Path, help="cuda: a safetensors file of real weights")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.03, 0.1, 0.3, 0.5, 1.0, 3.0, 30.0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sweeps", type=int, default=100, help="of the alternating minimisation")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.device == "cuda":
        plan = prox_cuda.Plan(
            arguments.size, arguments.numels, arguments.strengths, arguments.few, (24, 100), arguments.weights
        )
        table: list[dict[str, Any]] = []
        for row in prox_cuda.rows(plan):
            table.append(row)
            write_result(arguments.out, "prox/cuda", "The exact 2:4 prox on a GPU", table, note=CUDA_NOTE)
        prox_cuda.plot(table, result_path(arguments.out, "prox/cuda", ".png"))
        return

    size = arguments.size
    weight = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
    copy = _microseconds(lambda: weight.clone(), weight, arguments.repeats)
    critical = _microseconds(lambda: critical_strength_24(weight), weight, arguments.repeats)
    rows = [_row(weight, strength, arguments.repeats, arguments.sweeps) for strength in arguments.strengths]
    write_result(
        arguments.out,
        "prox/cpu",
        f"The exact 2:4 prox on CPU, {size} x {size} float32",
        rows,
        note=(
            "Gaussian weights, so the strength is lambda * sigma. Times are medians in microseconds a weight; extra "
            "memory is the peak in units of the weight, the result included; suboptimal is the share of "
            f"{min(CHECKED, weight.numel() // 4)} groups. A clone of the matrix takes {copy:.4f}, critical_strength_24 "
            f"{critical:.4f} microseconds a weight."
        ),
    )


def _row(weight: Tensor, strength: float, repeats: int, sweeps: int) -> dict[str, Any]:
    groups = weight.view(-1, 4)
    exact = _microseconds(lambda: prox_24(weight, strength), weight, repeats)
    published = _microseconds(lambda: alternating_minimisation(groups, strength, sweeps=sweeps), weight, 1)
    result = prox_24(weight, strength).view(-1, 4)
    sample = groups[:CHECKED]
    best = prox_24_reference(sample, strength)
    return {
        "strength": strength,
        "groups 2:4": float(((result != 0).sum(-1) <= 2).double().mean()),
        "prox_24": exact,
        f"alternating, {sweeps} sweeps": published,
        "ratio": published / exact,
        "extra memory": _extra_memory(lambda: prox_24(weight, strength), weight),
        "suboptimal": _suboptimal(result[:CHECKED], best, sample, strength),
        "suboptimal, alternating": _suboptimal(
            alternating_minimisation(sample, strength, sweeps=sweeps), best, sample, strength
        ),
    }


def _microseconds(call: Callable[[], Tensor], weight: Tensor, repeats: int) -> float:
    if repeats > 1:
        call()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return statistics.median(times) / weight.numel() * 1e6


def _extra_memory(call: Callable[[], Tensor], weight: Tensor) -> float:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = call()
    alive = peak = 0
    changes = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(changes, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak / (result.numel() * weight.element_size())


def _suboptimal(w: Tensor, best: Tensor, y: Tensor, strength: float) -> float:
    least = _objective(best, y, strength)
    return float((_objective(w, y, strength) > least * (1 + 1e-6)).double().mean())


def _objective(w: Tensor, y: Tensor, strength: float) -> Tensor:
    a, b, c, d = w.double().abs().unbind(-1)
    distance = ((w.double() - y.double()) ** 2).sum(-1)
    return distance / 2 + strength * (a * b * (c + d) + c * d * (a + b))


if __name__ == "__main__":
    main()
