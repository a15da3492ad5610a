"""Time the kernels that can run a layer on this GPU.

Times depend on the shape and not on the values, so random 2:4 weights take the place of the layer's: several in
rotation, together larger than the cache, as in a model other layers run in between. Kernels are replayed from a CUDA
graph: the host's time is about the same for all of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from prox24_lightning.convert.autotune.cusparselt_algorithms import AlgorithmJob, FastestAlgorithms, fastest_algorithms
from prox24_lightning.convert.autotune.kernel_table import TINY, KernelTimes
from prox24_lightning.convert.autotune.progress import TuningProgress
from prox24_lightning.convert.kernels import packed_buffer, rounded_buffer
from prox24_lightning.convert.kernels.cuda_driver import CudaError
from prox24_lightning.convert.kernels.cusparselt.bindings import CusparseltError, support
from prox24_lightning.convert.kernels.expand.kernel import expand
from prox24_lightning.convert.kernels.product import Product
from prox24_lightning.convert.kernels.registry import (
    Kernel,
    compile_kernel,
    dense_fp8_kernels,
    missing_inputs,
    own_kernels,
    prepare,
)
from prox24_lightning.convert.kernels.round_tokens.reference import round_tokens
from prox24_lightning.convert.measurement import relative_error, release_memory, time_calls
from prox24_lightning.utils.devices.cuda_graphs import capture
from prox24_lightning.utils.errors import describe
from prox24_lightning.weights.rounding import RoundedForm, round_rows

_FEWEST_FOR_CUSPARSELT = 64  # tokens; below, it has never come near the package's own kernels
_FEWEST_FOR_CUSPARSELT_ROUNDED = 512  # where scaling its sums in a pass of their own is worth it, if ever
_SHORT = 512  # up to so many tokens reading the weights counts, and more of them rotate
_ROUNDS = 10
_FINALISTS = 3
_LARGEST_ERROR = 2e-2  # relative, of a product in 16 bits, or of tokens rounded alike; less than a hundredth is right
_LARGEST_ROUNDING = 0.1  # relative, of a product in float8 against one in 16 bits; a twentieth is right

Shape = tuple[int, int]
Point = tuple[Shape, int]
"""(out_features, in_features) and a number of tokens."""


def time_kernels(
    points: Sequence[Point], dtype: torch.dtype, device: int, form: RoundedForm | None = None
) -> dict[Point, KernelTimes]:
    """Time the dense forms and every packed kernel at each point, with a progress bar.

    Args:
        points: shapes and numbers of tokens.
        dtype: float16 or bfloat16, of inputs and outputs.
        device: index of the current GPU.
        form: of packed weights of 8 bits; None for weights in ``dtype``.
    """
    with TuningProgress() as progress:
        return _time_all(points, dtype, device, form, progress)


def _time_all(
    points: Sequence[Point], dtype: torch.dtype, device: int, form: RoundedForm | None, progress: TuningProgress
) -> dict[Point, KernelTimes]:
    capability = torch.cuda.get_device_capability(device)
    own = {point: own_kernels(point[1], capability, form) for point in points}
    _compile({kernel for kernels in own.values() for kernel in kernels}, dtype, capability, form, progress)
    others = _other_kernels(points, dtype, device, form, own, progress)
    results = {}
    advance = progress.begin("kernels timed", len(points))
    for shape in dict.fromkeys(shape for shape, _ in points):
        weights = random_weights(shape, dtype, device, form, _copies(shape, device, form))
        for point in (point for point in points if point[0] == shape):
            kernels, notes = others[point]
            copies = _copies(shape, device, form, point[1])
            candidates = [*own[point], *kernels, *(dense_fp8_kernels(capability) if weights.dense_fp8 else ())]
            results[point] = time_point(point, dtype, candidates, notes, weights.first(copies), form)
            advance()
        del weights
        release_memory()
    return results


@dataclass(frozen=True)
class Weights:
    """The same weights in each form.

    Attributes:
        dense: (out_features, in_features), in the dtype of inputs and outputs.
        buffers: packed.
        dense_fp8: dense buffers of float8; none on a GPU without.
    """

    dense: Sequence[Tensor]
    buffers: Sequence[Tensor]
    dense_fp8: Sequence[Tensor] = ()

    def first(self, count: int) -> Weights:
        """Return the first ``count`` of them."""
        return Weights(self.dense[:count], self.buffers[:count], self.dense_fp8[:count])


def random_weights(shape: Shape, dtype: torch.dtype, device: int, form: RoundedForm | None, count: int) -> Weights:
    """Return ``count`` random 2:4 weights on a GPU, packed and dense; arguments as in :func:`time_kernels`."""
    gpu = torch.device("cuda", device)
    if form is None:
        buffers = [packed_buffer.random_buffer(shape, dtype, gpu, seed) for seed in range(count)]
    else:
        buffers = [rounded_buffer.random_buffer(shape, form, gpu, seed) for seed in range(count)]
    dense = [expand(buffer, shape, dtype, form).contiguous() for buffer in buffers]
    with_fp8 = dense_fp8_kernels(torch.cuda.get_device_capability(device))
    fp8 = [rounded_buffer.to_dense_buffer(round_rows(weight, "fp8_e4m3")) for weight in dense] if with_fp8 else []
    return Weights(dense, buffers, fp8)


def _copies(shape: Shape, device: int, form: RoundedForm | None, tokens: int = 1) -> int:
    """Return how many weights push the first out of the cache; with many tokens the inputs do."""
    if tokens > _SHORT:
        return 2
    size = packed_buffer.buffer_bytes(shape) if form is None else rounded_buffer.buffer_bytes(shape)
    return min(64, 2 + 2 * torch.cuda.get_device_properties(device).L2_cache_size // size)


def _other_kernels(
    points: Sequence[Point],
    dtype: torch.dtype,
    device: int,
    form: RoundedForm | None,
    own: Mapping[Point, tuple[Kernel, ...]],
    progress: TuningProgress,
) -> dict[Point, tuple[list[Kernel], list[str]]]:
    """Return the kernels of libraries that are worth measuring at each point, and why others are missing.

    For layers too small to gain no algorithm is searched: that takes a process, and another for each that hangs.
    """
    found: dict[Point, tuple[list[Kernel], list[str]]] = {point: ([], []) for point in points}
    fewest = _FEWEST_FOR_CUSPARSELT if form is None else _FEWEST_FOR_CUSPARSELT_ROUNDED
    wanted = [point for point in points if point[1] >= fewest or not own[point]]
    supported = support(device, form)
    # With 8 bits the package's own kernels are ahead of every algorithm (H200): no search where it has some.
    searched = [point for point in wanted if point[0][0] * point[0][1] >= TINY and (form is None or not own[point])]
    answers: list[FastestAlgorithms] = []
    if supported.kernel == "cusparselt":
        name = str(dtype).removeprefix("torch.")
        padded_shape = packed_buffer.padded_shape if form is None else rounded_buffer.padded_shape
        answers = fastest_algorithms(
            [
                AlgorithmJob(name, padded_shape(shape), tokens, _copies(shape, device, form, tokens), device, form=form)
                for shape, tokens in searched
            ],
            on_done=progress.begin("cuSPARSELt's algorithms", len(searched)) if searched else lambda: None,
        )
    answered = dict(zip(searched, answers, strict=False))
    for point in wanted:
        kernels, notes = found[point]
        if supported.kernel != "cusparselt":
            notes.append(f"no plans of cuSPARSELt: {supported.problem}")
            kernels += [Kernel("torch")] if supported.kernel == "torch" else []
        elif point not in answered:
            kernels.append(Kernel("cusparselt"))
        else:
            notes += [answered[point].problem] if answered[point].problem else []
            kernels += [Kernel("cusparselt", (algorithm,)) for algorithm in answered[point].algorithms]
        if not own[point]:
            kernels.append(Kernel("expand"))
    return found


def time_point(
    point: Point,
    dtype: torch.dtype,
    kernels: Sequence[Kernel],
    notes: Sequence[str],
    weights: Weights,
    form: RoundedForm | None = None,
) -> KernelTimes:
    """Time cuBLAS and some kernels at one point; a kernel with wrong products is left out, with a note.

    Args:
        point: shape and number of tokens.
        dtype: float16 or bfloat16, of inputs and outputs.
        kernels: the candidates.
        notes: notes to begin with.
        weights: they rotate.
        form: of packed weights of 8 bits; None for weights in ``dtype``.
    """
    shape, tokens = point
    device = weights.buffers[0].device
    inputs = torch.randn(tokens, shape[1], device=device, dtype=dtype)

    # Once each: in a long row of its own calls a kernel may hide its start better than in a model.
    def dense() -> None:
        for weight in weights.dense:
            F.linear(inputs, weight)

    def packed(product: Product, rows: Tensor, buffers: Sequence[Tensor]) -> Callable[[], None]:
        def call() -> None:
            for buffer in buffers:
                product(rows, buffer, None, None)

        return call

    calls = {"dense": dense}
    problems = list(notes)
    exact = F.linear(inputs, weights.dense[0])
    expected = exact if form is None else F.linear(_rounded(inputs, form), weights.dense[0])
    for kernel in kernels:
        is_fp8 = kernel.name == "dense_fp8"
        buffers = weights.dense_fp8 if is_fp8 else weights.buffers
        rows = F.pad(inputs, (0, missing_inputs(kernel, shape, form)))
        try:
            product = prepare(kernel, dtype, shape, tokens, device.index, "fp8_e4m3" if is_fp8 else form)
            wanted = exact if kernel.name in ("dense_fp8", "expand") else expected
            error = relative_error(wanted, product(rows, buffers[0], None, None))
            if not error < (_LARGEST_ROUNDING if is_fp8 else _LARGEST_ERROR):
                problems.append(f"{kernel}: wrong products on this machine, relative error {error:.1e}")
                continue
            calls[str(kernel)] = packed(product, rows, buffers)
        except (CusparseltError, CudaError, torch.OutOfMemoryError) as failure:
            problems.append(f"{kernel}: {describe(failure)}")
        except RuntimeError as failure:
            if not is_fp8:
                raise
            problems.append(f"{kernel}: {describe(failure)}")  # a shape that torch's product refuses
    graphs = {name: capture(call).replay for name, call in calls.items()}
    calls_each = len(weights.buffers)
    times = {name: timing.median_us for name, timing in time_calls(graphs, calls=calls_each, rounds=_ROUNDS).items()}
    # The fastest of many is partly the luckiest: the finalists are measured again.
    fp8 = sorted((name for name in graphs if name.startswith("dense_fp8")), key=times.__getitem__)[:1]
    packed_kernels = [name for name in graphs if not name.startswith("dense")]
    finalists = ["dense", *fp8, *sorted(packed_kernels, key=times.__getitem__)[:_FINALISTS]]
    again = time_calls({name: graphs[name] for name in finalists}, calls=calls_each, rounds=2 * _ROUNDS)
    times = {name: timing.median_us for name, timing in again.items()}
    fp8_us = times.pop(fp8[0]) if fp8 else None
    return KernelTimes(tokens, times.pop("dense"), times, tuple(problems), fp8_us, fp8[0] if fp8 else "")


def _rounded(inputs: Tensor, form: RoundedForm) -> Tensor:
    """Return what the products with a weight of 8 bits make of tokens, in the dtype of these."""
    rounded = round_tokens(inputs, form)
    return (rounded.values.float() * rounded.scales.unsqueeze(-1)).to(inputs.dtype)


def _compile(
    kernels: set[Kernel],
    dtype: torch.dtype,
    capability: tuple[int, int],
    form: RoundedForm | None,
    progress: TuningProgress,
) -> None:
    """Compile in parallel: NVRTC runs outside Python's lock."""
    advance = progress.begin("kernels compiled", len(kernels))
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        for _ in pool.map(lambda kernel: compile_kernel(kernel, dtype, capability, form), kernels):
            advance()
