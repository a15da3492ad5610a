"""Weights of 8 bits on this machine's GPU: 2:4 in float8 and int8 against dense float8 and against bfloat16.

    python -m benchmarks.convert_8bit
    python -m benchmarks.convert_8bit --tokens 1 64 4096 --no-search

Replayed from CUDA graphs over several weights in turn that no cache holds together. Rounding the tokens is part of
every time in 8 bits. Each form takes its fastest kernel, chosen beforehand; then all forms are measured in turns.
"Dense fp8" has a scale a row and a token, as the packed weight; "one scale" is faster and coarser: one scale a matrix,
fixed before. Dense weights are dense: without zeros, which cost less power.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.result_files import write_result
from prox24_lightning.convert.autotune.cusparselt_algorithms import AlgorithmJob, fastest_algorithms
from prox24_lightning.convert.kernels import packed_buffer, rounded_buffer
from prox24_lightning.convert.kernels.cusparselt.bindings import support
from prox24_lightning.convert.kernels.product import Product
from prox24_lightning.convert.kernels.registry import (
    Kernel,
    compile_kernel,
    dense_fp8_kernels,
    own_kernels,
    prepare,
)
from prox24_lightning.convert.kernels.round_tokens import kernel as round_tokens
from prox24_lightning.convert.measurement import release_memory, time_calls
from prox24_lightning.utils.cuda_graphs import capture
from prox24_lightning.weights.rounding import RoundedForm, round_rows

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (8192, 8192))
"""(out_features, in_features): attention, the up and down projections of LLaMA 3 8B, and a square one."""

TOKENS = (1, 8, 16, 64, 256, 1024, 4096, 16384)

BARS = (
    ("1 to 64 tokens", 1, 64, 1.30, 2.2),
    ("256 tokens", 256, 256, 1.15, None),
    ("1024 tokens", 1024, 1024, 1.15, None),
    ("4096 tokens", 4096, 4096, 1.35, 2.4),
    ("16384 tokens", 16384, 16384, 1.45, None),
)
"""Numbers of tokens, and the least geometric means: over dense fp8, over dense bf16."""

_DTYPE = torch.bfloat16
_FORMS: dict[str, RoundedForm | None] = {"packed bf16": None, "packed fp8": "fp8_e4m3", "packed int8": "int8"}
_FEWEST_SEARCHED = 256  # tokens from which cuSPARSELt is tried in bfloat16
_MANY = 1024  # from so many on two weights in turn are enough: the inputs and results push them out of the cache
_CHOICE_ROUNDS = 3

Shape = tuple[int, int]
Call = Callable[[], None]


def shape_rows(
    shape: Shape, token_counts: Sequence[int], algorithms: dict[tuple[Shape, int], tuple[int, ...]], rounds: int
) -> list[dict[str, Any]]:
    device = torch.cuda.current_device()
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    copies = 2 + 2 * cache // rounded_buffer.buffer_bytes(shape)
    weights = {name: _packed(shape, form, copies) for name, form in _FORMS.items()}
    dense = [torch.randn(shape, device="cuda", dtype=_DTYPE) for _ in range(copies)]
    dense_fp8 = [rounded_buffer.to_dense_buffer(round_rows(weight, "fp8_e4m3")) for weight in dense]
    rows = []
    for tokens in token_counts:
        inputs = torch.randn(tokens, shape[1], device="cuda", dtype=_DTYPE)
        used = copies if tokens < _MANY else 2
        found = {"dense bf16": ("dense", _dense(inputs, dense[:used]))}
        fp8_kernels = dense_fp8_kernels(torch.cuda.get_device_capability())
        found["dense fp8"] = _fastest(fp8_kernels, shape, inputs, "fp8_e4m3", dense_fp8[:used])
        found["one scale"] = ("dense_fp8", _one_scale(inputs, dense_fp8[:used], shape))
        for name, form in _FORMS.items():
            kernels = _kernels(shape, tokens, form, algorithms)
            found[name] = _fastest(kernels, shape, inputs, form, weights[name][:used])
        graphs = {name: capture(call).replay for name, (_, call) in found.items()}
        times = time_calls(graphs, calls=used, rounds=rounds if tokens < 4096 else max(2, rounds // 2))
        us = {name: timing.median_us for name, timing in times.items()}
        rows.append(
            {
                "layer": f"{shape[0]} x {shape[1]}",
                "tokens": tokens,
                **{f"{name} us": us[name] for name in ("dense bf16", "dense fp8", "one scale", *_FORMS)},
                "fp8 x dense fp8": us["dense fp8"] / us["packed fp8"],
                "int8 x dense fp8": us["dense fp8"] / us["packed int8"],
                "fp8 x one scale": us["one scale"] / us["packed fp8"],
                "fp8 x dense bf16": us["dense bf16"] / us["packed fp8"],
                "fp8 x fastest dense": min(us["dense fp8"], us["dense bf16"]) / us["packed fp8"],
                **{f"{name} kernel": str(found[name][0]) for name in ("dense fp8", *_FORMS)},
            }
        )
        print(*(round(value, 2) if type(value) is float else value for value in rows[-1].values()), flush=True)
        del graphs, found
    return rows


def _kernels(
    shape: Shape, tokens: int, form: RoundedForm | None, algorithms: dict[tuple[Shape, int], tuple[int, ...]]
) -> list[Kernel]:
    kernels = list(own_kernels(tokens, torch.cuda.get_device_capability(), form))
    if form is None:
        kernels += [Kernel("cusparselt", (algorithm,)) for algorithm in algorithms.get((shape, tokens), ())]
    if not kernels:
        kernels.append(Kernel("cusparselt"))
    return kernels


def _compile(token_counts: Sequence[int]) -> None:
    """Compile in parallel: NVRTC runs outside Python's lock."""
    capability = torch.cuda.get_device_capability()
    found = {
        (kernel, form)
        for tokens in token_counts
        for form in _FORMS.values()
        for kernel in own_kernels(tokens, capability, form)
    }
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda each: compile_kernel(each[0], _DTYPE, capability, each[1]), found))


