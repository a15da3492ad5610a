"""The report of a one-shot pruning run: a record for each layer, as a table, as JSON and as a plot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor

from prox24_lightning.utils.files import replacing, write_text
from prox24_lightning.utils.names import collapse_names, common_start, counted, shorten_all
from prox24_lightning.weights.groups import Dim
from prox24_lightning.weights.selection import SkippedWeight

NAME_WIDTH = 20
"""Characters of a layer's name in the table, so that it fits into 80 columns."""


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
    masks: dict[str, Tensor] = field(default_factory=dict, repr=False)
    dims: dict[str, Dim] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def mean_loss(self) -> float:
        """Mean over the layers of the final relative local loss; 0 without a pruned layer."""
        return sum(layer.final_loss for layer in self.layers) / len(self.layers) if self.layers else 0.0

    def table(self) -> Table:
        """Return a rich table with a row for each layer, 80 columns wide; notes stand once, below."""
        names = [layer.name.removesuffix(".weight") for layer in self.layers]
        start = common_start(names)
        short = shorten_all((name.removeprefix(start) for name in names), NAME_WIDTH)
        title = f"2:4: {counted(len(self.layers), 'layer')}, dense: {counted(len(self.skipped), 'weight')}"
        tokens = sorted({layer.tokens for layer in self.layers})
        title += f"; {tokens[0]:,} tokens each" if len(tokens) == 1 else ""
        title += f"\nnames begin with {start}" if start else ""
        table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=0, show_edge=False)
        table.add_column("layer", no_wrap=True)
        optional = [
            loss for loss in ("refined", "rounded") if any(getattr(x, f"{loss}_loss") is not None for x in self.layers)
        ]
        counts = ["tokens"] if len(tokens) > 1 else []
        for column in ("shape", *counts, "loss", *optional, "s"):
            table.add_column(column, justify="right", no_wrap=True)
        for name, layer in zip(names, self.layers, strict=True):
            losses = [layer.loss, *(getattr(layer, f"{loss}_loss") for loss in optional)]
            table.add_row(
                short[name.removeprefix(start)],
                " x ".join(map(str, layer.shape)),
                *([str(layer.tokens)] if counts else []),
                *("" if loss is None else f"{loss:.5f}" for loss in losses),
                f"{layer.seconds:.1f}",
            )
        table.caption_justify = "left"
        table.caption = "\n".join(self.notes()) or None
        return table

    def notes(self) -> list[str]:
        """Return each note once, with the layers that it is about."""
        about: dict[str, list[str]] = {}
        for layer in self.layers:
            if layer.note:
                about.setdefault(layer.note, []).append(layer.name.removesuffix(".weight"))
        return [f"{collapse_names(names)}: {note}" for note, names in about.items()]

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
