"""What Prox24 adds to a training step on a GPU, phase by phase, for GPT models with random weights.

    python -m benchmarks.train_step --models '[125M, 1B]'

bf16 autocast, fused AdamW on float32 weights. The phases, and the step without Prox24, take turns in rounds of a few
steps, each phase with weights and a schedule of its own that runs from its beginning to its end over all rounds.
Reported of a phase is the median over the rounds of its time over that without Prox24 in the same round.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jsonargparse import auto_cli
from torch import Tensor, nn

from benchmarks.result_files import write_result
from prox24_lightning.prox import prox_path
from prox24_lightning.schedules import STRENGTH_SCHEDULES
from prox24_lightning.sparsify.config import SparsifyConfig
from prox24_lightning.sparsify.controller import SparsifyController

NEVER = 10**9
ROUND = 4
"""Steps that are timed together, without waiting for the device in between; one of four samples layer inputs."""
WARM_UP = 2
"""Steps before them, in every round."""
FIRST = 4
"""More of them in the first round: in its first steps a phase samples the inputs every time."""
SOLVED = 2
"""Blocks that the progressive phase solves during all rounds."""


@dataclass(frozen=True)
class Size:
    """Of a model, and of the batch that it is stepped with."""

    width: int
    depth: int
    heads: int
    batch: int
    context: int
    vocabulary: int = 50304


SIZES = {
    "tiny": Size(32, 2, 2, 2, 16, 64),
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
        self.embed, self.place = nn.Embedding(size.vocabulary, size.width), nn.Embedding(size.context, size.width)
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.depth))
        self.norm = nn.LayerNorm(size.width)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.place.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.embed.weight)


class Bench:
    """One model with its optimizer and data.

    Attributes:
        forward: what a step calls: the model, or what runs it on several devices.
    """

    def __init__(self, size: Size, device: torch.device) -> None:
        torch.manual_seed(0)
        with device:
            self.model = GPT(size)
            self.tokens = torch.randint(size.vocabulary, (size.batch, size.context + 1))
        for parameter in self.model.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
        self.device = device
        self.forward: Callable[[Tensor], Tensor] = self.model
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)

    def step(self, sparsifier: SparsifyController | None) -> None:
        """One step, without waiting for the device."""
        if sparsifier is not None:
            sparsifier.before_batch([self.optimizer])
        with torch.autocast(self.device.type, torch.bfloat16):
            logits = self.forward(self.tokens[:, :-1])
        F.cross_entropy(logits.float().flatten(0, 1), self.tokens[:, 1:].flatten()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def round(self, phase: Phase, warm_up: int) -> float:
        """Milliseconds a step of one round of ``phase``, without the pauses in which blocks are solved."""
        self._exchange(phase)
        if phase.sparsifier is not None:
            phase.sparsifier.bind([self.optimizer])
        for _ in range(warm_up):
            self.step(phase.sparsifier)
        self._synchronize()
        begin, paused = time.perf_counter(), phase.paused()
        for _ in range(ROUND):
            self.step(phase.sparsifier)
        self._synchronize()
        taken = time.perf_counter() - begin - (phase.paused() - paused)
        if phase.sparsifier is not None:
            phase.sparsifier.unbind()
        self._exchange(phase)
        return 1e3 * taken / ROUND

    @torch.no_grad()
    def _exchange(self, phase: Phase) -> None:
        """Give the model the weights of the phase, and the phase those of the model."""
        for parameter, own in zip(self.model.parameters(), phase.weights, strict=True):
            held = parameter.clone()
            parameter.copy_(own)
            own.copy_(held)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


class Phase:
    """A phase that is measured: what runs in it, its weights and its times."""

    def __init__(self, name: str, bench: Bench, sparsifier: SparsifyController | None) -> None:
        self.name = name
        self.sparsifier = sparsifier
        self.weights = [parameter.detach().clone() for parameter in bench.model.parameters()]
        self.times: list[float] = []
        self.engine = None if sparsifier is None else sparsifier.prepare(bench.model, [bench.optimizer], NEVER, {})

    def paused(self) -> float:
        """Seconds in which blocks were solved."""
        return 0.0 if self.engine is None else self.engine.strategy.solve_seconds

    def row(self, base: Sequence[float]) -> dict[str, Any]:
        """What was measured, against the times without Prox24 in the same rounds."""
        weights = () if self.sparsifier is None else self.sparsifier.weights
        more = [time / other - 1 for time, other in zip(self.times, base, strict=True)]
        low, middle, high = statistics.quantiles(more, n=4)
        solving = self.paused()
        return {
            "phase": self.name,
            "in 2:4 layers": sum(weight.parameter.numel() for weight in weights) or None,
            "prox": prox_path(weights[0].parameter) if weights else None,
            "step ms": statistics.median(self.times),
            "more": f"{middle:.1%}",
            "middle half of the rounds": f"{low:.1%} to {high:.1%}",
            "pause for a block, s": solving / SOLVED if solving else None,
        }


def phases(bench: Bench, depth: int, rounds: int) -> list[Phase]:
    """All phases, the step without Prox24 first."""
    steps = FIRST + rounds * (WARM_UP + ROUND)
    growing = STRENGTH_SCHEDULES["exponential"]
    configs = {
        "without": None,
        "dense": SparsifyConfig(NEVER - 2, NEVER - 1, strategy="post_step", verbose=False),
        "sparsify, by fraction": SparsifyConfig(0, steps + 1, strategy="post_step", verbose=False),
        "sparsify, by strength": SparsifyConfig(0, steps + 1, strategy="post_step", schedule=growing, verbose=False),
        "sparsify, progressive": SparsifyConfig(0, depth * steps // SOLVED, verbose=False),
        "frozen": SparsifyConfig(0, 0, strategy="post_step", verbose=False),
    }
    return [
        Phase(name, bench, None if config is None else SparsifyController(config)) for name, config in configs.items()
    ]


def main(
    models: Sequence[str] = ("125M", "1B"),
    output: Path = Path("benchmarks/results"),
    rounds: int = 8,
    device: str = "cuda",
) -> None:
    """Measure and write the table after every model.

    Args:
        models: names of SIZES.
        output: folder for the Markdown and JSON result.
        rounds: how often a few steps of every phase are timed, two at least.
        device: where.
    """
    rows: list[dict[str, Any]] = []
    for name in models:
        size = SIZES[name]
        bench = Bench(size, torch.device(device))
        turns = phases(bench, size.depth, rounds)
        for number in range(rounds):
            for place in range(len(turns)):  # each round begins with another one
                phase = turns[(place + number) % len(turns)]
                phase.times.append(bench.round(phase, WARM_UP + (FIRST if number == 0 else 0)))
        facts = {"model": name, "parameters": sum(parameter.numel() for parameter in bench.model.parameters())}
        facts["tokens a step"] = size.batch * size.context
        rows += [{**facts, **phase.row(turns[0].times)} for phase in turns]
        note = (
            f"bf16 autocast, fused AdamW, float32 weights, random tokens; metric activation. Rounds of {ROUND} steps "
            f"in turns; 'more' is the median over {rounds} rounds of what is added to the step without Prox24 in the "
            "same round. The schedules run from beginning to end over the rounds. The progressive phase stands still "
            "for every block that is solved, which is not part of its step."
        )
        write_result(output, "train_step", "What Prox24 adds to a training step (GPU)", rows, note=note)
        del bench, turns
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
