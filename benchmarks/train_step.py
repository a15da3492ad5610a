"""What Prox24 adds to a training step on a GPU, phase by phase, for GPT models with random weights.

    python -m benchmarks.train_step --models 125M 1B

bf16 autocast, fused AdamW on float32 weights. A phase begins with steps that are not timed; then the median over rounds
of a few steps. The steps without Prox24 are taken before and after all phases, and the mean of the two medians is
what the phases are compared with.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jsonargparse import auto_cli
from torch import Tensor, nn

from benchmarks.report import write_report
from prox24_lightning.prox import prox_path
from prox24_lightning.schedules import STRENGTH_SCHEDULES
from prox24_lightning.sparsify.sparsifier import Sparsifier

NEVER = 10**9
VOCABULARY = 50304
ROUND = 4
"""Steps that are timed together, as the device is not waited for between steps; of four, one looks at layer inputs."""


@dataclass(frozen=True)
class Size:
    """Of a model, and of the batch that it is stepped with."""

    width: int
    depth: int
    heads: int
    batch: int
    context: int


SIZES = {
    "tiny": Size(64, 2, 2, 2, 32),
    "125M": Size(768, 12, 12, 16, 1024),
    "1B": Size(1792, 24, 14, 8, 1024),
}


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.heads = size.heads
        self.norm1, self.norm2 = nn.LayerNorm(size.width), nn.LayerNorm(size.width)
        self.qkv, self.proj = nn.Linear(size.width, 3 * size.width), nn.Linear(size.width, size.width)
        self.up, self.down = nn.Linear(size.width, 4 * size.width), nn.Linear(4 * size.width, size.width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """A decoder with tied embeddings."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(VOCABULARY, size.width), nn.Embedding(size.context, size.width)
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.depth))
        self.norm = nn.LayerNorm(size.width)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.place.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.embed.weight)


class Bench:
    """One model with its optimizer and data."""

    def __init__(self, size: Size, device: torch.device) -> None:
        torch.manual_seed(0)
        with device:
            self.model = GPT(size)
            self.tokens = torch.randint(VOCABULARY, (size.batch, size.context + 1))
        for parameter in self.model.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
        self.device = device
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)

    def step(self, sparsifier: Sparsifier | None) -> None:
        """One step, without waiting for the device."""
        if sparsifier is not None:
            sparsifier.before_batch([self.optimizer])
        with torch.autocast(self.device.type, torch.bfloat16):
            logits = self.model(self.tokens[:, :-1])
        F.cross_entropy(logits.float().flatten(0, 1), self.tokens[:, 1:].flatten()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def phase(self, sparsifier: Sparsifier | None, rounds: int) -> list[float]:
        """Milliseconds a step, of ``rounds`` rounds of :data:`ROUND` steps after one round of warm-up."""
        if sparsifier is not None:
            sparsifier.prepare(self.model, [self.optimizer], NEVER, {})
            sparsifier.bind([self.optimizer])
        times = []
        for _ in range(rounds + 1):
            self._synchronize()
            begin = time.perf_counter()
            for _ in range(ROUND):
                self.step(sparsifier)
            self._synchronize()
            times.append(1e3 * (time.perf_counter() - begin) / ROUND)
        if sparsifier is not None:
            sparsifier.unbind()
        return times[1:]

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def phases(rounds: int) -> Iterator[tuple[str, Sparsifier]]:
    """Name of each phase, and what is in it for all of the timed steps. The frozen one is last: it prunes."""
    length = ROUND * (rounds + 1)
    growing = STRENGTH_SCHEDULES["exponential"]
    yield "dense", Sparsifier(NEVER - 2, NEVER - 1, strategy="post_step", verbose=False)
    yield "sparsify, post_step, by fraction", Sparsifier(0, 2 * length, strategy="post_step", verbose=False)
    yield (
        "sparsify, post_step, by strength",
        Sparsifier(0, 2 * length, strategy="post_step", schedule=growing, verbose=False),
    )
    yield "frozen", Sparsifier(0, 1, strategy="post_step", verbose=False)


def main(
    models: Sequence[str] = ("125M", "1B"),
    output: Path = Path("benchmarks/results"),
    rounds: int = 4,
    device: str = "cuda",
) -> None:
    """Measure and write the table after every phase.

    Args:
        models: names of SIZES.
        output: folder for the Markdown and JSON result.
        rounds: how often a few steps of a phase are timed.
        device: where.
    """
    rows: list[dict[str, Any]] = []
    for name in models:
        bench = Bench(SIZES[name], torch.device(device))
        before = statistics.median(bench.phase(None, rounds))
        mine: list[dict[str, Any]] = []
        for phase, sparsifier in phases(rounds):
            times = bench.phase(sparsifier, rounds)
            mine.append(_row(name, phase, times, before, bench, sparsifier))
            _write(output, [*rows, *mine])
        after = statistics.median(bench.phase(None, rounds))
        base = (before + after) / 2
        for row in mine:
            row["more"] = f"{row['step ms'] / base - 1:.1%}"
        rows += [_row(name, "without, before", [before], base, bench, None), *mine]
        rows.append(_row(name, "without, after", [after], base, bench, None))
        _write(output, rows)
        del bench
        gc.collect()
        torch.cuda.empty_cache()


def _row(
    name: str, phase: str, times: Sequence[float], base: float, bench: Bench, sparsifier: Sparsifier | None
) -> dict[str, Any]:
    median = statistics.median(times)
    weights = () if sparsifier is None else sparsifier.weights
    return {
        "model": name,
        "parameters": sum(parameter.numel() for parameter in bench.model.parameters()),
        "in 2:4 layers": sum(weight.parameter.numel() for weight in weights) or None,
        "tokens a step": bench.tokens.shape[0] * (bench.tokens.shape[1] - 1),
        "phase": phase,
        "prox": prox_path(weights[0].parameter) if weights else None,
        "step ms": median,
        "spread ms": max(times) - min(times),
        "more": f"{median / base - 1:.1%}",
    }


def _write(output: Path, rows: Sequence[dict[str, Any]]) -> None:
    note = "bf16 autocast, fused AdamW, float32 weights, random tokens; metric activation. 'more' is over no Prox24."
    write_report(output, "train_step", "What Prox24 adds to a training step (GPU)", rows, note=note)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
