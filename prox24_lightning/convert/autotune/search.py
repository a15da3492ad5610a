"""Measure the kernels that could run a layer, on the user's GPU, and keep the times on disk.

Times depend on the shape and not on the values, so random 2:4 weights stand in for the layer's; several of them in
turn, together larger than the cache, as in a model other layers have run in between. Kernels are replayed from a CUDA
graph: the time of the host is about the same for all of them.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from prox24_lightning.convert.autotune import algorithms as algorithm_search
from prox24_lightning.convert.autotune import cache as kernel_cache
from prox24_lightning.convert.autotune.progress import SearchProgress
from prox24_lightning.convert.autotune.table import BUCKETS, KernelTable, Times, choose, completed, unmeasured
from prox24_lightning.convert.benchmark.timing import capture, describe, measure, relative_error, release_memory
from prox24_lightning.convert.kernels import nvrtc
from prox24_lightning.convert.kernels.buffer_layout import buffer_bytes, padded_shape, random_buffer
from prox24_lightning.convert.kernels.cusparselt import library as cusparselt
from prox24_lightning.convert.kernels.few_tokens import kernel as few_tokens
from prox24_lightning.convert.kernels.nvrtc import NvrtcError
from prox24_lightning.convert.kernels.registry import Kernel, Run, compile_kernel, own_kernels, prepare

_FEWEST_FOR_CUSPARSELT = 64  # below, it has never come near the package's own kernel
_SHORT = 512  # up to so many tokens the weights' reading counts, and more of them take turns
_ROUNDS = 10
_FINALISTS = 3
_LARGEST_ERROR = 2e-2  # of a product in 16 bits; rounding makes less than a hundredth

Shape = tuple[int, int]

log = logging.getLogger(__name__)


def kernel_tables(
    shapes: Sequence[Shape],
    dtype: torch.dtype,
    *,
    token_counts: Sequence[int] = BUCKETS,
    keep_dense: bool = False,
    device: torch.device | None = None,
    cache: Path | None = None,
) -> dict[Shape, KernelTable]:
    """The fastest kernels of each shape on a GPU: from the cache where they are there, measured and added where not.

    Args:
        shapes: (out_features, in_features) of each.
        dtype: float16 or bfloat16.
        token_counts: those that matter; a call goes by the next one above its own number of tokens.
        keep_dense: whether cuBLAS on a kept dense weight is among the kernels.
        device: None takes the current GPU.
        cache: the file; None takes :func:`~prox24_lightning.convert.autotune.cache.default_path`.

    Raises:
        ValueError: if nothing packed runs at one of the token counts.
    """
    index = torch.cuda.current_device() if device is None or device.index is None else device.index
    counts = sorted(set(token_counts))
    path = cache or kernel_cache.default_path()
    place = kernel_cache.Place.here(index)
    known = {shape: kernel_cache.find(path, place, dtype, shape, counts) for shape in dict.fromkeys(shapes)}
    missing = [(shape, tokens) for shape, found in known.items() for tokens in counts if tokens not in found]
    if missing:
        with torch.cuda.device(index), torch.no_grad():
            measured = measure_kernels(missing, dtype, index)
        for (shape, tokens), times in measured.items():
            known[shape][tokens] = times
        try:
            kernel_cache.add(path, {kernel_cache.key(place, dtype, *at): times for at, times in measured.items()})
        except OSError as error:
            log.warning("measured times are not kept for the next run: %s; set $%s", error, kernel_cache.PATH_VARIABLE)
    return {shape: choose(shape, list(found.values()), keep_dense=keep_dense) for shape, found in known.items()}


def stored_table(
    shape: Shape, dtype: torch.dtype, *, keep_dense: bool = False, device: int, cache: Path | None = None
) -> KernelTable:
    """What the cache holds of a shape, completed by rule: nothing is measured."""
    place = kernel_cache.Place.here(device)
    known = kernel_cache.find(cache or kernel_cache.default_path(), place, dtype, shape)
    capability, large = torch.cuda.get_device_capability(device), cusparselt.way(device)[0]
    by_rule = unmeasured(shape, capability, large, own=nvrtc.is_available())
    measured = choose(shape, list(known.values()), keep_dense=keep_dense).rows
    return KernelTable(shape, completed(measured, by_rule.rows))


def measure_kernels(
    points: Sequence[tuple[Shape, int]], dtype: torch.dtype, device: int
) -> dict[tuple[Shape, int], Times]:
    """Time cuBLAS and every packed kernel at each (shape, number of tokens); a bar tells how far it is."""
    with SearchProgress() as bar:
        return _measured(points, dtype, device, bar)


def _measured(
    points: Sequence[tuple[Shape, int]], dtype: torch.dtype, device: int, bar: SearchProgress
) -> dict[tuple[Shape, int], Times]:
    capability = torch.cuda.get_device_capability(device)
    own = {at: own_kernels(at[1], capability) for at in points}
    _compile({kernel for found in own.values() for kernel in found}, dtype, capability, bar)
    large = _large(points, dtype, device, own, bar)
    results = {}
    advance = bar.begin("kernels timed", len(points))
    for shape in dict.fromkeys(shape for shape, _ in points):
        on = torch.device("cuda", device)
        buffers = [random_buffer(shape, dtype, on, seed) for seed in range(_copies(shape, device))]
        weights = [few_tokens.expand(buffer, shape, dtype).contiguous() for buffer in buffers]
        for at in (at for at in points if at[0] == shape):
            kernels, notes = large[at]
            kernels = [*own[at], *kernels]
            copies = _copies(shape, device, at[1])
            results[at] = _time(shape, dtype, at[1], kernels, notes, weights[:copies], buffers[:copies])
            advance()
        del buffers, weights
        release_memory()
    return results


def _copies(shape: Shape, device: int, tokens: int = 1) -> int:
    """So many weights that the first is out of the cache when the last has been read; with many tokens it is anyway."""
    if tokens > _SHORT:
        return 2
    return min(64, 2 + 2 * torch.cuda.get_device_properties(device).L2_cache_size // buffer_bytes(shape))


def _large(
    points: Sequence[tuple[Shape, int]],
    dtype: torch.dtype,
    device: int,
    own: Mapping[tuple[Shape, int], tuple[Kernel, ...]],
    bar: SearchProgress,
) -> dict[tuple[Shape, int], tuple[list[Kernel], list[str]]]:
    """Kernels for many tokens that are worth measuring at each point, and why others are not there."""
    found: dict[tuple[Shape, int], tuple[list[Kernel], list[str]]] = {at: ([], []) for at in points}
    wanted = [at for at in points if at[1] >= _FEWEST_FOR_CUSPARSELT or not own[at]]
    way, why = cusparselt.way(device)
    answers: list[algorithm_search.Answer] = []
    if way == "cusparselt":
        name = str(dtype).removeprefix("torch.")
        answers = algorithm_search.search(
            [
                algorithm_search.Job(name, padded_shape(s), tokens, _copies(s, device, tokens), device)
                for s, tokens in wanted
            ],
            on_done=bar.begin("cuSPARSELt's algorithms", len(wanted)),
        )
    for index, at in enumerate(wanted):
        kernels, notes = found[at]
        if way != "cusparselt":
            notes.append(f"no plans of cuSPARSELt: {why}")
            kernels += [Kernel("torch")] if way == "torch" else []
        else:
            notes += [answers[index].problem] if answers[index].problem else []
            kernels += [Kernel("cusparselt", (algorithm,)) for algorithm in answers[index].algorithms]
        if not own[at]:
            kernels.append(Kernel("expand"))
    return found


def _time(
    shape: Shape,
    dtype: torch.dtype,
    tokens: int,
    kernels: Sequence[Kernel],
    notes: Sequence[str],
    weights: Sequence[Tensor],
    buffers: Sequence[Tensor],
) -> Times:
    device = buffers[0].device
    inputs = torch.randn(tokens, shape[1], device=device, dtype=dtype)
    padded = F.pad(inputs, (0, padded_shape(shape)[1] - shape[1]))

    # Once each: in a long row of its own calls a kernel may hide its start better than in a model.
    def dense() -> None:
        for weight in weights:
            F.linear(inputs, weight)

    def packed(run: Run) -> Callable[[], None]:
        def call() -> None:
            for buffer in buffers:
                run(padded, buffer, None, None)

        return call

    calls = {"dense": dense}
    problems = list(notes)
    expected = F.linear(inputs, weights[0])
    for kernel in kernels:
        try:
            run = prepare(kernel, dtype, shape, tokens, device.index)
            error = relative_error(expected, run(padded, buffers[0], None, None))
            if not error < _LARGEST_ERROR:
                problems.append(f"{kernel}: wrong products on this machine, relative error {error:.1e}")
                continue
            calls[str(kernel)] = packed(run)
        except (cusparselt.CusparseltError, NvrtcError, torch.OutOfMemoryError) as failure:
            problems.append(f"{kernel}: {describe(failure)}")
    graphs = {name: capture(call).replay for name, call in calls.items()}
    found = {name: timing.median_us for name, timing in measure(graphs, calls=len(buffers), rounds=_ROUNDS).items()}
    # The fastest of many is partly the luckiest: what is decided between is measured again.
    last = ["dense", *sorted(graphs.keys() - {"dense"}, key=found.__getitem__)[:_FINALISTS]]
    again = measure({name: graphs[name] for name in last}, calls=len(buffers), rounds=2 * _ROUNDS)
    found = {name: timing.median_us for name, timing in again.items()}
    return Times(tokens, found.pop("dense"), found, tuple(problems))


def _compile(kernels: set[Kernel], dtype: torch.dtype, capability: tuple[int, int], bar: SearchProgress) -> None:
    """All at once: NVRTC runs outside Python's lock."""
    advance = bar.begin("kernels compiled", len(kernels))
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        for _ in pool.map(lambda kernel: compile_kernel(kernel, dtype, capability), kernels):
            advance()
