"""Converted layers on this machine's GPU: a grid of LLaMA layers by numbers of tokens, and whole models.

    python -m benchmarks.convert
    python -m benchmarks.convert --part grid --dtypes bfloat16 --tokens 1 64 4096
    python -m benchmarks.convert --part models --models 8B

Grid: cuBLAS on the dense weight, torch's own ``to_sparse_semi_structured``, and this package's layers, each called in
eager mode and replayed from a CUDA graph, over several weights in turn that no cache holds together; several GPUs take
shapes side by side. Models: random 2:4 weights in LLaMA's shapes, decoding one token on a static cache and reading a
long prompt, dense and converted.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.convert_models import MODELS, model_rows, save_models
from benchmarks.result_files import result_path, write_result
from prox24_lightning.convert import SemiStructuredLinear
from prox24_lightning.convert.autotune.kernel_table import KernelTable
from prox24_lightning.convert.autotune.tune import kernel_tables
from prox24_lightning.convert.kernels.expand.kernel import expand
from prox24_lightning.convert.kernels.packed_buffer import random_buffer
from prox24_lightning.convert.measurement import relative_error, release_memory, time_calls
from prox24_lightning.utils.devices.cuda_graphs import capture

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008), (14336, 4096), (4096, 14336))
"""(out_features, in_features): attention, then the up and down projections of LLaMA 2 7B and of LLaMA 3 8B."""

TOKENS = tuple(2**power for power in range(15))

_LONG = 4096  # from so many tokens a call is long, and is repeated less often
_MANY = 1024  # from so many on two weights in turn are enough: the inputs and results push them out of the cache

Shape = tuple[int, int]


def grid(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    tokens = tuple(sorted(set(arguments.tokens)))  # as the rows of a table lie
    context = multiprocessing.get_context("spawn")
    gpus = context.SimpleQueue()
    for number in range(torch.cuda.device_count()):
        gpus.put(str(number))
    jobs = [
        (getattr(torch, name), shape, tokens, arguments.rounds)
        for name, shape in product(arguments.dtypes, arguments.shapes)
    ]
    with ProcessPoolExecutor(torch.cuda.device_count(), context, _take_gpu, (gpus,)) as pool:
        for job, found in zip(jobs, pool.map(_shape_rows, jobs), strict=True):
            rows += found
            save_grid(arguments.output, arguments.name, rows)
            print(*job[:2], "done", flush=True)
    return rows


def _take_gpu(gpus: Any) -> None:
    """The processes of a machine with several GPUs each see one of them."""
    taken = gpus.get()
    every = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = every.split(",")[int(taken)] if every else taken


@torch.no_grad()
def _shape_rows(job: tuple[torch.dtype, Shape, tuple[int, ...], int]) -> list[dict[str, Any]]:
    dtype, shape, tokens, rounds = job
    packed, kept = (
        kernel_tables([shape], dtype, token_counts=tokens, keep_dense=keep)[shape] for keep in (False, True)
    )
    rows = layer_rows(shape, dtype, tokens, packed, kept, rounds)
    release_memory()
    return rows


def layer_rows(
    shape: Shape,
    dtype: torch.dtype,
    token_counts: Sequence[int],
    packed: KernelTable,
    kept: KernelTable,
    rounds: int,
) -> list[dict[str, Any]]:
    device = torch.device("cuda")
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    copies = 2 + 2 * cache // (shape[0] * shape[1])
    buffers = [random_buffer(shape, dtype, device, seed) for seed in range(copies)]
    dense = [expand(buffer, shape, dtype).contiguous() for buffer in buffers]
    linears = [_linear(weight) for weight in dense]
    stock = [_linear(_stock(weight)) for weight in dense]
    ours = [SemiStructuredLinear(buffer, shape, dtype, None, packed.text) for buffer in buffers]
    with_dense = [
        SemiStructuredLinear(buffer, shape, dtype, None, kept.text, full)
        for buffer, full in zip(buffers, dense, strict=True)
    ]
    rows = []
    for tokens, row, kept_row in zip(token_counts, packed.rows, kept.rows, strict=True):
        inputs = torch.randn(tokens, shape[1], device=device, dtype=dtype)
        layers = {"dense": linears, "stock": stock, "ours": ours, "kept": with_dense}
        used = copies if tokens < _MANY else 2
        calls = {name: _all(modules[:used], inputs) for name, modules in layers.items()}
        few = rounds if tokens < _LONG else max(2, rounds // 2)
        eager = {name: timing.median_us for name, timing in time_calls(calls, calls=used, rounds=few).items()}
        graphs = {name: capture(call).replay for name, call in calls.items()}
        graph = {name: timing.median_us for name, timing in time_calls(graphs, calls=used, rounds=few).items()}
        rows.append(
            {
                "dtype": str(dtype).removeprefix("torch."),
                "layer": f"{shape[0]} x {shape[1]}",
                "tokens": tokens,
                "dense eager us": eager["dense"],
                "torch eager us": eager["stock"],
                "ours eager us": eager["ours"],
                "dense graph us": graph["dense"],
                "torch graph us": graph["stock"],
                "ours graph us": graph["ours"],
                "ours with dense kept, graph us": graph["kept"],
                "x eager": eager["dense"] / eager["ours"],
                "x graph": graph["dense"] / graph["ours"],
                "x graph, dense kept": graph["dense"] / graph["kept"],
                "x against torch, eager": eager["stock"] / eager["ours"],
                "error": relative_error(linears[0](inputs), ours[0](inputs)),
                "kernel": str(row.kernel),
                "kernel, dense kept": str(kept_row.kernel),
                "memory": ours[0].stored_bytes / dense[0].nbytes,
            }
        )
        del graphs, calls
    return rows


def _linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def _stock(weight: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch announces that its subclass is a prototype
        return torch.sparse.to_sparse_semi_structured(weight)


def _all(modules: Sequence[nn.Module], inputs: Tensor) -> Callable[[], None]:
    def call() -> None:
        for module in modules:
            module(inputs)

    return call


_MEANS = (("1 to 16 tokens", 1, 16, 1.35), ("64 tokens", 64, 64, 1.25), ("1024 tokens and more", 1024, 2**30, 1.35))
_RATIOS = ("x graph", "x graph, dense kept", "x eager")


def bars(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The figures the grid is judged by, each beside its bar; bars are for bfloat16 replayed from a graph."""

    def figure(what: str, value: float, bar: str = "") -> dict[str, Any]:
        return {"figure": what, "value": value, "bar": bar}

    found = []
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        of_dtype = [row for row in rows if row["dtype"] == dtype]
        for what, few, many, bar in _MEANS:
            there = [row for row in of_dtype if few <= row["tokens"] <= many]
            for key in _RATIOS if there else ():
                mean = math.exp(sum(math.log(row[key]) for row in there) / len(there))
                judged = dtype == "bfloat16" and key != "x eager"
                found.append(
                    figure(f"{key}, geometric mean, {dtype}, {what}", mean, f"at least {bar}" if judged else "")
                )
        for key in _RATIOS:
            least = min(of_dtype, key=lambda row: row[key])
            what = f"{key}, least of all, {dtype} ({least['layer']} at {least['tokens']})"
            found.append(figure(what, least[key], "" if key == "x eager" else "at least 0.98"))
        stock = min((row["x against torch, eager"] for row in of_dtype if row["tokens"] <= 64), default=math.nan)
        found.append(figure(f"x against torch, eager, least at 1 to 64 tokens, {dtype}", stock, "at least 10"))
    overheads = [row["ours eager us"] - row["dense eager us"] for row in rows if row["tokens"] == 1]
    found.append(figure("eager above dense at 1 token, worst, us", max(overheads, default=math.nan), "at most 30"))
    found.append(figure("memory of a packed weight, part of dense", max(row["memory"] for row in rows), "at most 0.6"))
    return found


