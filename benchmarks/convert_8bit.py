"""Weights of 8 bits on this machine's GPU: 2:4 in float8 and int8 against dense float8 and against bfloat16.

    python -m benchmarks.convert_8bit
    python -m benchmarks.convert_8bit --tokens 1 64 4096 --search --seconds 600
    python -m benchmarks.convert_8bit --tokens 1 4096 --ways

Replayed from CUDA graphs over several weights in turn that no cache holds together. Rounding the tokens is part of
every time in 8 bits. Each form takes its fastest kernel, chosen beforehand; then all forms are measured in turns.
"Dense fp8" has a scale a row and a token, as the packed weight; "one scale" is faster and coarser: one scale a matrix,
fixed before. Dense weights are dense: without zeros, which cost less power.

The tables are written after every number of tokens; one that would not end within ``--seconds`` is left out, and named.
Packed bfloat16 takes cuSPARSELt's default algorithm for many tokens unless ``--search`` tries them all, for minutes.
``--ways`` measures the fastest float8 kernel of each way of rounding the tokens in the same turns, for another table.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.result_files import write_result
from prox24_lightning.convert.autotune.cusparselt_algorithms import AlgorithmJob, fastest_algorithms
from prox24_lightning.convert.kernels import packed_buffer, rounded_buffer
from prox24_lightning.convert.kernels.cusparselt.bindings import support
from prox24_lightning.convert.kernels.many_tokens.tiling import Tiling as ManyTokensTiling
from prox24_lightning.convert.kernels.product import Product
from prox24_lightning.convert.kernels.registry import (
    Kernel,
    compile_kernel,
    dense_fp8_kernels,
    own_kernels,
    prepare,
)
from prox24_lightning.convert.kernels.round_tokens import kernel as round_tokens
from prox24_lightning.convert.kernels.warpgroup.tiling import Tiling as WarpgroupTiling
from prox24_lightning.convert.measurement import release_memory, time_calls
from prox24_lightning.utils.devices.cuda_graphs import capture
from prox24_lightning.weights.rounding import RoundedForm, round_rows

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (8192, 8192))
"""(out_features, in_features): attention, the up and down projections of LLaMA 3 8B, and a square one."""

TOKENS = (1, 16, 64, 256, 1024, 4096, 16384)

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
_IN_SHORT = "Weights of 8 bits: the figures in short"
_WAYS = ("before", "within", "beside")
_WAYS_TITLE = "Weights of 8 bits: ways of rounding the tokens"
_WAYS_NOTE = (
    "Microseconds a product of packed fp8, rounding included, of the fastest kernel that rounds all tokens before the "
    "product, one token within the product's blocks, or those of later tiles beside the product."
)

Shape = tuple[int, int]
Call = Callable[[], None]
Chosen = tuple["Kernel | str", Call]


class ShapeBenchmark:
    """Weights of one shape in every form, several that no cache holds together."""

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        self.ways: list[dict[str, Any]] = []
        cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self._copies = 2 + 2 * cache // rounded_buffer.buffer_bytes(shape)
        self._packed = {name: _packed(shape, form, self._copies) for name, form in _FORMS.items()}
        self._dense = [torch.randn(shape, device="cuda", dtype=_DTYPE) for _ in range(self._copies)]
        self._fp8 = [rounded_buffer.to_dense_buffer(round_rows(weight, "fp8_e4m3")) for weight in self._dense]

    def used(self, tokens: int) -> int:
        """How many products of different weights one replay holds."""
        return self._copies if tokens < _MANY else 2

    def fastest(self, tokens: int, algorithms: Sequence[int] = (), *, ways: bool = False) -> dict[str, Chosen]:
        """Choose the kernel of each form: its name, and what replays its products.

        Args:
            tokens: of each product.
            algorithms: of cuSPARSELt in bfloat16.
            ways: whether each way of rounding takes part.
        """
        shape = self._shape
        inputs = torch.randn(tokens, shape[1], device="cuda", dtype=_DTYPE)
        used = self.used(tokens)
        fp8 = self._fp8[:used]
        found: dict[str, Chosen] = {
            "dense bf16": ("dense", _graph(_dense(inputs, self._dense[:used]))),
            "dense fp8": _fastest(dense_fp8_kernels(_capability()), shape, inputs, "fp8_e4m3", fp8),
            "one scale": ("dense_fp8", _graph(_one_scale(inputs, fp8, shape))),
        }
        for name, form in _FORMS.items():
            kernels = _kernels(tokens, form, algorithms)
            found[name] = _fastest(kernels, shape, inputs, form, self._packed[name][:used])
            if ways and form == "fp8_e4m3":
                for way in dict.fromkeys(map(_way, kernels)):
                    able = [kernel for kernel in kernels if _way(kernel) == way]
                    found[way] = _fastest(able, shape, inputs, form, self._packed[name][:used])
        return found

    def row(self, tokens: int, algorithms: Sequence[int], rounds: int, *, ways: bool = False) -> dict[str, Any]:
        """Choose the kernel of each form, then measure all forms in turns.

        Args:
            tokens, algorithms, ways: as in :meth:`fastest`; the times of each way are added to ``self.ways``.
            rounds: of the measurement.
        """
        shape = self._shape
        found = self.fastest(tokens, algorithms, ways=ways)
        graphs = {name: replay for name, (_, replay) in found.items()}
        times = time_calls(graphs, calls=self.used(tokens), rounds=rounds if tokens < 4096 else max(2, rounds // 2))
        us = {name: timing.median_us for name, timing in times.items()}
        point = {"layer": f"{shape[0]} x {shape[1]}", "tokens": tokens}
        if ways:
            numbers = {f"{way} us": us.get(way, "") for way in _WAYS}
            self.ways.append({**point, **numbers, **{way: str(found[way][0]) if way in found else "" for way in _WAYS}})
        return {
            **point,
            **{f"{name} us": us[name] for name in ("dense bf16", "dense fp8", "one scale", *_FORMS)},
            "fp8 x dense fp8": us["dense fp8"] / us["packed fp8"],
            "int8 x dense fp8": us["dense fp8"] / us["packed int8"],
            "fp8 x one scale": us["one scale"] / us["packed fp8"],
            "fp8 x dense bf16": us["dense bf16"] / us["packed fp8"],
            "fp8 x fastest dense": min(us["dense fp8"], us["dense bf16"]) / us["packed fp8"],
            **{f"{name} kernel": str(found[name][0]) for name in ("dense fp8", *_FORMS)},
        }


class Deadline:
    """Says whether a number of tokens can still be measured, from the longest so far."""

    def __init__(self, seconds: float) -> None:
        self._begin, self._seconds, self._longest = time.perf_counter(), seconds, 0.0

    @property
    def passed(self) -> float:
        """Seconds since the beginning."""
        return time.perf_counter() - self._begin

    def allows(self) -> bool:
        """Whether one more as long as the longest so far ends in time."""
        return self.passed + self._longest <= self._seconds

    def took(self, seconds: float) -> None:
        """Note how long one took."""
        self._longest = max(self._longest, seconds)


def _capability() -> tuple[int, int]:
    return torch.cuda.get_device_capability()


def _kernels(tokens: int, form: RoundedForm | None, algorithms: Sequence[int]) -> list[Kernel]:
    kernels = list(own_kernels(tokens, _capability(), form))
    if form is None:
        kernels += [Kernel("cusparselt", (algorithm,)) for algorithm in algorithms]
    if not kernels:
        kernels.append(Kernel("cusparselt"))
    return kernels


def _way(kernel: Kernel) -> str:
    """Return which of ``_WAYS`` a float8 kernel rounds its tokens in."""
    if kernel.name == "many" and ManyTokensTiling(*kernel.config).beside:
        return "beside"
    return "within" if kernel.name == "warpgroup" and WarpgroupTiling(*kernel.config).within else "before"


def compile_kernels(token_counts: Sequence[int]) -> None:
    """Compile in parallel: NVRTC runs outside Python's lock."""
    capability = _capability()
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
    """Return the fastest kernel, and its graph over all buffers."""
    replays: dict[str, Call] = {}
    for kernel in kernels:
        product = prepare(kernel, _DTYPE, shape, len(inputs), inputs.device.index, form)

        def call(product: Product = product) -> None:
            for buffer in buffers:
                product(inputs, buffer, None, None)

        replays[str(kernel)] = _graph(call)
    best = next(iter(replays))
    if len(replays) > 1:
        times = time_calls(replays, rounds=_CHOICE_ROUNDS)
        best = min(times, key=lambda name: times[name].median_us)
    return Kernel.parse(best), replays[best]


