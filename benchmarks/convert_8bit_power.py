"""Clock, power and energy of products in 8 bits, each form running alone for seconds: what limits many tokens.

    python -m benchmarks.convert_8bit_power --shape 14336x4096 --tokens 16384

A GPU at its power limit lowers its clock until the form that runs fits; the time of a product is then its energy over
that power, however few cycles it needs. ``nvidia-smi`` samples clock, power and whether the limit holds.
"""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli

from benchmarks.convert_8bit import ShapeBenchmark, compile_kernels
from benchmarks.result_files import write_result

_SAMPLE_MS = 50
_FIELDS = "clocks.sm,power.draw,clocks_event_reasons.sw_power_cap"
_SETTLING = 0.4
"""Share of the samples that are left out: power and clock settle."""


def sampled(samples: str) -> dict[str, float]:
    """Return medians of the samples: MHz, W, and the share of them, in percent, at which the power limit held.

    Raises:
        ValueError: if there is none after those that are left out.
    """
    rows = [line.split(", ") for line in samples.splitlines() if line.count(",") == 2]
    rows = rows[round(_SETTLING * len(rows)) :]
    if not rows:
        answer = samples.strip().partition("\n")[0]
        raise ValueError(f"nvidia-smi gave no samples ({answer}); let each form run longer (seconds)")
    return {
        "MHz": statistics.median(float(clock) for clock, _, _ in rows),
        "W": statistics.median(float(power) for _, power, _ in rows),
        "at the limit %": 100 * sum(limit == "Active" for *_, limit in rows) / len(rows),
    }


def run_alone(replay: Callable[[], None], products: int, seconds: float) -> dict[str, float]:
    """Replay for ``seconds``, synchronising about every 50 ms; microseconds a product, and what was sampled meanwhile.

    Args:
        products: of one replay.
    """
    device = torch.cuda.get_device_properties(torch.cuda.current_device())
    query = ["nvidia-smi", "-i", f"GPU-{device.uuid}", f"--query-gpu={_FIELDS}", "--format=csv,noheader,nounits"]
    replay()
    torch.cuda.synchronize()
    with subprocess.Popen([*query, "-lms", str(_SAMPLE_MS)], stdout=subprocess.PIPE, text=True) as smi:
        begin, count, replays, passed = time.perf_counter(), 0, 1, 0.0
        while passed < seconds:
            for _ in range(replays):
                replay()
            torch.cuda.synchronize()
            count += replays
            passed = time.perf_counter() - begin
            replays = max(1, round(0.05 * count / passed))
        smi.terminate()
        samples, _ = smi.communicate()
    us = 1e6 * passed / (count * products)
    found = sampled(samples)
    return {"us": us, **found, "mJ": found["W"] * us * 1e-3, "thousand cycles": found["MHz"] * us * 1e-3}


@torch.no_grad()
def main(
    shape: str = "14336x4096", tokens: int = 16384, seconds: float = 3.0, output: Path = Path("benchmarks/results")
) -> None:
    """Run each form alone, and write the table.

    Args:
        shape: out x in of the layer.
        tokens: of each product.
        seconds: that each form runs.
        output: folder of the result.
    """
    rows, columns = map(int, shape.split("x"))
    compile_kernels([tokens])
    weights = ShapeBenchmark((rows, columns))
    found: list[dict[str, Any]] = []
    for name, (kernel, replay) in weights.fastest(tokens, ways=True).items():
        found.append({"form": name, "kernel": str(kernel), **run_alone(replay, weights.used(tokens), seconds)})
    note = (
        f"{rows} x {columns}, {tokens} tokens, rounding of the tokens included; each form alone for {seconds:g} s. "
        f"Medians of samples each {_SAMPLE_MS} ms, without the first {_SETTLING:.0%} of them; mJ: power times time."
    )
    write_result(output, "convert_8bit", "Weights of 8 bits: clock, power and energy", found, part="power", note=note)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