def _packed(shape: Shape, form: RoundedForm | None, count: int) -> list[Tensor]:
    gpu = torch.device("cuda", torch.cuda.current_device())
    if form is None:
        return [packed_buffer.random_buffer(shape, _DTYPE, gpu, seed) for seed in range(count)]
    return [rounded_buffer.random_buffer(shape, form, gpu, seed) for seed in range(count)]


def _fastest(
    kernels: Sequence[Kernel], shape: Shape, inputs: Tensor, form: RoundedForm | None, buffers: Sequence[Tensor]
) -> tuple[Kernel, Call]:
    calls: dict[str, Call] = {}
    for kernel in kernels:
        product = prepare(kernel, _DTYPE, shape, len(inputs), inputs.device.index, form)

        def call(product: Product = product) -> None:
            for buffer in buffers:
                product(inputs, buffer, None, None)

        calls[str(kernel)] = call
    best = next(iter(calls))
    if len(calls) > 1:
        times = time_calls({name: capture(call).replay for name, call in calls.items()}, rounds=_CHOICE_ROUNDS)
        best = min(times, key=lambda name: times[name].median_us)
    return Kernel.parse(best), calls[best]


def _dense(inputs: Tensor, weights: Sequence[Tensor]) -> Call:
    def call() -> None:
        for weight in weights:
            F.linear(inputs, weight)

    return call


def _one_scale(inputs: Tensor, buffers: Sequence[Tensor], shape: Shape) -> Call:
    tokens, columns = inputs.shape
    device = inputs.device.index
    rounding = round_tokens.prepare("fp8_e4m3", _DTYPE, columns, columns, tokens, device)
    one, scale = torch.ones((), device="cuda"), torch.full((4,), 0.01, device="cuda")
    matrices = [rounded_buffer.dense_parts(buffer, shape)[0].view(torch.float8_e4m3fn).t() for buffer in buffers]

    def call() -> None:
        for matrix in matrices:
            rounded = round_tokens.values_view(rounding(inputs, scale.data_ptr()), "fp8_e4m3", tokens, columns)
            torch._scaled_mm(rounded, matrix, scale_a=one, scale_b=one, out_dtype=_DTYPE, use_fast_accum=True)

    return call


def bars(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The geometric means over the shapes, each beside its bar."""
    found = []
    for what, few, many, over_fp8, over_bf16 in BARS:
        there = [row for row in rows if few <= row["tokens"] <= many]
        bar = {"fp8 x dense fp8": over_fp8, "fp8 x dense bf16": over_bf16}
        for key in ("fp8 x dense fp8", "int8 x dense fp8", "fp8 x one scale", "fp8 x dense bf16") if there else ():
            mean = math.exp(sum(math.log(row[key]) for row in there) / len(there))
            least = bar.get(key)
            found.append(
                {"figure": f"{key}, geometric mean, {what}", "value": mean, "bar": f"at least {least}" if least else ""}
            )
    worst = min(rows, key=lambda row: row["fp8 x fastest dense"])
    what = f"fp8 x fastest dense, least of all ({worst['layer']} at {worst['tokens']})"
    found.append({"figure": what, "value": worst["fp8 x fastest dense"], "bar": "at least 0.98"})
    return found


def _shape(text: str) -> Shape:
    rows, columns = text.split("x")
    return int(rows), int(columns)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    parser.add_argument("--shapes", type=_shape, nargs="+", default=SHAPES, help="out x in, as 4096x4096")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--no-search", action="store_true", help="cuSPARSELt's default algorithm in bfloat16")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no CUDA GPU here")
    tokens = sorted(set(arguments.tokens))
    points = [(shape, count) for shape in arguments.shapes for count in tokens if count >= _FEWEST_SEARCHED]
    algorithms: dict[tuple[Shape, int], tuple[int, ...]] = {}
    if not arguments.no_search and support(torch.cuda.current_device()).kernel == "cusparselt":
        jobs = [AlgorithmJob("bfloat16", shape, count, 2, torch.cuda.current_device()) for shape, count in points]
        answers = fastest_algorithms(jobs)
        algorithms = {point: answer.algorithms for point, answer in zip(points, answers, strict=True)}
    note = (
        "Microseconds a product, rounding of the tokens included; x: the other form over the packed one, above 1 the "
        "packed one is faster. Layers: (out_features, in_features). `one scale`: dense float8 with one scale a matrix."
    )
    _compile(tokens)
    gc.freeze()  # each capture collects garbage, which takes longer than the products with all modules to look through
    rows: list[dict[str, Any]] = []
    for shape in arguments.shapes:
        rows += shape_rows(shape, tokens, algorithms, arguments.rounds)
        write_result(arguments.output, "convert_8bit", "Weights of 8 bits", rows, note=note, quiet=True)
        release_memory()
    write_result(arguments.output, "convert_8bit", "Weights of 8 bits: the figures in short", bars(rows), part="bars")


if __name__ == "__main__":
    main()
