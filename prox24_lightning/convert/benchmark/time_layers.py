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
from prox24_lightning.convert.convert import convert_dense_fp8, convert_linear
from prox24_lightning.convert.eligibility import LayerVerdict, named_layers
from prox24_lightning.convert.form_choice import Joined, joined_layers
from prox24_lightning.convert.kernels.registry import kernel_for
from prox24_lightning.convert.layers.semi_structured_linear import SemiStructuredLinear
from prox24_lightning.convert.measurement import relative_error, release_memory, time_calls
from prox24_lightning.utils.devices.cuda_graphs import capture
from prox24_lightning.utils.errors import describe
from prox24_lightning.utils.long_work import between_pieces
from prox24_lightning.utils.names import counted
from prox24_lightning.weights.layer_matrix import is_transposed_linear

LARGEST_ERROR = 2e-2
"""Relative difference from dense above which a layer of 16 bits stays dense whatever its speed: rounding gives 4e-3.
In 8 bits the user says (``Settings.max_error``)."""

_Group = tuple[tuple[int, ...], bool, tuple[str, ...]]
"""Shape, whether there is a bias, and the layers that are joined to this shape."""

_CALLS = 8  # at least so many calls a measurement, so that the launch of a graph does not count


def time_shapes(
    model: nn.Module,
    verdicts: Sequence[LayerVerdict],
    settings: Settings,
    device: torch.device,
    *,
    fp8: bool = False,
    keep: Callable[[tuple[ShapeResult, ...]], None] = lambda results: None,
) -> tuple[ShapeResult, ...]:
    """Time the layers of ``verdicts``, one a shape.

    Layers that decoding runs as one product are timed as one, unless they are to be called one by one (run_mode
    "eager") or keep their dense weights.

    Args:
        model: holds the layers.
        verdicts: of layers that can run sparse.
        settings: token counts, rounds and form.
        device: a CUDA GPU, the current one.
        fp8: the GPU multiplies float8, so dense layers are timed in it too.
        keep: called with the results so far after each shape.
    """
    layers = dict(named_layers(model))
    together = _together(model, verdicts, settings)
    groups: dict[_Group, list[str]] = {}
    for verdict in verdicts:
        one = together.get(verdict.name)
        if one is None:
            groups.setdefault((verdict.shape, verdict.bias, ()), []).append(verdict.name)
        elif verdict.name == one.names[0]:
            groups.setdefault((one.shape, verdict.bias, one.parts), []).extend(one.names)
    tables: dict[tuple[int, int], KernelTable] = {}
    wide: dict[tuple[int, int], KernelTable] = {}
    problem = ""
    try:
        counts = sorted({*settings.token_counts, *BUCKETS})
        every = dict.fromkeys([*(shape for shape, *_ in groups), *(verdict.shape for verdict in verdicts)])
        shapes = [(shape[0], shape[1]) for shape in every]
        between_pieces(f"search of kernels for {counted(len(shapes), 'shape')}")
        tables = kernel_tables(
            shapes,
            settings.dtype,
            token_counts=counts,
            keep_dense=settings.keep_dense,
            device=device,
            form=settings.form,
        )
        if settings.form is not None:
            wide = kernel_tables(shapes, settings.dtype, token_counts=counts, keep_dense=False, device=device)
    except Exception as error:
        problem = describe(error)
    results = []
    for (shape, bias, parts), names in groups.items():
        result = ShapeResult(shape, bias, tuple(names), 0, 0, (), False, "", joined=parts)
        between_pieces(f"layers of shape {tuple(shape)}")
        try:
            if problem:
                raise RuntimeError(problem)
            pair = shape[0], shape[1]
            members = [layers[name] for name in names[: len(parts) or 1]]
            timed = _time_shape(result, members, tables[pair], settings, device, fp8)
            results.append(_with_16_bits(timed, wide[pair]) if wide else timed)
        except Exception as error:
            results.append(replace(result, decision=f"could not be measured: {describe(error)}"))
        keep(tuple(results))
        release_memory()
    return tuple(results)


