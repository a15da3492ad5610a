"""What Prox24 adds to a training step on the CPU, phase by phase.

    python -m benchmarks.step_overhead --output benchmarks/results

One process trains the ``bytelm`` model; every round runs a few steps without the engine and a few in each phase,
in turn, so that all see the same machine. Times are medians over all steps of a kind, ratios are against the
steps without the engine.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from jsonargparse import auto_cli
from torch import Tensor

from benchmarks.result_files import write_result
from prox24_lightning.schedules import FRACTION_CURVES
from prox24_lightning.sparsify import PhasePlan, PostStepProx, SparsityEngine
from prox24_lightning.weights.selection import select_weights
from recipes.bytelm import ByteGPT

STEPS_A_TURN = 4


def main(
    output: Path = Path("benchmarks/results"),
    width: int = 128,
    depth: int = 4,
    context: int = 128,
    batch_size: int = 32,
    rounds: int = 8,
    threads: int = 2,
) -> None:
    """Measure and write the table.

    Args:
        output: folder for the Markdown and JSON result.
        width: residual width of the model.
        depth: its number of blocks.
        context: bytes a sequence.
        batch_size: sequences a step.
        rounds: how many times each phase gets its turn.
        threads: CPU threads.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = ByteGPT(width, depth, 4, context)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    tokens = torch.randint(256, (64, batch_size, context + 1))
    weights = select_weights(model).chosen

    def engine(plan: PhasePlan) -> SparsityEngine:
        return SparsityEngine(weights, plan, PostStepProx(None, FRACTION_CURVES["cubic"]), metric="activation")

    never = 10**9
    phases = {
        "without the engine": None,
        "dense": engine(PhasePlan(never, never + 1)),
        "sparsify": engine(PhasePlan(0, 2 * STEPS_A_TURN * rounds)),
        "frozen": engine(PhasePlan(0, 1)),
    }
    times: dict[str, list[float]] = {name: [] for name in phases}
    for round_ in range(rounds + 1):
        for name, phase in phases.items():
            if phase is not None:
                phase.bind([optimizer])
            for step in range(STEPS_A_TURN):
                seconds = _step(model, optimizer, tokens[(round_ * STEPS_A_TURN + step) % 64], phase)
                if round_ and step:  # the first round and the first step of a turn warm up
                    times[name].append(seconds)
            if phase is not None:
                phase.unbind()

    base = statistics.median(times["without the engine"])
    rows = [
        {"phase": name, "median ms": 1e3 * statistics.median(seconds), "ratio": statistics.median(seconds) / base}
        for name, seconds in times.items()
    ]
    sizes = (
        f"{sum(w.parameter.numel() for w in weights):,} weights in 2:4 layers, {batch_size} x {context} tokens a step"
    )
    write_result(
        output,
        "step_overhead",
        "What Prox24 adds to a training step (CPU)",
        rows,
        note=f"`bytelm` model, width {width}, depth {depth}, {sizes}, {threads} threads, AdamW, metric activation.",
    )


def _step(
    model: Callable[[Tensor], Tensor], optimizer: torch.optim.Optimizer, tokens: Tensor, engine: SparsityEngine | None
) -> float:
    start = time.perf_counter()
    if engine is not None:
        engine.before_batch()
    loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return time.perf_counter() - start


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
