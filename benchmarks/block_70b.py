"""One block of LLaMA-2-70B's shapes with random weights: time of the whole model on this GPU, and peak memory.

    python -m benchmarks.block_70b

Hessians are taken of random inputs with a few strong common directions. Their cost is linear in the tokens: it
is measured on a part of the 2M tokens and scaled up. Not in the figure: the block's own forward passes and the
reading of weights.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import auto_cli

from benchmarks.result_files import write_result
from prox24_lightning.calibration.statistics.hessian import HessianAccumulator
from prox24_lightning.solvers import Method, solve_layer

BLOCKS = 80
WIDTH, HIDDEN, KEYS = 8192, 28672, 1024
INPUT_GROUPS = {
    "q, k, v": (WIDTH + 2 * KEYS, WIDTH),
    "o": (WIDTH, WIDTH),
    "gate, up": (2 * HIDDEN, WIDTH),
    "down": (WIDTH, HIDDEN),
}
"""Layers that share an input -> (out_features together, in_features)."""


def main(
    output: Path = Path("benchmarks/results"),
    method: Method = "prox",
    steps: int | None = None,
    tokens: int = 2**21,
    measured_tokens: int = 2**16,
    shrink: int = 1,
    matmul_precision: Literal["highest", "high"] = "high",
    device: str = "cuda",
) -> None:
    """Time the four input groups of a block and write the table.

    Args:
        output: folder of the result.
        method: of solve_layer; refinement is on.
        steps: of the prox methods; null is the default.
        tokens: calibration tokens of the plan.
        measured_tokens: tokens that are really counted.
        shrink: divide every size by this (for a trial on CPU).
        matmul_precision: high allows TF32.
        device: where to run.
    """
    torch.set_float32_matmul_precision(matmul_precision)
    torch.manual_seed(0)
    cuda = device.startswith("cuda")
    rows: list[dict[str, Any]] = []
    for group, (outputs, inputs) in INPUT_GROUPS.items():
        outputs, inputs = outputs // shrink, inputs // shrink
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        weight = torch.randn(outputs, inputs, device=device) * inputs**-0.5
        begin = time.perf_counter()
        hessian = _hessian(inputs, measured_tokens, device)
        if cuda:
            torch.cuda.synchronize()
        counting = (time.perf_counter() - begin) * tokens / measured_tokens
        solution = solve_layer(weight, hessian.hessian, method=method, steps=steps, name=group)
        peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0
        rows.append(
            {
                "input group": group,
                "shape": f"{outputs} x {inputs}",
                "Hessian, s": counting,
                "solve, s": solution.seconds,
                "relative loss": solution.refined_loss,
                "peak GiB": peak,
            }
        )
        print(rows[-1], flush=True)
        del weight, hessian, solution
    seconds = sum(row["Hessian, s"] + row["solve, s"] for row in rows)
    note = (
        f"method {method}, steps {steps or 'default'}, matmul precision {matmul_precision}. {tokens} tokens, of which "
        f"{measured_tokens} were counted and the time scaled. One block {seconds:.1f} s; {BLOCKS} blocks "
        f"{BLOCKS * seconds / 3600:.2f} h; peak {max(row['peak GiB'] for row in rows):.1f} GiB."
    )
    write_result(output, "block_70b", "Layer-wise pruning of one LLaMA-2-70B block", rows, note=note)


def _hessian(inputs: int, tokens: int, device: str, chunk: int = 2**13) -> HessianAccumulator:
    hessian = HessianAccumulator()
    directions = torch.randn(16, inputs, device=device)
    for _ in range(max(1, tokens // chunk)):
        rows = torch.randn(chunk, inputs, device=device)
        hessian.add(rows.addmm_(torch.randn(chunk, 16, device=device), directions, alpha=0.5).bfloat16())
    return hessian


if __name__ == "__main__":
    auto_cli(main)