def _time_shape(
    result: ShapeResult,
    members: Sequence[nn.Module],
    table: KernelTable,
    settings: Settings,
    device: torch.device,
    fp8: bool,
) -> ShapeResult:
    dense, name = _linear(members, device, settings.dtype), result.layers[0]
    sparse = convert_linear(dense, name=name, kernels=table, keep_dense=settings.keep_dense, weights=settings.weights)
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    copies = min(64, 1 + 2 * cache // sparse.stored_bytes)
    denses = [dense, *(copy.deepcopy(dense) for _ in range(copies - 1))]
    sparses = [sparse, *(copy.deepcopy(sparse) for _ in range(copies - 1))]
    fp8s: list[nn.Module] = []
    if fp8:
        first = convert_dense_fp8(dense, name=name)
        fp8s = [first, *(copy.deepcopy(first) for _ in range(copies - 1))]
    tokens = tuple(_time_tokens(denses, sparses, fp8s, count, settings.rounds) for count in settings.token_counts)
    faster, decision = decide(tokens, settings)
    in_fp8 = not faster and fastest_in_fp8(tokens, settings)
    if in_fp8:
        decision = f"{decision.removesuffix(': stays dense')}: dense in float8"
    if result.joined:
        decision = f"{decision} (measured as one: {' + '.join(result.joined)})"
    return replace(
        result,
        dense_bytes=dense.weight.numel() * dense.weight.element_size(),
        packed_bytes=sparse.stored_bytes,
        tokens=tokens,
        sparse=faster,
        decision=decision,
        dense_fp8=in_fp8,
    )


def _with_16_bits(result: ShapeResult, table: KernelTable) -> ShapeResult:
    """Add the times of the layer packed in 16 bits."""
    us = {row.tokens: row.us for row in table.rows}
    return replace(result, tokens=tuple(replace(one, packed_16_us=us.get(one.tokens)) for one in result.tokens))


def _together(model: nn.Module, verdicts: Sequence[LayerVerdict], settings: Settings) -> dict[str, Joined]:
    """Return the layers that are timed as one, by the name of each."""
    if settings.keep_dense or settings.run_mode == "eager":
        return {}
    shapes = {verdict.name: (verdict.shape[0], verdict.shape[1]) for verdict in verdicts}
    joined = joined_layers(model, shapes, {verdict.name: verdict.bias for verdict in verdicts})
    return {name: one for one in joined for name in one.names}


def _linear(members: Sequence[nn.Module], device: torch.device, dtype: torch.dtype) -> nn.Linear:
    """Return a layer with the rows of all members, one after another."""
    weights = [layer.get_parameter("weight").detach() for layer in members]
    rows = [
        weight.t() if is_transposed_linear(layer) else weight for weight, layer in zip(weights, members, strict=True)
    ]
    weight = torch.cat([part.to(device, dtype) for part in rows])
    biases = [
        bias.detach().to(device, dtype) for layer in members if (bias := getattr(layer, "bias", None)) is not None
    ]
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bool(biases), device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if biases:
        linear.bias = nn.Parameter(torch.cat(biases), requires_grad=False)
    return linear


def _time_tokens(
    denses: Sequence[nn.Module],
    sparses: Sequence[SemiStructuredLinear],
    fp8s: Sequence[nn.Module],
    tokens: int,
    rounds: int,
) -> TokenResult:
    width = sparses[0].in_features
    # A generator of its own, so that the run's random numbers stay as they are.
    generator = torch.Generator(device=sparses[0].packed.device).manual_seed(tokens)
    rows = torch.randn(tokens, width, generator=generator, device=generator.device).to(sparses[0].dtype)
    exact = denses[0](rows)
    error = relative_error(exact, sparses[0](rows))
    fp8_error = None
    if fp8s:
        try:
            fp8_error = relative_error(exact, fp8s[0](rows))
        except RuntimeError:  # a shape that torch's product refuses: the column stays empty
            fp8s = ()
    repeats = -(-_CALLS // len(denses))
    variants: dict[str, Callable[[], None]] = {
        "dense": lambda: _call_all(denses, rows, repeats),
        "sparse": lambda: _call_all(sparses, rows, repeats),
    }
    if fp8s:
        variants["dense_fp8"] = lambda: _call_all(fp8s, rows, repeats)
    calls = repeats * len(denses)
    eager = time_calls(variants, calls=calls, rounds=rounds)
    graph, fp8_graph, problem = None, None, None
    try:
        graphs = {name: capture(call).replay for name, call in variants.items()}
        times = time_calls(graphs, calls=calls, rounds=rounds)
        graph, fp8_graph = Pair.of(times["dense"], times["sparse"]), times.get("dense_fp8")
    except RuntimeError as failure:
        problem = describe(failure)
    kernel = str(kernel_for(sparses[0].kernels, tokens))
    pair, fp8_eager = Pair.of(eager["dense"], eager["sparse"]), eager.get("dense_fp8")
    return TokenResult(tokens, pair, graph, problem, error, kernel, fp8_eager, fp8_graph, fp8_error)


def _call_all(layers: Sequence[nn.Module], rows: Tensor, repeats: int) -> None:
    for _ in range(repeats):
        for layer in layers:
            layer(rows)


def decide(tokens: Sequence[TokenResult], settings: Settings) -> tuple[bool, str]:
    """Return whether layers with these times become sparse, and why."""
    largest = LARGEST_ERROR if settings.form is None else settings.max_error
    wrong = [f"{result.output_error:.1e} at {result.tokens}" for result in tokens if not result.output_error < largest]
    if wrong:
        return False, f"output differs from dense by {', '.join(wrong)} tokens: stays dense"
    slower = [
        f"{'not captured' if speedup is None else f'{speedup:.2f} x'} at {result.tokens}"
        for result in tokens
        if (speedup := _least_speedup(result, settings)) is None or speedup < SAME
    ]
    if not slower:
        return True, "sparse"
    found = f"slower ({settings.run_mode}: {', '.join(slower)} tokens)"
    return (False, f"{found}: stays dense") if settings.only_if_faster else (True, f"{found}, sparse all the same")


def _least_speedup(result: TokenResult, settings: Settings) -> float | None:
    """Return the speed-up over the fastest dense form that the user's settings allow."""
    over_dense = result.speedup(settings.run_mode)
    over_fp8 = result.speedup_over_fp8(settings.run_mode) if settings.form == "fp8_e4m3" else None
    return over_dense if over_dense is None or over_fp8 is None else min(over_dense, over_fp8)


def fastest_in_fp8(tokens: Sequence[TokenResult], settings: Settings) -> bool:
    """Return whether layers that are not packed are dense in float8: nowhere slower than 16 bits, and exact enough."""
    if settings.form != "fp8_e4m3":
        return False
    speedups = [result.fp8_speedup(settings.run_mode) for result in tokens]
    exact = all(result.fp8_error is not None and result.fp8_error < settings.max_error for result in tokens)
    return exact and all(speedup is not None and speedup >= SAME for speedup in speedups)