def _graph(call: Call) -> Call:
    """Return what replays ``call`` as a CUDA graph, and keeps the plans and workspaces that the graph uses."""
    return partial(_replay, capture(call, warm_ups=1), call)


def _replay(graph: torch.cuda.CUDAGraph, call: Call) -> None:
    graph.replay()


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
    parser.add_argument("--search", action="store_true", help="try cuSPARSELt's algorithms in bfloat16, for minutes")
    parser.add_argument("--ways", action="store_true", help="measure each way of rounding the tokens too")
    parser.add_argument("--seconds", type=float, default=200, help="of all, without the search")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no CUDA GPU here")
    tokens = sorted(set(arguments.tokens))
    points = [(shape, count) for shape in arguments.shapes for count in tokens if count >= _FEWEST_SEARCHED]
    algorithms: dict[tuple[Shape, int], tuple[int, ...]] = {}
    if arguments.search and support(torch.cuda.current_device()).kernel == "cusparselt":
        jobs = [AlgorithmJob("bfloat16", shape, count, 2, torch.cuda.current_device()) for shape, count in points]
        answers = fastest_algorithms(jobs)
        algorithms = {point: answer.algorithms for point, answer in zip(points, answers, strict=True)}
    deadline = Deadline(arguments.seconds)
    note = (
        "Microseconds a product, rounding of the tokens included; x: the other form over the packed one, above 1 the "
        "packed one is faster. Layers: (out_features, in_features). `one scale`: dense float8 with one scale a matrix."
    )
    compile_kernels(tokens)
    gc.freeze()  # each capture collects garbage, which takes longer than the products with all modules to look through
    rows: list[dict[str, Any]] = []
    ways: list[dict[str, Any]] = []
    missing: list[str] = []
    for shape in arguments.shapes:
        weights = ShapeBenchmark(shape)
        for count in tokens:
            if not deadline.allows():
                missing.append(f"{shape[0]} x {shape[1]} at {count}")
                continue
            begin = deadline.passed
            found = algorithms.get((shape, count), ())
            rows.append(weights.row(count, found, arguments.rounds, ways=arguments.ways))
            deadline.took(deadline.passed - begin)
            print(f"{deadline.passed:.0f} s:", *(_short(value) for value in rows[-1].values()), flush=True)
            write_result(arguments.output, "convert_8bit", "Weights of 8 bits", rows, note=note, quiet=True)
            figures = bars(rows)
            write_result(arguments.output, "convert_8bit", _IN_SHORT, figures, part="bars", quiet=True)
        if weights.ways:
            ways += weights.ways
            write_result(arguments.output, "convert_8bit", _WAYS_TITLE, ways, part="ways", note=_WAYS_NOTE, quiet=True)
        del weights
        release_memory()
    if missing:
        print(f"not measured within {arguments.seconds:g} s: {', '.join(missing)}")
    if rows:
        write_result(arguments.output, "convert_8bit", _IN_SHORT, bars(rows), part="bars")
    if ways:
        write_result(arguments.output, "convert_8bit", _WAYS_TITLE, ways, part="ways", note=_WAYS_NOTE)


def _short(value: Any) -> Any:
    return round(value, 2) if isinstance(value, float) else value


if __name__ == "__main__":
    main()
