"""Masked fine-tuning with transposable masks: a training step with dense products, and with two of three sparse.

    python -m benchmarks.masked_step

First single linear layers (forward, both gradients, an SGD update in place of the optimizer), then whole LLaMA-shaped
models with AdamW. bf16 autocast over float32 weights; dense and sparse take turns in one run.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli
from rich.console import Console
from torch import Tensor, nn

from benchmarks.result_files import write_result
from prox24_lightning.convert.autotune.cusparselt_algorithms import AlgorithmJob, fastest_algorithms
from prox24_lightning.convert.kernels.registry import Kernel
from prox24_lightning.convert.layers.transposable_linear import TransposableForward
from prox24_lightning.convert.measurement import relative_error, time_calls
from prox24_lightning.mask import mask_24

Shape = tuple[int, int]
Found = dict[tuple[Shape, int], tuple[Kernel, Kernel]]

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008), (14336, 4096), (4096, 14336), (8192, 8192))
"""(out_features, in_features) of LLaMA layers."""


class _Layer(nn.Module):
    """Attention's projections without attention itself, and the gated MLP: the linear layers of a LLaMA block."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down = nn.Linear(inner, width, bias=False)
        self.heads = width // 128

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        y = self.norm(x)
        heads = [part(y).view(batch, length, self.heads, 128).transpose(1, 2) for part in (self.q, self.k, self.v)]
        mixed = nn.functional.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.o(mixed.transpose(1, 2).reshape(batch, length, width))
        y = self.norm2(x)
        return x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))


def main(
    output: Path = Path("benchmarks/results"),
    shapes: list[tuple[int, int]] = list(SHAPES),  # noqa: B006
    tokens: list[int] = [4096, 16384],  # noqa: B006
    models: list[tuple[int, int, int]] = [(4, 4096, 11008)],  # noqa: B006
    batch: tuple[int, int] = (8, 2048),
    rounds: int = 12,
) -> None:
    """Measure, then write the table.

    Args:
        output: folder of the result files.
        shapes: (out_features, in_features) of single layers.
        tokens: rows of input of a single layer.
        models: (layers, width, width of the MLP) of whole models.
        batch: sequences, and tokens in each, of a whole model's step.
        rounds: repetitions; medians are reported.
    """
    rows: list[dict[str, Any]] = []
    console = Console()
    note = (
        "A layer: forward, gradients of input and weight, `weight -= rate * gradient`; a model: the whole step with "
        "fused AdamW. Sparse: forward and input gradient through the packed weight and its packed transpose, whose "
        "values are gathered anew in every step; the weight gradient dense. Algorithms searched."
    )

    def add(row: dict[str, Any]) -> None:
        rows.append(row)
        console.print(row)
        write_result(
            output, "masked_step", "A training step with transposable masks, dense and sparse", rows, note=note
        )

    all_at_once = batch[0] * batch[1]
    wanted = [(tuple(shape), count) for shape in shapes for count in tokens]
    inside = [
        (one, all_at_once) for _, width, inner in models for one in ((width, width), (inner, width), (width, inner))
    ]
    found = _searched([*wanted, *inside])
    for shape, count in wanted:
        add(_layer_row(shape, count, found, rounds))
    for model in models:
        add(_model_row(*model, batch, found, rounds))


def _layer_row(shape: Shape, tokens: int, found: Found, rounds: int) -> dict[str, Any]:
    dense = nn.Linear(shape[1], shape[0], bias=False, device="cuda")
    mask = _prune(dense)
    sparse = copy.deepcopy(dense)
    TransposableForward(sparse, mask, found[shape, tokens], smallest_work=0).attach()
    x = torch.randn(tokens, shape[1], device="cuda", dtype=torch.bfloat16, requires_grad=True)
    seed = torch.randn(tokens, shape[0], device="cuda", dtype=torch.bfloat16)
    outputs = {}

    def step(linear: nn.Linear) -> Callable[[], None]:
        def run() -> None:
            x.grad = linear.weight.grad = None
            with torch.autocast("cuda", dtype=torch.bfloat16):
                out = linear(x)
            out.backward(seed)
            with torch.no_grad():
                linear.weight.add_(linear.weight.grad, alpha=-1e-9)
            outputs[linear] = out.detach(), x.grad, linear.weight.grad

        return run

    times = time_calls({"dense": step(dense), "sparse": step(sparse)}, rounds=rounds)
    return _row(f"{shape[0]} x {shape[1]}", tokens, times, relative_error(outputs[dense], outputs[sparse]))


def _model_row(
    layers: int, width: int, inner: int, batch: tuple[int, int], found: Found, rounds: int
) -> dict[str, Any]:
    with torch.device("cuda"):
        dense = nn.Sequential(*(_Layer(width, inner) for _ in range(layers)))
    masks = {name: _prune(module) for name, module in dense.named_modules() if isinstance(module, nn.Linear)}
    sparse = copy.deepcopy(dense)
    tokens = batch[0] * batch[1]
    for name, mask in masks.items():
        layer = sparse.get_submodule(name)
        TransposableForward(layer, mask, found[tuple(layer.weight.shape), tokens], smallest_work=0).attach()
    x = torch.randn(*batch, width, device="cuda")
    losses: dict[str, list[float]] = {"dense": [], "sparse": []}

    def step(name: str, model: nn.Module) -> Callable[[], None]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

        def run() -> None:
            optimizer.zero_grad()
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = model(x).float().square().mean()
            loss.backward()
            optimizer.step()
            losses[name].append(loss.detach())

        return run

    times = time_calls({"dense": step("dense", dense), "sparse": step("sparse", sparse)}, rounds=rounds)
    error = abs(float(losses["dense"][0]) / float(losses["sparse"][0]) - 1)
    return _row(f"model of {layers} layers, {width} and {inner} wide", tokens, times, error)


@torch.no_grad()
def _prune(linear: nn.Linear) -> Tensor:
    mask = mask_24(linear.weight, dim=(0, 1))
    linear.weight.mul_(mask)
    return mask


def _searched(wanted: Sequence[tuple[Shape, int]]) -> Found:
    """The fastest algorithms of cuSPARSELt, forward and backward, by shape and number of tokens."""
    device = torch.cuda.current_device()
    both = dict.fromkeys((one, tokens) for shape, tokens in wanted for one in (shape, shape[::-1]))
    answers = fastest_algorithms([AlgorithmJob("bfloat16", shape, tokens, 1, device) for shape, tokens in both])
    best = {key: Kernel("cusparselt", answer.algorithms[:1]) for key, answer in zip(both, answers, strict=True)}
    return {(shape, tokens): (best[shape, tokens], best[shape[::-1], tokens]) for shape, tokens in wanted}


def _row(what: str, tokens: int, times: dict[str, Any], error: float) -> dict[str, Any]:
    dense, sparse = times["dense"].median_us / 1000, times["sparse"].median_us / 1000
    return {
        "weight": what,
        "tokens": tokens,
        "dense ms": dense,
        "sparse ms": sparse,
        "dense / sparse": dense / sparse,
        "relative difference": error,
    }


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
