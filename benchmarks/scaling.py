"""What Prox24 adds to data-parallel training: a GPT on one GPU and on several, phase by phase, with its pauses.

    python -m benchmarks.scaling --gpus '[1, 2]'

Weak scaling: every GPU steps the same batch, so the tokens of a step grow with the GPUs. DDP, bf16 autocast, fused
AdamW on float32 weights, random tokens. As in ``benchmarks.train_step`` the phases take turns in rounds of a few steps;
the progressive phase prunes a few blocks, spread over the depth of the model, and each pause is timed by itself.
The projection says what the measured numbers come to on more GPUs, if nothing but the number of ranks changes.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from jsonargparse import auto_cli
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from benchmarks.pause_parts import PARTS, PauseParts
from benchmarks.result_files import write_result
from benchmarks.traffic import Traffic
from benchmarks.train_step import FIRST, NEVER, ROUND, SIZES, WARM_UP, Bench, Phase, Size
from prox24_lightning.schedules import STRENGTH_SCHEDULES
from prox24_lightning.sparsify.config import SparsifyConfig
from prox24_lightning.sparsify.controller import SparsifyController
from prox24_lightning.sparsify.strategies.base import Strategy
from prox24_lightning.utils.checksum import checksum
from prox24_lightning.utils.distributed import gathered_objects

PRUNED = 4
"""Blocks that the progressive phase solves, from the first to the last of the model."""
SETTLE = 12
"""Steps after a pause that are not timed: a GPU that has been nearly idle in it clocks higher for a second."""
TIMEOUT = timedelta(seconds=90)
PROJECTED = (1, 2, 4, 8, 16, 32, 64)
MIB = 2**20


class ParallelBench(Bench):
    """One model on each rank, kept equal by DDP, with what is measured beside the steps' time."""

    def __init__(self, size: Size, device: torch.device, rank: int, count: int, compress: bool) -> None:
        super().__init__(size, device)
        generator = torch.Generator(device).manual_seed(rank)
        self.tokens = torch.randint(size.vocabulary, self.tokens.shape, generator=generator, device=device)
        self.traffic = Traffic()
        self.pauses: list[tuple[float, int]] = []
        self.sent: dict[str, list[int]] = {}
        self.parts = PauseParts()
        self.seconds: list[dict[str, float]] = []
        self.strategies: dict[SparsifyController | None, Strategy] = {}
        if count > 1:
            ids = [device.index] if device.type == "cuda" else None
            self.forward = DistributedDataParallel(self.model, device_ids=ids, gradient_as_bucket_view=True)
            if compress:
                self.forward.register_comm_hook(None, bf16_compress_hook)

    def step(self, sparsifier: SparsifyController | None) -> None:
        """One step; a pause in it is noted with what was sent meanwhile, which does not count as the step's."""
        strategy = self.strategies.get(sparsifier)
        sent, solving = self.traffic.bytes, 0.0 if strategy is None else strategy.solve_seconds
        super().step(sparsifier)
        if strategy is not None and strategy.solve_seconds > solving:
            self.pauses.append((strategy.solve_seconds - solving, self.traffic.bytes - sent))
            self.seconds.append(self.parts.taken())
            self.traffic.bytes = sent

    def measured_round(self, phase: Phase, warm_up: int) -> float:
        """Milliseconds a step of one round, on the slowest rank; notes what the package sent in a step.

        A round in which a block was solved is repeated.
        """
        while True:
            before, pauses = self.traffic.bytes, len(self.pauses)
            with self.traffic.counted(), self.parts.timed():
                taken = self.round(phase, warm_up)
            if len(self.pauses) == pauses:
                break
            warm_up = SETTLE
        self.sent.setdefault(phase.name, []).append((self.traffic.bytes - before) // (warm_up + ROUND))
        return max(gathered_objects(taken))


def phases(bench: Bench, depth: int, rounds: int) -> list[Phase]:
    """All phases, the step without Prox24 first."""
    steps = FIRST + rounds * (WARM_UP + ROUND)
    blocks = sorted({round(index * (depth - 1) / max(1, PRUNED - 1)) for index in range(PRUNED)})
    repeated = len(blocks) * (WARM_UP + 2 * ROUND + SETTLE)  # a pause a round
    growing = STRENGTH_SCHEDULES["exponential"]
    configs = {
        "without": None,
        "dense": SparsifyConfig(NEVER - 2, NEVER - 1, strategy="post_step", verbose=False),
        "sparsify, by fraction": SparsifyConfig(0, steps + 1, strategy="post_step", verbose=False),
        "sparsify, by strength": SparsifyConfig(0, steps + 1, strategy="post_step", schedule=growing, verbose=False),
        "sparsify, progressive": SparsifyConfig(0, repeated, targets=[f"blocks.{i}.*" for i in blocks], verbose=False),
        "frozen": SparsifyConfig(0, 0, strategy="post_step", verbose=False),
    }
    return [
        Phase(name, bench, None if config is None else SparsifyController(config)) for name, config in configs.items()
    ]


def measure(rank: int, count: int, port: int, model: str, rounds: int, device: str, compress: bool, path: Path) -> None:
    """Measure on ``count`` ranks; the first one writes what it found to ``path``."""
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
    place = torch.device(device, rank) if device == "cuda" else torch.device(device)
    if device == "cuda":
        torch.cuda.set_device(place)
    if count > 1:
        backend = "nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, rank=rank, world_size=count, timeout=TIMEOUT)
    size = SIZES[model]
    bench = ParallelBench(size, place, rank, count, compress)
    turns = phases(bench, size.depth, rounds)
    bench.strategies = {phase.sparsifier: phase.engine.strategy for phase in turns if phase.engine is not None}
    for number in range(rounds):
        for index in range(len(turns)):  # each round begins with another one
            phase = turns[(index + number) % len(turns)]
            phase.times.append(bench.measured_round(phase, WARM_UP + (FIRST if number == 0 else 0)))
        if rank == 0:
            print(f"{count} GPUs: round {number + 1} of {rounds}", flush=True)
    masks = [
        checksum([phase.engine.masks[name] for name in sorted(phase.engine.masks)])
        for phase in turns[1:]
        if phase.engine
    ]
    equal = all(found == masks for found in gathered_objects(masks))
    pauses = gathered_objects([seconds for seconds, _ in bench.pauses])
    found = {
        "gpus": count,
        "tokens": count * size.batch * size.context,
        "parameters": sum(parameter.numel() for parameter in bench.model.parameters()),
        "times": {phase.name: phase.times for phase in turns},
        "sent": {name: statistics.median(bytes) for name, bytes in bench.sent.items()},
        "pauses": [max(together) for together in zip(*pauses, strict=True)],
        "parts": bench.seconds,
        "sent in a pause": [size for _, size in bench.pauses],
        "masks equal": equal,
        "gigabytes a second": bandwidth(place) if count > 1 else None,
        "peak": torch.cuda.max_memory_allocated() if device == "cuda" else 0,
    }
    if rank == 0:
        path.write_text(json.dumps(found))
    if count > 1:
        dist.destroy_process_group()


def bandwidth(device: torch.device) -> float:
    """Return gigabytes a second of an all-reduce of 256 MiB: of what each rank hands to it."""
    tensor = torch.zeros(2**26 if device.type == "cuda" else 2**18, device=device)
    times = []
    for _ in range(6):
        _wait(device)
        begin = time.perf_counter()
        dist.all_reduce(tensor)
        _wait(device)
        times.append(time.perf_counter() - begin)
    return 4e-9 * tensor.numel() / statistics.median(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def rows_of(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each number of GPUs and phase."""
    alone = found[0]
    rows = []
    for one in found:
        base = one["times"]["without"]
        for name, times in one["times"].items():
            more = [time / other - 1 for time, other in zip(times, base, strict=True)]
            low, middle, high = statistics.quantiles(more, n=4)
            step = statistics.median(times)
            speed = 1e3 * one["tokens"] / step
            first = 1e3 * alone["tokens"] / statistics.median(alone["times"][name])
            solves = name == "sparsify, progressive"
            rows.append(
                {
                    "GPUs": one["gpus"],
                    "phase": name,
                    "step ms": step,
                    "tokens a second": round(speed),
                    f"x {alone['gpus']} GPU": f"{speed / first:.2f}",
                    "more than without": f"{middle:.1%}",
                    "middle half of the rounds": f"{low:.1%} to {high:.1%}",
                    "sent by us, KiB a step": round(one["sent"][name] / 1024, 1),
                    "pause for a block, s": pause(one) if solves else None,
                    "longest pause, s": max(one["pauses"]) if solves else None,
                    "sent by us in a pause, MiB": statistics.median(one["sent in a pause"]) / MIB if solves else None,
                }
            )
    return rows


def pause(found: dict[str, Any]) -> float:
    """Return the median pause; the first one also compiles kernels and is left out."""
    return statistics.median(found["pauses"][1:] or found["pauses"])


def parts_of(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the seconds of each part of a pause, the mean of all but the first, by number of GPUs."""
    rows = []
    for part in PARTS:
        row: dict[str, Any] = {"part of a pause": part}
        for one in found:
            seconds = [parts[part] for parts in one["parts"]]
            row[f"{one['gpus']} GPU, s"] = round(statistics.mean(seconds[1:] or seconds), 3)
        rows.append(row)
    return rows


def projection(found: Sequence[dict[str, Any]], samples: int) -> list[dict[str, Any]]:
    """Return what one GPU and the largest measured number come to on more GPUs of the same links.

    With ``n`` ranks a ring all-reduce takes each rank ``2 (n - 1) / n`` times its bytes over a link. What DDP adds to a
    step, and what is sent in a pause, grow by that alone; of a pause the divided part shrinks, to a sample a rank.
    """
    one, most = found[0], found[-1]
    count = most["gpus"]
    ring = 2 * (count - 1) / count
    step = {name: statistics.median(times) for name, times in one["times"].items()}
    added = {name: max(0.0, statistics.median(times) - step[name]) / ring for name, times in most["times"].items()}
    sending = statistics.median(most["sent in a pause"]) / (1e9 * most["gigabytes a second"]) / ring
    divided = (pause(one) - pause(most) + sending * ring) * count / (count - 1)
    fixed = pause(one) - divided
    rows = []
    for ranks in PROJECTED:
        grown = 2 * (ranks - 1) / ranks
        slowest = max(step, key=lambda name: step[name] + added[name] * grown)
        total = step[slowest] + added[slowest] * grown
        rows.append(
            {
                "GPUs": ranks,
                "measured": ranks in [each["gpus"] for each in found],
                "step without Prox24, ms": step["without"] + added["without"] * grown,
                "slowest phase": slowest,
                "its step, ms": total,
                "tokens a second": round(1e3 * ranks * one["tokens"] / total),
                "of linear": f"{step[slowest] / total:.0%}",
                "pause for a block, s": fixed + divided / min(ranks, samples) + sending * grown,
                "of it fixed": fixed,
                "of it sending": sending * grown,
            }
        )
    return rows


def main(
    gpus: Sequence[int] = (1, 2),
    model: str = "1B",
    output: Path = Path("benchmarks/results"),
    rounds: int = 6,
    device: str = "cuda",
    seconds: float = 130,
    compress: bool = False,
    name: str = "scaling",
) -> None:
    """Measure every number of GPUs, and write the table and the projection.

    Args:
        gpus: numbers of GPUs, the smallest first.
        model: name of benchmarks.train_step.SIZES.
        output: folder for the Markdown and JSON results.
        rounds: how often a few steps of every phase are timed; two more than the blocks that are solved, at least.
        device: "cuda", or "cpu" over gloo.
        seconds: limit for each number of GPUs; its processes are ended then.
        compress: DDP sums gradients in bfloat16 (``bf16_compress_hook``), not in float32.
        name: of the result files, "scaling" or "scaling/VARIANT".
    """
    if rounds < PRUNED + 2:
        raise ValueError(f"rounds is {rounds}: each of {PRUNED} blocks is solved in one of its own; give {PRUNED + 2}")
    found: list[dict[str, Any]] = []
    for count in sorted(gpus):
        with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
            probe.close()
            path = Path(folder) / "found.json"
            context = mp.spawn(measure, (count, port, model, rounds, device, compress, path), count, join=False)
            end = time.monotonic() + seconds
            try:
                while not context.join(timeout=1.0):
                    if time.monotonic() > end:
                        raise TimeoutError(f"{count} ranks have not ended in {seconds} s; set seconds= higher")
            finally:
                for process in context.processes:
                    process.kill()
            found.append(json.loads(path.read_text()))
        _write(output, found, model, rounds, compress, name)


def _write(output: Path, found: Sequence[dict[str, Any]], model: str, rounds: int, compress: bool, name: str) -> None:
    size, last = SIZES[model], found[-1]
    speed = last["gigabytes a second"]
    note = (
        f"{model}: {last['parameters']} parameters, {size.batch} x {size.context} tokens a GPU and step. Weak scaling, "
        f"DDP, gradients summed in {'bfloat16' if compress else 'float32'}; bf16 autocast, fused AdamW, float32 "
        f"weights, random tokens; metric activation. Rounds of {ROUND} steps "
        f"in turns, {rounds} of them; times are those of the slowest rank; 'more than without' is the median over the "
        f"rounds of what is added to the step without Prox24 in the same round. The progressive phase solves {PRUNED} "
        f"blocks from the first to the last; its pauses, and {SETTLE} steps after each, are not part of its step; the "
        "median leaves out the first pause, which also compiles kernels. Pauses: "
        + "; ".join(f"{one['gpus']} GPUs {', '.join(f'{t:.2f}' for t in one['pauses'])} s" for one in found)
        + f". Masks equal on all ranks: {all(one['masks equal'] for one in found)}. "
        f"Peak memory: {last['peak'] / 2**30:.1f} GiB a GPU, weights of all phases included."
        + (f" An all-reduce of 256 MiB moves {speed:.0f} GB a second." if speed else "")
    )
    if len(found) > 1:
        note += f" Pause against {found[0]['gpus']} GPU: {pause(last) / pause(found[0]):.2f}."
    write_result(output, name, "Several GPUs: step, pauses and traffic", rows_of(found), note=note)
    parts = "Seconds on the first rank, the mean of all pauses but the first; 'of it' belongs to the solution."
    write_result(output, name, "Several GPUs: parts of a pause", parts_of(found), part="pause", note=parts)
    if speed:
        note = (
            "On paper, from the measured rows: what grows with the ranks is the share 2 (n - 1) / n of a ring "
            "all-reduce, of DDP and of what is sent in a pause, at the measured speed of the links inside one machine "
            "(between machines links are slower). What shrinks is the divided work of a pause, to one sample a rank. "
            "The statistics of a step and the prox do not depend on the ranks."
        )
        title = "Several GPUs: projection"
        write_result(output, name, title, projection(found, size.batch), part="projection", note=note)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
