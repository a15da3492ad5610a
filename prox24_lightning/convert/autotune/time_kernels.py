"""Time the kernels that can run a layer on this GPU.

Times depend on the shape and not on the values, so random 2:4 weights take the place of the layer's: several in
rotation, together larger than the cache, as in a model other layers run in between. Kernels are replayed from a CUDA
graph: the host's time is about the same for all of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
from torch import Tensor

from prox24_lightning.convert.autotune.cusparselt_algorithms import AlgorithmJob, FastestAlgorithms, fastest_algorithms
from prox24_lightning.convert.autotune.kernel_table import KernelTimes
from prox24_lightning.convert.autotune.progress import TuningProgress
from prox24_lightning.convert.kernels.cuda_driver import CudaError
from prox24_lightning.convert.kernels.cusparselt.bindings import CusparseltError, support
from prox24_lightning.convert.kernels.expand.kernel import expand
from prox24_lightning.convert.kernels.packed_buffer import buffer_bytes, padded_shape, random_buffer
from prox24_lightning.convert.kernels.product import Product
from prox24_lightning.convert.kernels.registry import Kernel, compile_kernel, own_kernels, prepare
from prox24_lightning.convert.measurement import relative_error, release_memory, time_calls
from prox24_lightning.utils.cuda_graphs import capture
from prox24_lightning.utils.errors import describe

_FEWEST_FOR_CUSPARSELT = 64  # tokens; below, it has never come near the package's own kernels
_SHORT = 512  # up to so many tokens reading the weights counts, and more of them rotate
_ROUNDS = 10
_FINALISTS = 3
_LARGEST_ERROR = 2e-2  # relative, of a product in 16 bits; rounding makes less than a hundredth

Shape = tuple[int, int]
Point = tuple[Shape, int]
"""(out_features, in_features) and a number of tokens."""


def time_kernels(points: Sequence[Point], dtype: torch.dtype, device: int) -> dict[Point, KernelTimes]:
    """Time cuBLAS and every packed kernel at each point, with a progress bar.

    Args:
        points: shapes and numbers of tokens.
        dtype: float16 or bfloat16.
        device: index of the current GPU.
    """
    with TuningProgress() as progress:
        return _time_all(points, dtype, device, progress)


def _time_all(
    points: Sequence[Point], dtype: torch.dtype, device: int, progress: TuningProgress
) -> dict[Point, KernelTimes]:
    capability = torch.cuda.get_device_capability(device)
    own = {point: own_kernels(point[1], capability) for point in points}
    _compile({kernel for kernels in own.values() for kernel in kernels}, dtype, capability, progress)
    others = _other_kernels(points, dtype, device, own, progress)
    results = {}
    advance = progress.begin("kernels timed", len(points))
    for shape in dict.fromkeys(shape for shape, _ in points):
        gpu = torch.device("cuda", device)
        buffers = [random_buffer(shape, dtype, gpu, seed) for seed in range(_copies(shape, device))]
        weights = [expand(buffer, shape, dtype).contiguous() for buffer in buffers]
        for point in (point for point in points if point[0] == shape):
            kernels, notes = others[point]
            copies = _copies(shape, device, point[1])
            candidates = [*own[point], *kernels]
            results[point] = time_point(point, dtype, candidates, notes, weights[:copies], buffers[:copies])
            advance()
        del buffers, weights
        release_memory()
    return results


def _copies(shape: Shape, device: int, tokens: int = 1) -> int:
    """Return how many weights push the first out of the cache; with many tokens the inputs do."""
    if tokens > _SHORT:
        return 2
    return min(64, 2 + 2 * torch.cuda.get_device_properties(device).L2_cache_size // buffer_bytes(shape))


def _other_kernels(
    points: Sequence[Point],
    dtype: torch.dtype,
    device: int,
    own: Mapping[Point, tuple[Kernel, ...]],
    progress: TuningProgress,
) -> dict[Point, tuple[list[Kernel], list[str]]]:
    """Return the kernels of libraries that are worth measuring at each point, and why others are missing."""
    found: dict[Point, tuple[list[Kernel], list[str]]] = {point: ([], []) for point in points}
    wanted = [point for point in points if point[1] >= _FEWEST_FOR_CUSPARSELT or not own[point]]
    supported = support(device)
    answers: list[FastestAlgorithms] = []
    if supported.kernel == "cusparselt":
        name = str(dtype).removeprefix("torch.")
        answers = fastest_algorithms(
            [
                AlgorithmJob(name, padded_shape(shape), tokens, _copies(shape, device, tokens), device)
                for shape, tokens in wanted
            ],
            on_done=progress.begin("cuSPARSELt's algorithms", len(wanted)),
        )
    for index, point in enumerate(wanted):
        kernels, notes = found[point]
        if supported.kernel != "cusparselt":
            notes.append(f"no plans of cuSPARSELt: {supported.problem}")
            kernels += [Kernel("torch")] if supported.kernel == "torch" else []
        else:
            notes += [answers[index].problem] if answers[index].problem else []
            kernels += [Kernel("cusparselt", (algorithm,)) for algorithm in answers[index].algorithms]
        if not own[point]:
            kernels.append(Kernel("expand"))
    return found


def time_point(
    point: Point,
    dtype: torch.dtype,
    kernels: Sequence[Kernel],
    notes: Sequence[str],
    weights: Sequence[Tensor],
    buffers: Sequence[Tensor],
) -> KernelTimes:
    """Time cuBLAS and some kernels at one point; a kernel with wrong products is left out, with a note.

    Args:
        point: shape and number of tokens.
        dtype: float16 or bfloat16.
        kernels: the candidates.
        notes: notes to begin with.
        weights: dense (out_features, in_features) weights, which rotate.
        buffers: the same weights packed.
    """
    shape, tokens = point
    device = buffers[0].device
    inputs = torch.randn(tokens, shape[1], device=device, dtype=dtype)
    padded = F.pad(inputs, (0, padded_shape(shape)[1] - shape[1]))

    # Once each: in a long row of its own calls a kernel may hide its start better than in a model.
    def dense() -> None:
        for weight in weights:
            F.linear(inputs, weight)

    def packed(product: Product) -> Callable[[], None]:
        def call() -> None:
            for buffer in buffers:
                product(padded, buffer, None, None)

        return call

    calls = {"dense": dense}
    problems = list(notes)
    expected = F.linear(inputs, weights[0])
    for kernel in kernels:
        try:
            product = prepare(kernel, dtype, shape, tokens, device.index)
            error = relative_error(expected, product(padded, buffers[0], None, None))
            if not error < _LARGEST_ERROR:
                problems.append(f"{kernel}: wrong products on this machine, relative error {error:.1e}")
                continue
            calls[str(kernel)] = packed(product)
        except (CusparseltError, CudaError, torch.OutOfMemoryError) as failure:
            problems.append(f"{kernel}: {describe(failure)}")
    graphs = {name: capture(call).replay for name, call in calls.items()}
    times = {name: timing.median_us for name, timing in time_calls(graphs, calls=len(buffers), rounds=_ROUNDS).items()}
    # The fastest of many is partly the luckiest: the finalists are measured again.
    finalists = ["dense", *sorted(graphs.keys() - {"dense"}, key=times.__getitem__)[:_FINALISTS]]
    again = time_calls({name: graphs[name] for name in finalists}, calls=len(buffers), rounds=2 * _ROUNDS)
    times = {name: timing.median_us for name, timing in again.items()}
    return KernelTimes(tokens, times.pop("dense"), times, tuple(problems))


def _compile(kernels: set[Kernel], dtype: torch.dtype, capability: tuple[int, int], progress: TuningProgress) -> None:
    """Compile in parallel: NVRTC runs outside Python's lock."""
    advance = progress.begin("kernels compiled", len(kernels))
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        for _ in pool.map(lambda kernel: compile_kernel(kernel, dtype, capability), kernels):
            advance()