def save_grid(folder: Path, name: str, rows: Sequence[dict[str, Any]]) -> None:
    note = (
        "Microseconds a call; x: dense over ours, above 1 ours is faster. torch: `to_sparse_semi_structured`. Layers: "
        "(out_features, in_features). Kernels are chosen by measurement beforehand; `few` with its tiling is this "
        "package's own, `cusparselt` with its algorithm NVIDIA's."
    )
    write_result(folder, name, "Converted layers against dense ones", rows, note=note, quiet=True)
    write_result(folder, name, "Converted layers: the figures in short", bars(rows), part="bars", quiet=True)


def plot(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    figure, axes = pyplot.subplots(1, len(dtypes), figsize=(6.4 * len(dtypes), 4.6), sharey=True, squeeze=False)
    for axis, dtype in zip(axes[0], dtypes, strict=True):
        for layer in dict.fromkeys(row["layer"] for row in rows):
            mine = [row for row in rows if row["dtype"] == dtype and row["layer"] == layer]
            counts = [row["tokens"] for row in mine]
            (line,) = axis.plot(counts, [row["x graph"] for row in mine], marker="o", markersize=3, label=layer)
            torchs = [row["dense graph us"] / row["torch graph us"] for row in mine]
            axis.plot(counts, torchs, color=line.get_color(), linestyle=":", linewidth=1)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_xscale("log", base=2)
        axis.set_title(f"{dtype}: from a CUDA graph (dotted: torch's own)")
        axis.set_xlabel("tokens")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("dense time / sparse time")
    axes[0][0].legend(title="out x in features")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _shape(text: str) -> Shape:
    rows, columns = text.split("x")
    return int(rows), int(columns)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["all", "grid", "models"], default="all")
    parser.add_argument("--dtypes", nargs="+", choices=["bfloat16", "float16"], default=["bfloat16", "float16"])
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=["1B", "8B"])
    parser.add_argument("--prompt", type=int, default=4096, help="tokens of the prompt")
    parser.add_argument("--shapes", type=_shape, nargs="+", default=SHAPES, help="out x in, as 4096x4096")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--name", default="convert", help="of the result files: convert/VARIANT")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no CUDA GPU here")
    with torch.no_grad():
        if arguments.part != "models":
            rows = grid(arguments)
            plot(result_path(arguments.output, arguments.name, ".png"), rows)
            title = "Converted layers: the figures in short"
            write_result(arguments.output, arguments.name, title, bars(rows), part="bars")
        if arguments.part != "grid":
            found: list[dict[str, Any]] = []
            for name in arguments.models:
                found += model_rows(name, arguments.prompt, arguments.rounds, torch.device("cuda"))
                release_memory()
                save_models(arguments.output, arguments.name, found)


if __name__ == "__main__":
    main()
