"""``model.generate(...)`` of transformers end to end, the model dense and 2:4, in 16 bits and in 8.

    python -m benchmarks.generate --model 8B

LLaMA's shapes, random weights, bfloat16 outside of the layers. All forms are called in turns in one process and the
same way, with ``accelerate_generation``, so that a drifting host slows all alike; times are medians over the rounds.
Dense weights are dense, without zeros, which would cost less power. Embedding and head are bfloat16 in every form.
"""

from __future__ import annotations

import copy
import math
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import auto_cli
from torch import nn, profiler
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from benchmarks.convert_models import build, decoder_layers
from benchmarks.result_files import RESULTS, write_result
from prox24_lightning.convert.autotune.kernel_table import KernelTable
from prox24_lightning.convert.autotune.tune import kernel_tables, stored_table
from prox24_lightning.convert.convert import convert_linear, insert_layers
from prox24_lightning.convert.form_choice import Joined, choose_forms, joined_layers
from prox24_lightning.convert.layers.dense_fp8_linear import DenseFp8Linear
from prox24_lightning.convert.measurement import host_seconds, release_memory
from prox24_lightning.integrations.transformers.generation import accelerate_generation
from prox24_lightning.integrations.transformers.time_generation import generation_call
from prox24_lightning.weights.rounding import RoundedForm, round_rows

Form = Literal["dense bf16", "dense fp8", "2:4 bf16", "2:4 fp8", "2:4 int8"]

_ROUNDED: dict[Form, RoundedForm | None] = {"2:4 bf16": None, "2:4 fp8": "fp8_e4m3", "2:4 int8": "int8"}

_RECOMPILES = 64
"""Of a small operation: the forms are layers of several classes, and dynamo gives up after eight."""

_NAME_LENGTH = 70

Call = Callable[[], Any]
Kernels = dict[str, tuple[float, float]]
"""Name of a kernel -> its launches and microseconds."""


def main(
    model: str = "8B",
    forms: list[Form] = ["dense bf16", "dense fp8", "2:4 bf16", "2:4 fp8"],  # noqa: B006
    layers: int | None = None,
    prompt: int = 512,
    new: int = 128,
    long_prompt: int = 4096,
    batches: list[int] = [1, 8],  # noqa: B006
    rounds: int = 5,
    transformers_too: bool = False,
    fuse: bool = True,
    search: bool = True,
    profile: bool = False,
    output: Path = RESULTS,
    device: str = "cuda",
) -> None:
    """Time generation and write the table.

    Args:
        model: "tiny", "1B" or "8B".
        forms: of the weights of the blocks' linear layers. A 2:4 layer that is slower than the fastest dense form
            takes that, as in ``convert_model``.
        layers: of the model; null is all of them. transformers' own loop compiles each, which takes long.
        prompt: tokens of the prompt.
        new: tokens to generate.
        long_prompt: tokens of the prompt whose time to the first token is measured.
        batches: sequences at a time.
        rounds: of calls in turns.
        transformers_too: time transformers' own loop with a static cache as well.
        fuse: run the projections that read the same input as one product.
        search: measure the kernels of each shape first, which takes minutes; false takes those that were measured on
            this machine before, or goes by rule, so that the run ends within two minutes.
        profile: write the kernels of a decoded token as well, by torch's profiler.
        output: folder for the result.
        device: where the model runs; on a CPU nothing is converted, which tries the script out.
    """
    torch.manual_seed(0)
    torch._dynamo.config.recompile_limit = _RECOMPILES
    begin = time.perf_counter()
    counts = (*batches, prompt, long_prompt)
    models, in_form = _models(model, forms, torch.device(device), counts, layers, search=search, fuse=fuse)
    made = time.perf_counter() - begin
    shape, name = model, f"generate/{model}"
    if layers is not None:
        shape, name = f"{model} of {layers} layers", f"{name}_{layers}_layers"
    note = (
        f"LLaMA-shaped {shape}, random weights, greedy, {prompt} + {new} tokens, in turns in one process, medians of "
        f"{rounds} rounds; kernels measured and models made in {made:.0f} s. Device: while any kernel runs, "
        f"by torch's profiler; those that start while the one before them ends overlap. Layers: {in_form}."
    )
    rows: list[dict[str, Any]] = []
    kernels: list[dict[str, Any]] = []
    for batch in batches:
        for way in ("transformers", "accelerated")[0 if transformers_too else 1 :]:
            timed, spent = _decoding(models, way, batch, prompt, new, rounds, fuse=fuse)
            rows += timed
            write_result(output, name, "generate() of transformers by form", rows, note=note, quiet=True)
            if profile:
                for form, counted in spent.items():
                    kernels += _profile_rows(way, batch, form, counted)
                write_result(output, name, "The kernels of a decoded token", kernels, part="profile", note=note)
    rows += _first_token(models, long_prompt, rounds, fuse=fuse)
    write_result(output, name, "generate() of transformers by form", rows, note=note)
    found = bars(rows)
    if found:
        write_result(output, name, "End to end: the figures in short", found, part="bars")


