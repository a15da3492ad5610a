"""Measure the kernels that could run a layer, on the user's GPU, and keep the times on disk.

Times depend on the shape and not on the values, so random 2:4 weights stand in for the layer's; several of them in
turn, together larger than the cache, as in a model other layers have run in between. Kernels are replayed from a CUDA
graph: the time of the host is about the same for all of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from prox24_lightning.convert import algorithm_search, cusparselt, few_tokens, kernel_cache
from prox24_lightning.convert.gpu_layout import buffer_bytes, padded_shape, random_buffer
from prox24_lightning.convert.kernel_table import BUCKETS, KernelTable, Times, choose, completed, unmeasured
from prox24_lightning.convert.kernels import Kernel, Run, prepare
from prox24_lightning.convert.nvrtc import NvrtcError
from prox24_lightning.convert.timing import capture, describe, measure, release_memory

_FEWEST_FOR_CUSPARSELT = 64  # below, it has never come near the package's own kernel
_CALLS = 8
_ROUNDS = 10


def kernel_table(
    shape: tuple[int, int],
    dtype: torch.dtype,
    *,
    token_counts: Sequence[int] = BUCKETS,
    keep_dense: bool = False,
    device: torch.device | None = None,
    cache: Path | None = None,
) -> KernelTable:
    """The fastest kernels of a shape on a GPU: from the cache where they are there, measured and added where not.

    Args:
        shape: (out_features, in_features).
        dtype: float16 or bfloat16.
        token_counts: those that matter; a call goes by the next one above its own number of tokens.
        keep_dense: whether cuBLAS on a kept dense weight is among the kernels.
        device: None takes the current GPU.
        cache: the file; None takes :func:`~prox24_lightning.convert.kernel_cache.default_path`.

    Raises:
        ValueError: if nothing packed runs at one of the token counts.
    """
    index = torch.cuda.current_device() if device is None or device.index is None else device.index
    counts = sorted(set(token_counts))
    path = cache or kernel_cache.default_path()
    place = kernel_cache.Place.here(index)
    known = kernel_cache.find(path, place, dtype, shape, counts)
    missing = [tokens for tokens in counts if tokens not in known]
    if missing:
        with torch.cuda.device(index), torch.no_grad():
            found = measure_kernels(shape, dtype, missing, index)
        known |= {times.tokens: times for times in found}
        kernel_cache.add(path, {kernel_cache.key(place, dtype, shape, t.tokens): t for t in found})
    return choose(shape, list(known.values()), keep_dense=keep_dense)


def stored_table(
    shape: tuple[int, int], dtype: torch.dtype, *, keep_dense: bool = False, device: int, cache: Path | None = None
) -> KernelTable:
    """What the cache holds of a shape, completed by rule: nothing is measured."""
    place = kernel_cache.Place.here(device)
    known = kernel_cache.find(cache or kernel_cache.default_path(), place, dtype, shape, BUCKETS)
    by_rule = unmeasured(shape, torch.cuda.get_device_capability(device), cusparselt.way(device)[0])
    measured = choose(shape, list(known.values()), keep_dense=keep_dense).rows
    return KernelTable(shape, completed(measured, by_rule.rows))


def measure_kernels(
    shape: tuple[int, int], dtype: torch.dtype, token_counts: Sequence[int], device: int
) -> list[Times]:
    """Time cuBLAS and every packed kernel of a shape at each number of tokens."""
    capability = torch.cuda.get_device_capability(device)
    on = torch.device("cuda", device)
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    copies = min(64, 2 + 2 * cache // buffer_bytes(shape))
    candidates, notes = _candidates(shape, dtype, token_counts, device, copies, capability)
    buffers = [random_buffer(shape, dtype, on, seed) for seed in range(copies)]
    weights = [few_tokens.expand(buffer, shape, dtype).contiguous() for buffer in buffers]
    results = [
        _time(shape, dtype, tokens, candidates[tokens], notes[tokens], weights, buffers) for tokens in token_counts
    ]
    del buffers, weights
    release_memory()
    return results


def _time(
    shape: tuple[int, int],
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
    turns = -(-_CALLS // len(buffers))

    def dense() -> None:
        for _ in range(turns):
            for weight in weights:
                F.linear(inputs, weight)

    def packed(run: Run) -> Callable[[], None]:
        def call() -> None:
            for _ in range(turns):
                for buffer in buffers:
                    run(padded, buffer, None, None)

        return call

    calls = {"dense": dense}
    problems = list(notes)
    for kernel in kernels:
        try:
            run = prepare(kernel, dtype, shape, tokens, device.index)
            run(padded, buffers[0], None, None)
            calls[str(kernel)] = packed(run)
        except (cusparselt.CusparseltError, NvrtcError, torch.OutOfMemoryError) as error:
            problems.append(f"{kernel}: {describe(error)}")
    graphs = {name: capture(call).replay for name, call in calls.items()}
    timings = measure(graphs, calls=turns * len(buffers), rounds=_ROUNDS)
    found = {name: timing.median_us for name, timing in timings.items()}
    return Times(tokens, found.pop("dense"), found, tuple(problems))


def _candidates(
    shape: tuple[int, int],
    dtype: torch.dtype,
    token_counts: Sequence[int],
    device: int,
    copies: int,
    capability: tuple[int, int],
) -> tuple[dict[int, list[Kernel]], dict[int, list[str]]]:
    """What is worth measuring at each number of tokens, and what is not there to be measured."""
    kernels: dict[int, list[Kernel]] = {}
    notes: dict[int, list[str]] = {tokens: [] for tokens in token_counts}
    own = {tokens: few_tokens.tilings(tokens, capability) for tokens in token_counts}
    _compile({tiling for found in own.values() for tiling in found}, dtype, capability)
    large = [tokens for tokens in token_counts if tokens >= _FEWEST_FOR_CUSPARSELT or not own[tokens]]
    way, why = cusparselt.way(device)
    answers: list[algorithm_search.Answer] = []
    if way == "cusparselt":
        name = str(dtype).removeprefix("torch.")
        jobs = [algorithm_search.Job(name, padded_shape(shape), tokens, copies, device) for tokens in large]
        answers = algorithm_search.search(jobs)
    for tokens in token_counts:
        kernels[tokens] = [Kernel.few(tiling) for tiling in own[tokens]]
    for at, tokens in enumerate(large):
        if way != "cusparselt":
            notes[tokens].append(f"no plans of cuSPARSELt: {why}")
            kernels[tokens] += [Kernel("torch")] if way == "torch" else []
        elif answers[at].problem:
            notes[tokens].append(answers[at].problem)
        else:
            kernels[tokens] += [Kernel("cusparselt", (algorithm,)) for algorithm in answers[at].algorithms]
        if tokens > few_tokens.MOST_TOKENS or not own[tokens]:
            kernels[tokens].append(Kernel("expand"))
    return kernels, notes


def _compile(tilings: set[few_tokens.Tiling], dtype: torch.dtype, capability: tuple[int, int]) -> None:
    """All at once: NVRTC runs outside Python's lock."""
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        list(pool.map(lambda tiling: few_tokens.program(tiling, dtype, capability), tilings))
