"""``prox24 tradeoff``: loss against predicted speed from dense to 2:4, and the fastest model with so much loss."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Table

from prox24_lightning.cli.exit_codes import errors_as_exit
from prox24_lightning.cli.prune import calibration_and_evaluation, text_source
from prox24_lightning.convert.layer_times import layer_times
from prox24_lightning.io.pretrained import Pretrained
from prox24_lightning.io.texts import TextSource, perplexity
from prox24_lightning.oneshot.tradeoff import BUDGETS, Tradeoff, TradeoffPoint, measure_tradeoff
from prox24_lightning.solvers import Method
from prox24_lightning.solvers.input_order.choose import ReorderInputs
from prox24_lightning.utils.files import check_output, write_text
from prox24_lightning.weights.selection import select_weights


def tradeoff(
    model: Pretrained,
    text: str | None = None,
    eval_text: str | None = None,
    data: TextSource | None = None,
    output: Path = Path("runs/tradeoff"),
    overwrite: bool = False,
    download: bool = False,
    budgets: list[float] = list(BUDGETS),  # noqa: B006 (read only)
    max_loss: float | None = None,
    method: Method = "prox",
    dense_target: float = 0.5,
    reorder_inputs: ReorderInputs = False,
    targets: list[str] | None = None,
    skip: list[str] | None = None,
    blocks: str | None = None,
    steps: int | None = None,
    sequences: int = 16,
    length: int = 256,
    batch_size: int = 4,
    eval_sequences: int = 16,
    seed: int = 0,
    tokens: int = 4096,
    measure_kernels: bool = False,
    device: str | None = None,
    work_dir: Path | None = None,
) -> None:
    """Draw the loss of a causal language model against its predicted speed, from dense to 2:4.

    Layers are tried first, one by one and together; at each budget those stay dense that lower the loss most. Writes
    tradeoff.png, .csv and .json, and with max_loss prune.yaml for `prox24 prune --config` and Prox24.

    Exit code 0: done. 2: an error.

    Args:
        model: which model, and how to load it; the word MODEL is its name.
        text: calibration text, see `prox24 prune --help`.
        eval_text: held-out text; null holds a fifth of the documents of the calibration text out.
        data: class of a source of both texts, in place of text and eval_text.
        output: folder of the results.
        overwrite: write into an output folder that holds files already.
        download: fetch a model or data set of the hub that is not in its cache.
        budgets: shares of the speed-up that are given back; 0 is uniform 2:4, and dense is always drawn.
        max_loss: pick the fastest model with at most so many nats above dense.
        method: how masks are chosen.
        dense_target: 0 keeps each layer's own outputs, 1 aims at the dense model's.
        reorder_inputs: choose which inputs share a group of four where that is free; stream also orders the residual
            stream.
        targets: patterns of names; null takes every linear layer of the blocks.
        skip: patterns of names that stay dense at every budget.
        blocks: name of the list of blocks; null finds it.
        steps: steps of the prox methods; null takes each method's default.
        sequences: number of calibration sequences. The defaults suit a small model on a CPU.
        length: tokens a sequence.
        batch_size: sequences a batch.
        eval_sequences: held-out sequences.
        seed: of the choice of texts.
        tokens: rows of a layer's input for which times are read from this GPU's kernel table.
        measure_kernels: measure the kernels that the table does not hold; else, or without a GPU, multiply-adds count.
        device: null is cuda if there is one, else cpu.
        work_dir: folder for finished points, from which a killed run goes on; null keeps nothing.
    """
    with errors_as_exit("tradeoff"):
        check_output(output, overwrite=overwrite)
        if max_loss is not None and not max_loss >= 0:
            raise ValueError(f"max_loss={max_loss} must be 0 or more nats above the dense model")
        model = replace(model, download=model.download or download)
        console = Console()
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        source = text_source(text, eval_text, data, download=download)
        model.check_length(length)
        tokenizer = model.tokenizer()
        ids, held_out = calibration_and_evaluation(tokenizer, source, sequences, eval_sequences, length, seed)
        if held_out is None:
            raise ValueError("eval_sequences=0 leaves nothing to score the models on; give 1 or more")
        network = model.model().to(place)
        options: dict[str, Any] = {
            "method": method,
            "dense_target": dense_target,
            "reorder_inputs": reorder_inputs,
            "targets": targets,
            "skip": skip,
            "blocks": blocks,
            "steps": steps,
        }
        chosen = select_weights(network, targets=targets, skip=skip).chosen
        shapes = {w.name: (w.parameter.shape[0], w.parameter.shape[1]) for w in chosen if w.parameter.dim() == 2}
        found = measure_tradeoff(
            network,
            [{"input_ids": part} for part in ids.split(batch_size)],
            lambda module: math.log(perplexity(module, held_out, batch_size)),
            budgets=budgets,
            layer_times=layer_times(shapes, tokens, measure=measure_kernels) or None,
            device=place,
            work_dir=work_dir,
            prune=options,
        )
        pick = None if max_loss is None else found.fastest(max_loss)
        console.print(_table(found, pick))
        output.mkdir(parents=True, exist_ok=True)
        write_text(output / "tradeoff.json", found.to_json())
        write_text(output / "tradeoff.csv", found.to_csv())
        found.plot(output / "tradeoff.png", chosen=pick)
        if pick is not None:
            given = {key: value for key, value in options.items() if value is not None}
            content = {**given, "skip": [*(skip or []), *pick.dense] or None}
            if pick.label == "dense":
                console.print(f"only the dense model has at most {max_loss} nats above dense: no config is written")
            else:
                write_text(output / "prune.yaml", yaml.safe_dump(content, sort_keys=False))
                console.print(f"picked: {pick.speedup:.3f} x, {pick.loss - found.dense_loss:+.4f} nats, in prune.yaml")
                console.print(
                    f"next: prox24 prune {model.name} --config {output / 'prune.yaml'} --text my.txt",
                    markup=False,
                    highlight=False,
                    soft_wrap=True,
                )
        console.print(f"results: {output}")


def _table(found: Tradeoff, pick: TradeoffPoint | None) -> Table:
    table = Table(title="loss against predicted speed")
    for column in ("", "budget", "dense layers", "predicted speed-up", "loss", "above dense"):
        table.add_column(column, justify="right")
    table.add_column("chosen by")
    for point in found.points:
        row = (f"{point.budget:.2f}", str(len(point.dense)), f"{point.speedup:.3f}", f"{point.loss:.4f}")
        mark = "*" if point is pick else ""
        table.add_row(f"{point.label} {mark}", *row, f"{point.loss - found.dense_loss:+.4f}", point.choice)
    return table
