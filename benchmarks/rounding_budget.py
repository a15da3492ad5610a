"""How far 8 bits can go within a bound on the loss: smoothed inputs, and the layers that keep 16 bits.

    python -m benchmarks.rounding_budget
    python -m benchmarks.rounding_budget --forms '["int8"]'

Three tables of a one-shot 2:4 language model. ``budget``: perplexity with every layer in 8 bits, before and after
gradient steps on all layers together (``prox24_lightning.oneshot.rounding.tune``), then with the layers that cost most
for what they save in 16 bits, chosen on calibration text for a bound and for shares of the gain
(``prox24_lightning.oneshot.rounding.budget``; the gain goes by multiply-adds). ``budget_kinds``: the rise of the loss
with one kind of layer alone in 8 bits, its weights, its inputs or both. ``budget_layers``: the same for each input,
both, with the exponent of its factors. The rise is the divergence of the outputs, in nats; in all but ``budget_kinds``
without what the arithmetic of 16 bits makes of any change.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli
from torch import nn

from benchmarks.calibration_and_evaluation import draw_sequences
from benchmarks.result_files import write_result
from prox24_lightning.calibration.isolation.isolated import isolated
from prox24_lightning.calibration.output_divergence import OutputDivergence
from prox24_lightning.calibration.rounded_inputs import rounded_inputs
from prox24_lightning.io.pretrained import Pretrained
from prox24_lightning.io.texts import TextSource, perplexity
from prox24_lightning.oneshot import prune_layerwise, smooth_inputs
from prox24_lightning.oneshot.rounding.budget import (
    LossRise,
    RoundedLayers,
    RoundingBudget,
    RoundingPrice,
    rounding_prices,
    within_rise,
)
from prox24_lightning.oneshot.rounding.tune import LEARNING_RATE, tune_rounded
from prox24_lightning.weights.rounding import RoundedForm
from prox24_lightning.weights.selection import select_weights
from recipes.calibration_text import LibraryDocs, PythonDocs
from recipes.causal_lm import SMOLLM2


def main(
    output: Path = Path("benchmarks/results"),
    model: Pretrained = SMOLLM2,
    data: TextSource = PythonDocs(),  # noqa: B008
    other: TextSource = LibraryDocs(),  # noqa: B008
    method: str = "prox",
    sequences: int = 128,
    length: int = 1024,
    batch_size: int = 16,
    probe_sequences: int = 16,
    eval_sequences: int = 64,
    forms: list[RoundedForm] = ["int8", "fp8_e4m3"],  # noqa: B006
    bound: float = 0.007,
    tune_steps: int = 100,
    tune_rate: float = LEARNING_RATE,
    shares: list[float] = [0.02, 0.05, 0.1, 0.2],  # noqa: B006
    seed: int = 0,
    dtype: str = "bfloat16",
    device: str | None = None,
    name: str = "rounding",
) -> None:
    """Measure every form and write the tables.

    Args:
        output: folder for the Markdown and JSON results.
        model: which causal language model.
        data: calibration text, and the evaluation text of the first perplexity column.
        other: evaluation text of the second column.
        method: of the one-shot pruning.
        sequences: calibration sequences.
        length: tokens a sequence.
        batch_size: sequences a batch.
        probe_sequences: of the calibration sequences, those on which rises are measured.
        eval_sequences: held-out sequences a column.
        forms: of 8 bits.
        bound: largest rise of the loss, in nats.
        tune_steps: gradient steps on all layers together at the rounded values, after which layers are chosen; 0 leaves
            them out.
        tune_rate: largest step of these, relative to the rms of each weight.
        shares: of the gain of 8 bits that are given back for layers in 16 bits, one row each.
        seed: which text is drawn.
        dtype: of weights and activations.
        device: null is cuda if there is one, else cpu.
        name: of the result folder.
    """
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    network, (tokenizer, *_) = model.load()
    network.to(place, getattr(torch, dtype)).eval()
    texts = draw_sequences(
        tokenizer,
        data,
        other,
        sequences=sequences,
        eval_sequences=eval_sequences,
        length=length,
        seed=seed,
        column="ppl {}",
    )
    batches = [{"input_ids": part} for part in texts.calibration.split(batch_size)]
    probes = [part.to(place) for part in texts.calibration[:probe_sequences].split(batch_size)]
    runs = [partial(network, input_ids=part, use_cache=False) for part in probes]
    layers = {w.module_name: w.module for w in select_weights(network).chosen if w.parameter.dim() == 2}
    note = (
        f"{model.describe()}, in {dtype}; one-shot {method}; calibration {sequences} x {length} tokens of "
        f"{data.describe()}, seed {seed}, of which {probe_sequences} sequences measure rises; evaluation "
        f"{eval_sequences} x {length} tokens each, second column {other.describe()}. +%: above 2:4 in {dtype}. "
        f"{texts.apart}."
    )
    rows: list[dict[str, Any]] = []
    kinds: list[dict[str, Any]] = []
    inputs: list[dict[str, Any]] = []

    def add(label: str, **about: Any) -> None:
        scores = {column: perplexity(network, ids) for column, ids in texts.held_out.items()}
        above = {f"{c} +%": 100 * (score / rows[0][c] - 1) if rows else 0.0 for c, score in scores.items()}
        blank = dict.fromkeys(("in 16 bits", "gain left %", "rise %", "seconds"), "")
        rows.append({"weights": label, **scores, **above, **blank, **about})
        write_result(output, name, "2:4 in 8 bits within a bound", rows, part="budget", note=note)

    begin = time.perf_counter()
    prune_layerwise(network, batches, method=method, device=place, progress=False)
    note += f" Pruned in {time.perf_counter() - begin:.0f} s."
    pruned = {key: value.clone() for key, value in network.state_dict().items()}
    add("2:4")
    for form in forms:
        for smooth in (False, True):
            network.load_state_dict(pruned)
            begin = time.perf_counter()
            smoothed = smooth_inputs(network, batches, form, layers, device=place, progress=False) if smooth else []
            exact = {key: layer.get_parameter("weight").detach().cpu().clone() for key, layer in layers.items()}
            # As round_model rounds.
            prune_layerwise(network, batches, method="keep", refine=None, weights=form, device=place, progress=False)
            seconds = time.perf_counter() - begin
            switch = RoundedLayers(layers, exact, form)
            label = f"{form}, smoothed" if smooth else form
            with rounded_inputs(layers.values(), form):
                add(label, **{"in 16 bits": 0, "gain left %": 100.0, "seconds": seconds})
            with switch.inputs_too(()):
                divergence = OutputDivergence(runs)
            of_kinds = _kinds(layers, switch, divergence, form)
            kinds += [{"weights": label, **row} for row in of_kinds]
            title = "Rise of the loss with one kind of layer in 8 bits"
            write_result(output, name, title, kinds, part="budget_kinds", note=note)
            if smooth != (form == "int8"):  # as round_model does by itself
                continue
            if tune_steps:
                begin = time.perf_counter()
                moved = [{"input_ids": part["input_ids"].to(place)} for part in batches]
                with isolated(network):
                    switch.round(layers)
                    tune_rounded(network, moved, layers, exact, form, tune_steps, learning_rate=tune_rate)
                seconds += time.perf_counter() - begin
                switch, label = RoundedLayers(layers, exact, form), f"{label}, {tune_steps} steps"
                with rounded_inputs(layers.values(), form):
                    add(label, **{"in 16 bits": 0, "gain left %": 100.0, "seconds": seconds})
            measured = LossRise(switch, divergence)
            prices = rounding_prices(layers, measured, runs[0])
            for text, found in _choices(prices, measured, bound, shares):
                with switch.inputs_too(set(layers) - set(found.kept)):
                    left = {"in 16 bits": len(found.kept), "gain left %": 100 * found.gain_left}
                    add(f"{label}, {text}", **left, **{"rise %": 100 * found.rise})
            exponents = {key: one.exponent for one in smoothed for key in one.names}
            inputs += [
                {
                    "form": form,
                    "layers": ", ".join(price.names),
                    "rise %": 100 * price.rise,
                    "exponent": exponents.get(price.names[0]) or "",
                }
                for price in sorted(prices, key=lambda price: -price.rise / price.gain)
            ]
            title = "Rise of the loss with the layers of one input in 8 bits"
            write_result(output, name, title, inputs, part="budget_layers", note=note)


def _choices(
    prices: Sequence[RoundingPrice], measured: Callable[[Sequence[str]], float], bound: float, shares: Sequence[float]
) -> list[tuple[str, RoundingBudget]]:
    """Return the choice within the bound, and one for each share of the gain that is given back."""
    found = [(f"rise at most {bound:g}", within_rise(prices, measured, bound))]
    order = found[0][1].prices
    whole = sum(price.gain for price in order)
    for share in shares:
        kept: list[str] = []
        given = 0.0
        for price in order:
            if given + price.gain <= share * whole:
                kept += price.names
                given += price.gain
        rise = measured([key for price in order for key in price.names if key not in kept])
        budget = RoundingBudget(order, tuple(kept), rise, found[0][1].rise_without)
        found.append((f"{100 * share:g} % given back", budget))
    return found


def _kinds(
    layers: dict[str, nn.Module], switch: RoundedLayers, divergence: OutputDivergence, form: RoundedForm
) -> list[dict[str, Any]]:
    """Measure each kind of layer (its last name) alone: weights, inputs, both; and all kinds together."""
    last = {key: key.rpartition(".")[2] for key in layers}
    rows = []
    for kind in ("all", *dict.fromkeys(last.values())):
        names = [key for key in layers if kind in ("all", last[key])]
        row: dict[str, Any] = {"layers": kind}
        for what, weights, seen in (("weights", names, ()), ("inputs", (), names), ("both", names, names)):
            switch.round(weights)
            with rounded_inputs([layers[key] for key in seen], form) if seen else nullcontext():
                row[f"{what} %"] = 100 * divergence()
        rows.append(row)
    return rows


if __name__ == "__main__":
    auto_cli(main)