def _models(
    name: str,
    forms: Sequence[Form],
    device: torch.device,
    counts: Sequence[int],
    layers: int | None,
    *,
    search: bool,
    fuse: bool,
) -> tuple[dict[Form, nn.Module], str]:
    """Return a model in each form, which share embedding, norms and head, and how many layers each has in which."""
    begin = time.perf_counter()
    first = build(name, device, layers)
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*first.parameters(), *first.buffers())}
    models = {form: copy.deepcopy(first, dict(shared)) for form in forms if form != "dense bf16"}
    models["dense bf16"] = first
    counted = []
    for form in _ROUNDED if device.type == "cuda" else ():
        if form in models:
            print(f"{time.perf_counter() - begin:.0f} s: {form}", flush=True)
            made = dict(_packed(first, _ROUNDED[form], device, counts, search=search, fuse=fuse))
            insert_layers(models[form], made.items())
            fp8 = sum(isinstance(layer, DenseFp8Linear) for layer in made.values())
            dense = len(decoder_layers(first)) - len(made)
            counted.append(f"{form}: {len(made) - fp8} packed, {fp8} dense in float8, {dense} dense in bfloat16")
    for layer in decoder_layers(first).values():
        layer.weight.normal_(0, 0.02)
    if "dense fp8" in models and device.type == "cuda":
        insert_layers(models["dense fp8"], _in_dense_fp8(first, device, counts, search=search, fuse=fuse))
    release_memory()
    return {form: models[form] for form in forms}, "; ".join(counted) or "not converted"


def _packed(
    model: nn.Module, form: RoundedForm | None, device: torch.device, counts: Sequence[int], *, search: bool, fuse: bool
) -> Iterator[tuple[str, nn.Module]]:
    layers = decoder_layers(model)
    shapes = _shapes(layers)
    joined = joined_layers(model, shapes, dict.fromkeys(shapes)) if fuse else ()
    tables = _tables(shapes, joined, form, device, counts, search=search)
    choices = choose_forms(shapes, joined, tables, counts)
    for shape, table in tables.items():
        print(shape, form, table.text, flush=True)
    print(Counter((name.rpartition(".")[2], choice) for name, choice in choices.items()), flush=True)
    for name, layer in layers.items():
        table = tables[shapes[name]]
        choice = choices[name].form if search else "packed"
        if choice == "packed":
            yield name, convert_linear(layer, name=name, kernels=table, weights=form)
        elif choice == "dense_fp8":
            yield name, _dense_fp8(layer, table)


def _in_dense_fp8(
    model: nn.Module, device: torch.device, counts: Sequence[int], *, search: bool, fuse: bool
) -> Iterator[tuple[str, nn.Module]]:
    layers = decoder_layers(model)
    shapes = _shapes(layers)
    joined = joined_layers(model, shapes, dict.fromkeys(shapes)) if fuse else ()
    tables = _tables(shapes, joined, "fp8_e4m3", device, counts, search=search)
    for name, layer in layers.items():
        yield name, _dense_fp8(layer, tables[shapes[name]])


def _shapes(layers: Mapping[str, nn.Linear]) -> dict[str, tuple[int, int]]:
    return {name: (layer.out_features, layer.in_features) for name, layer in layers.items()}


def _tables(
    shapes: Mapping[str, tuple[int, int]],
    joined: Sequence[Joined],
    form: RoundedForm | None,
    device: torch.device,
    counts: Sequence[int],
    *,
    search: bool,
) -> dict[tuple[int, int], KernelTable]:
    """Return the kernels of each shape, and of the projections that run as one, whose own are not measured."""
    together = {name for one in joined for name in one.names}
    alone = (shape for name, shape in shapes.items() if name not in together)
    wanted = list(dict.fromkeys([*alone, *(one.shape for one in joined)])) if search else []
    # At these numbers of tokens alone: convert_model measures all that a server may need.
    found = kernel_tables(wanted, torch.bfloat16, token_counts=counts, device=device, form=form)
    for shape in {*shapes.values(), *(one.shape for one in joined)} - found.keys():
        found[shape] = stored_table(shape, torch.bfloat16, device=torch.cuda.current_device(), form=form)
    return found


def _dense_fp8(layer: nn.Linear, table: KernelTable) -> DenseFp8Linear:
    rounded = round_rows(layer.weight, "fp8_e4m3")
    return DenseFp8Linear(rounded, layer.weight.dtype, layer.bias, table.dense_fp8_text).eval()


def _decoding(
    models: dict[Form, nn.Module], way: str, batch: int, prompt: int, new: int, rounds: int, *, fuse: bool
) -> tuple[list[dict[str, Any]], dict[Form, Kernels]]:
    """Return the rows of the table, and the kernels of a decoded token in each form."""
    handles = [accelerate_generation(one, fuse=fuse) for one in models.values()] if way == "accelerated" else []
    calls = {
        (form, count): generation_call(one, batch, prompt, count) for form, one in models.items() for count in (1, new)
    }
    seconds = host_seconds(calls, rounds)
    rows, kernels = [], {}
    for form in models:
        token = (seconds[form, new] - seconds[form, 1]) / (new - 1)
        (whole, busy), (first, before) = _kernels(calls[form, new]), _kernels(calls[form, 1])
        kernels[form] = per_token(whole, first, new - 1)
        spent = (busy - before) / (new - 1)
        rate = batch * new / seconds[form, new]
        rows.append(_row(way, f"decode, batch {batch}", form, 1000 * token, spent / 1000, rate))
    _finish(handles)
    return _with_ratios(rows), kernels


