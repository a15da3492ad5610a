"""Time linear layers dense against packed, one measurement a shape, and decide which shapes become sparse.

Each measurement runs over several copies of the weight that together exceed the GPU's L2 cache: in a model other
layers have run in between, and no weight is still in the cache.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from prox24_lightning.convert.autotune.kernel_table import BUCKETS, SAME, KernelTable
from prox24_lightning.convert.autotune.tune import kernel_tables
from prox24_lightning.convert.benchmark.report import Pair, ShapeResult, TokenResult
from prox24_lightning.convert.benchmark.settings import Settings
from prox24_lightning.convert.convert import convert_linear
from prox24_lightning.convert.eligibility import LayerVerdict, named_layers
from prox24_lightning.convert.kernels.registry import kernel_for
from prox24_lightning.convert.layers.semi_structured_linear import SemiStructuredLinear
from prox24_lightning.convert.measurement import relative_error, release_memory, time_calls
from prox24_lightning.utils.cuda_graphs import capture
from prox24_lightning.utils.errors import describe
from prox24_lightning.weights.layer_matrix import is_transposed_linear

LARGEST_ERROR = 2e-2
"""Relative difference from dense above which a layer stays dense whatever its speed: 16-bit rounding gives 4e-3."""

_CALLS = 8  # at least so many calls a measurement, so that the launch of a graph does not count


def time_shapes(
    model: nn.Module, verdicts: Sequence[LayerVerdict], settings: Settings, device: torch.device
) -> tuple[ShapeResult, ...]:
    layers = dict(named_layers(model))
    groups: dict[tuple[tuple[int, ...], bool], list[str]] = {}
    for verdict in verdicts:
        groups.setdefault((verdict.shape, verdict.bias), []).append(verdict.name)
    tables: dict[tuple[int, int], KernelTable] = {}
    problem = ""
    try:
        counts = sorted({*settings.token_counts, *BUCKETS})
        shapes = [(shape[0], shape[1]) for shape, _ in groups]
        tables = kernel_tables(
            shapes, settings.dtype, token_counts=counts, keep_dense=settings.keep_dense, device=device
        )
    except Exception as error:
        problem = describe(error)
    results = []
    for (shape, bias), names in groups.items():
        result = ShapeResult(shape, bias, tuple(names), 0, 0, (), False, "")
        try:
            if problem:
                raise RuntimeError(problem)
            table = tables[shape[0], shape[1]]
            results.append(_time_shape(result, layers[names[0]], table, settings, device))
        except Exception as error:
            results.append(replace(result, decision=f"could not be measured: {describe(error)}"))
        release_memory()
    return tuple(results)


def _time_shape(
    result: ShapeResult, layer: nn.Module, table: KernelTable, settings: Settings, device: torch.device
) -> ShapeResult:
    dense = _linear(layer, device, settings.dtype)
    sparse = convert_linear(dense, name=result.layers[0], kernels=table, keep_dense=settings.keep_dense)
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    copies = min(64, 1 + 2 * cache // sparse.stored_bytes)
    denses = [dense, *(copy.deepcopy(dense) for _ in range(copies - 1))]
    sparses = [sparse, *(copy.deepcopy(sparse) for _ in range(copies - 1))]
    tokens = tuple(_time_tokens(denses, sparses, count, settings.rounds) for count in settings.token_counts)
    faster, decision = decide(tokens, settings)
    return replace(
        result,
        dense_bytes=dense.weight.numel() * dense.weight.element_size(),
        packed_bytes=sparse.stored_bytes,
        tokens=tokens,
        sparse=faster,
        decision=decision,
    )


def _linear(layer: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Linear:
    weight = layer.get_parameter("weight").detach()
    weight = weight.t() if is_transposed_linear(layer) else weight
    bias = getattr(layer, "bias", None)
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.to(device, dtype).contiguous(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().to(device, dtype), requires_grad=False)
    return linear


def _time_tokens(
    denses: Sequence[nn.Module], sparses: Sequence[SemiStructuredLinear], tokens: int, rounds: int
) -> TokenResult:
    width = sparses[0].in_features
    # A generator of its own, so that the run's random numbers stay as they are.
    generator = torch.Generator(device=sparses[0].packed.device).manual_seed(tokens)
    rows = torch.randn(tokens, width, generator=generator, device=generator.device).to(sparses[0].dtype)
    error = relative_error(denses[0](rows), sparses[0](rows))
    repeats = -(-_CALLS // len(denses))
    variants: dict[str, Callable[[], None]] = {
        "dense": lambda: _call_all(denses, rows, repeats),
        "sparse": lambda: _call_all(sparses, rows, repeats),
    }
    calls = repeats * len(denses)
    eager = time_calls(variants, calls=calls, rounds=rounds)
    graph, problem = None, None
    try:
        graphs = {name: capture(call).replay for name, call in variants.items()}
        times = time_calls(graphs, calls=calls, rounds=rounds)
        graph = Pair.of(times["dense"], times["sparse"])
    except RuntimeError as failure:
        problem = describe(failure)
    kernel = str(kernel_for(sparses[0].kernels, tokens))
    return TokenResult(tokens, Pair.of(eager["dense"], eager["sparse"]), graph, problem, error, kernel)


def _call_all(layers: Sequence[nn.Module], rows: Tensor, repeats: int) -> None:
    for _ in range(repeats):
        for layer in layers:
            layer(rows)


def decide(tokens: Sequence[TokenResult], settings: Settings) -> tuple[bool, str]:
    """Return whether layers with these times become sparse, and why."""
    wrong = [
        f"{result.output_error:.1e} at {result.tokens}" for result in tokens if not result.output_error < LARGEST_ERROR
    ]
    if wrong:
        return False, f"output differs from dense by {', '.join(wrong)} tokens: stays dense"
    slower = [
        f"{'not captured' if speedup is None else f'{speedup:.2f} x'} at {result.tokens}"
        for result in tokens
        if (speedup := result.speedup(settings.run_mode)) is None or speedup < SAME
    ]
    if not slower:
        return True, "sparse"
    found = f"slower ({settings.run_mode}: {', '.join(slower)} tokens)"
    return (False, f"{found}: stays dense") if settings.only_if_faster else (True, f"{found}, sparse all the same")
