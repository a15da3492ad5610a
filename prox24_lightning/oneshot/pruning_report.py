"""The report of a one-shot pruning run: a record for each layer, as a table, as JSON and as a plot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table
from torch import Tensor

from prox24_lightning.utils.files import replacing, write_text
from prox24_lightning.weights.groups import Dim
from prox24_lightning.weights.selection import SkippedWeight


@dataclass(frozen=True)
class LayerRecord:
    """One pruned layer.

    Attributes:
        name: the parameter's name in the model.
        block: name of the block it lies in.
        shape: of the parameter.
        tokens: number of input rows in its Hessian.
        loss, refined_loss: relative local loss before and after refinement, on the inputs of the pruned model.
        reached: share of groups that were 2:4 before the final choice of the mask.
        seconds: solving time.
        note: anything unusual, or empty.
        rounded_loss: relative local loss after rounding to 8 bits; None without rounding.
    """

    name: str
    block: str
    shape: tuple[int, ...]
    tokens: int
    loss: float
    refined_loss: float | None
    reached: float
    seconds: float
    note: str = ""
    rounded_loss: float | None = None

    @property
    def final_loss(self) -> float:
        losses = (self.rounded_loss, self.refined_loss, self.loss)
        return next(loss for loss in losses if loss is not None)


@dataclass
class LayerwiseReport:
    """Result of :func:`~prox24_lightning.oneshot.prune_layerwise`.

    Attributes:
        settings: the arguments of the run.
        layers: the pruned layers, in the order of execution.
        skipped: the weights that stay dense, with the reason.
        masks: name of the parameter -> bool mask of its shape, on CPU.
        dims: name of the parameter -> dimension along which its groups of four lie.
        seconds: wall time of the whole run; blocks from ``work_dir`` count with the time of their solution.
    """

    settings: dict[str, Any]
    layers: list[LayerRecord] = field(default_factory=list)
    skipped: list[SkippedWeight] = field(default_factory=list)
    masks: dict[str, Tensor] = field(default_factory=dict)
    dims: dict[str, Dim] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def mean_loss(self) -> float:
        """Mean over the layers of the final relative local loss; 0 without a pruned layer."""
        return sum(layer.final_loss for layer in self.layers) / len(self.layers) if self.layers else 0.0

    def table(self) -> Table:
        """Return a rich table with a row for each layer."""
        table = Table(title=f"{len(self.layers)} layers are 2:4, {len(self.skipped)} weights stay dense")
        table.add_column("layer")
        for column in ("shape", "tokens", "loss", "refined", "rounded", "2:4 before projection", "seconds"):
            table.add_column(column, justify="right")
        table.add_column("note")
        for layer in self.layers:
            refined, rounded = (
                "" if loss is None else f"{loss:.5f}" for loss in (layer.refined_loss, layer.rounded_loss)
            )
            table.add_row(
                layer.name,
                " x ".join(map(str, layer.shape)),
                str(layer.tokens),
                f"{layer.loss:.5f}",
                refined,
                rounded,
                f"{layer.reached:.2%}",
                f"{layer.seconds:.2f}",
                layer.note,
            )
        return table

    def to_json(self, path: str | Path) -> None:
        """Write everything but the masks."""
        content = {
            "settings": self.settings,
            "seconds": self.seconds,
            "mean_loss": self.mean_loss,
            "layers": [asdict(layer) for layer in self.layers],
            "skipped": [asdict(weight) for weight in self.skipped],
        }
        write_text(path, json.dumps(content, indent=1) + "\n")

    def plot(self, path: str | Path) -> None:
        """Draw the relative local loss of every layer, one line a kind of layer; the suffix says the format.

        Raises:
            ValueError: if no layer was pruned.
        """
        if not self.layers:
            raise ValueError("no layer was pruned, so there is nothing to plot")
        from matplotlib.figure import Figure

        kinds: dict[str, list[LayerRecord]] = {}
        blocks = list(dict.fromkeys(layer.block for layer in self.layers))
        for layer in self.layers:
            kinds.setdefault(layer.name.removeprefix(layer.block + ".").removesuffix(".weight"), []).append(layer)
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.add_subplot()
        for kind, layers in kinds.items():
            places = [blocks.index(layer.block) for layer in layers]
            axes.plot(places, [layer.final_loss for layer in layers], marker=".", label=kind)
        axes.set_yscale("symlog", linthresh=1e-4)
        axes.set_xlabel("block")
        axes.set_ylabel("relative local loss")
        if len(kinds) <= 20:
            axes.legend(fontsize="small", ncols=2)
        with replacing(path) as temporary:
            figure.savefig(temporary)


def records_from_json(rows: Sequence[dict[str, Any]]) -> list[LayerRecord]:
    """Return the records whose ``asdict`` went through JSON."""
    return [LayerRecord(**{**row, "shape": tuple(row["shape"])}) for row in rows]