def _first_token(models: dict[Form, nn.Module], prompt: int, rounds: int, *, fuse: bool) -> list[dict[str, Any]]:
    handles = [accelerate_generation(one, fuse=fuse) for one in models.values()]
    calls = {form: generation_call(one, 1, prompt, 1) for form, one in models.items()}
    seconds = host_seconds(calls, rounds)
    rows = [
        _row(
            "accelerated",
            f"first token of {prompt}",
            form,
            1000 * seconds[form],
            _kernels(calls[form])[1] / 1000,
            prompt / seconds[form],
        )
        for form in models
    ]
    _finish(handles)
    return _with_ratios(rows)


def _finish(handles: Sequence[Any]) -> None:
    for handle in handles:
        handle.remove()
    torch._dynamo.reset()
    release_memory()


def _row(loop: str, what: str, form: Form, ms: float, device_ms: float, rate: float) -> dict[str, Any]:
    return {"loop": loop, "what": what, "form": form, "ms": ms, "device ms": device_ms, "tokens/s": rate}


def _with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add what each form gains over the dense ones, by the time that a caller sees."""
    ms = {row["form"]: row["ms"] for row in rows}
    dense = {f"x {form}": ms.get(form) for form in ("dense bf16", "dense fp8")}
    return [row | {name: "" if other is None else other / row["ms"] for name, other in dense.items()} for row in rows]


def bars(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the gains of 2:4 in fp8, each beside its bar."""
    least = {("decode, batch 1", "x dense fp8"): 1.25, ("decode, batch 1", "x dense bf16"): 1.9}
    found = []
    for row in rows:
        if row["form"] == "2:4 fp8" and row["loop"] == "accelerated":
            prefill = {(row["what"], "x dense fp8"): 1.2} if row["what"].startswith("first token") else {}
            for (what, over), bar in (least | prefill).items():
                if what == row["what"] and row[over] != "":
                    found.append({"figure": f"2:4 fp8 {over}, {what}", "value": row[over], "bar": f"at least {bar}"})
    return found


def _kernels(call: Call) -> tuple[Kernels, float]:
    """Return the kernels of a call and the microseconds in which any of them runs; on a CPU torch's operations."""
    gpu = torch.cuda.is_available()
    with profiler.profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as found:
        call()
        if gpu:
            torch.cuda.synchronize()
    kernels = {
        event.key: (event.count, event.self_device_time_total if gpu else event.self_cpu_time_total)
        for event in found.key_averages()
    }
    if not gpu:
        return kernels, sum(microseconds for _, microseconds in kernels.values())
    on_device = [event.time_range for event in found.events() if event.device_type == DeviceType.CUDA]
    return kernels, covered((span.start, span.end) for span in on_device)


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Return how much time spans from a start to an end take together, where some overlap."""
    total, last = 0.0, -math.inf
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, last))
        last = max(last, end)
    return total


def per_token(whole: Kernels, first: Kernels, tokens: int) -> Kernels:
    """Return what each of ``tokens`` tokens takes of a call beyond what the call for the first token takes."""
    rest = {}
    for name, (launches, microseconds) in whole.items():
        before = first.get(name, (0.0, 0.0))
        rest[name] = (launches - before[0]) / tokens, (microseconds - before[1]) / tokens
    return rest


def _profile_rows(way: str, batch: int, form: Form, kernels: Kernels) -> list[dict[str, Any]]:
    return [
        {"loop": way, "batch": batch, "form": form, "kernel": name, "launches a token": launches, "us a token": spent}
        for name, (launches, spent) in shortened(kernels).items()
    ]


def shortened(kernels: Kernels, most: int = 20) -> Kernels:
    """Return the kernels that take longest, by short names, then the rest and all of them."""
    summed: Kernels = {}
    for name, spent in kernels.items():
        short = re.sub(r"\w+::|\(anonymous namespace\)::|^void ", "", name)[:_NAME_LENGTH].replace("|", "/")
        before = summed.get(short, (0.0, 0.0))
        summed[short] = before[0] + spent[0], before[1] + spent[1]
    ranked = sorted(summed.items(), key=lambda item: -item[1][1])
    found = dict(ranked[:most])
    if others := [spent for _, spent in ranked[most:]]:
        found[f"{len(others)} others"] = sum(a for a, _ in others), sum(b for _, b in others)
    found["all"] = sum(a for a, _ in summed.values()), sum(b for _, b in summed.values())
    return found


if __name__ == "__main__":
    auto_cli(main)
