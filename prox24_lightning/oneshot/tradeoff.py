"""Loss against predicted speed, from dense to uniform 2:4: the model pruned at several budgets."""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prox24_lightning.calibration.blocks import find_blocks
from prox24_lightning.calibration.isolation.isolated import isolated
from prox24_lightning.oneshot.block_inputs import BlockInputs, chain_of_blocks
from prox24_lightning.oneshot.budget import choose_dense_layers
from prox24_lightning.oneshot.progress import LayerProgress
from prox24_lightning.oneshot.prune import check_ordinary, inside_blocks, prune_layerwise
from prox24_lightning.solvers.budget.choose import LayerPrice, predicted_speedup
from prox24_lightning.solvers.budget.measure import BudgetChoices
from prox24_lightning.solvers.budget.portfolio import Choice
from prox24_lightning.solvers.budget.price import LayerTimes
from prox24_lightning.utils.checksum import checksum
from prox24_lightning.utils.devices.cuda import exact_device
from prox24_lightning.utils.files import replacing, write_text
from prox24_lightning.utils.safetensors_file import json_object
from prox24_lightning.utils.tensors import tensors_in, without_inference
from prox24_lightning.weights.groups import Geometry
from prox24_lightning.weights.selection import select_weights

log = logging.getLogger(__name__)

BUDGETS = (0.0, 0.1, 0.25, 0.5, 0.75)


@dataclass(frozen=True)
class TradeoffPoint:
    """One model on the way from dense to 2:4.

    Attributes:
        label: "dense", "2:4", or the budget.
        budget: share of the speed-up that is given back.
        dense: names of the weights that stay dense.
        choice: what they were chosen by (:mod:`~prox24_lightning.solvers.budget.portfolio`).
        speedup: predicted, of the products of all layers that could be 2:4.
        loss: held-out loss.
    """

    label: str
    budget: float
    dense: tuple[str, ...]
    speedup: float
    loss: float
    choice: str = ""


@dataclass(frozen=True)
class Tradeoff:
    """Result of :func:`measure_tradeoff`.

    Attributes:
        points: from uniform 2:4 to dense.
        prices: of all layers.
        timed: whether times come from measured kernels rather than multiply-adds.
    """

    points: tuple[TradeoffPoint, ...]
    prices: tuple[LayerPrice, ...]
    timed: bool

    @property
    def dense_loss(self) -> float:
        """The loss of the dense model."""
        return next(point.loss for point in self.points if point.label == "dense")

    def fastest(self, most: float) -> TradeoffPoint:
        """Return the fastest point whose loss lies at most ``most`` above the dense model's; the dense one if none."""
        fitting = [one for one in self.points if one.label == "dense" or one.loss - self.dense_loss <= most]
        return max(fitting, key=lambda point: (point.speedup, -point.loss))

    def to_json(self) -> str:
        """Return everything as JSON."""
        return json.dumps(asdict(self), indent=1) + "\n"

    def to_csv(self) -> str:
        """Return one line a point."""
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow(("label", "budget", "speedup", "loss", "excess", "dense layers", "choice"))
        for point in self.points:
            excess = point.loss - self.dense_loss
            dense = len(point.dense)
            table.writerow((point.label, point.budget, point.speedup, point.loss, excess, dense, point.choice))
        return text.getvalue()

    def plot(self, path: str | Path, *, chosen: TradeoffPoint | None = None, unit: str = "nats") -> None:
        """Draw loss above dense against predicted speed, with ``chosen`` marked; the suffix says the format."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6.4, 4.2), layout="constrained")
        axes = figure.add_subplot()
        points = sorted(self.points, key=lambda point: point.speedup)
        rises = [point.loss - self.dense_loss for point in points]
        axes.plot([point.speedup for point in points], rises, color="C0", marker="o")
        for point, rise in zip(points, rises, strict=True):
            label = point.label if point.label in ("dense", "2:4") else f"{point.budget:.0%} given back"
            axes.annotate(label, (point.speedup, rise), textcoords="offset points", xytext=(6, 6), fontsize="small")
        if chosen is not None:
            axes.plot([chosen.speedup], [chosen.loss - self.dense_loss], "*", color="C3", markersize=16, zorder=3)
        axes.margins(0.12)
        axes.set_xlabel("predicted speed-up of the pruned layers" + ("" if self.timed else " (multiply-adds)"))
        axes.set_ylabel(f"held-out loss above dense, {unit}")
        with replacing(path) as temporary:
            figure.savefig(temporary)


@torch.inference_mode(False)
def measure_choices(
    model: nn.Module,
    batches: Sequence[Any],
    budgets: Sequence[float],
    *,
    targets: Sequence[str] | None = None,
    skip: Sequence[str] | None = None,
    geometry: Geometry = "row",
    blocks: str | None = None,
    device: str | torch.device | None = None,
    layer_times: LayerTimes | None = None,
    progress: bool = True,
) -> BudgetChoices:
    """Return the price of every layer that :func:`~prox24_lightning.oneshot.prune_layerwise` would prune, and what it
    would leave dense at each of ``budgets``.

    The other arguments are those of that function; the model is as before afterwards.
    """
    check_ordinary(model)
    batches = [without_inference(batch) for batch in batches]
    found = find_blocks(model, blocks)
    selection = select_weights(model, targets=targets, skip=skip, geometry=geometry)
    chosen = inside_blocks(selection.chosen, found, [])
    home = next(model.parameters()).device
    work = exact_device(home if device is None else device)
    with isolated(model), LayerProgress(len(chosen), enabled=progress) as bar:
        found, kept = chain_of_blocks(model, found, batches, home, blocks)
        with BlockInputs.recorded(model, found, kept, home=home, device=work, offload="device") as inputs:
            return choose_dense_layers(model, inputs, batches, chosen, budgets, bar, layer_times)


def measure_tradeoff(
    model: nn.Module,
    batches: Sequence[Any],
    evaluate: Callable[[nn.Module], float],
    *,
    budgets: Sequence[float] = BUDGETS,
    layer_times: LayerTimes | None = None,
    device: str | torch.device | None = None,
    work_dir: str | Path | None = None,
    progress: bool = True,
    prune: dict[str, Any] | None = None,
) -> Tradeoff:
    """Prune the model once a budget, each time from the dense weights, and score it.

    Args:
        model: as :func:`~prox24_lightning.oneshot.prune_layerwise` takes it; dense again afterwards.
        batches: calibration batches.
        evaluate: returns the held-out loss of the model.
        budgets: shares of the speed-up given back; 0 is uniform 2:4. Dense is always among the points.
        layer_times: see :func:`~prox24_lightning.oneshot.prune_layerwise`.
        device: where blocks are solved.
        work_dir: folder for choices and finished points, from which a killed run goes on.
        progress: show bars.
        prune: further arguments of ``prune_layerwise``.

    Raises:
        ValueError: for budgets out of range, and as ``prune_layerwise`` does.
    """
    options = dict(prune or {})
    if wrong := [budget for budget in budgets if not 0 <= budget < 1]:
        raise ValueError(f"budgets {wrong} must lie in [0, 1)")
    finished = _Finished(work_dir, model, batches, options, layer_times)
    chosen_by = {key: options[key] for key in ("targets", "skip", "geometry", "blocks") if key in options}
    budgets = sorted({float(budget) for budget in budgets})
    if missing := [budget for budget in budgets if str(budget) not in finished.choices]:
        found = measure_choices(
            model, batches, missing, device=device, layer_times=layer_times, progress=progress, **chosen_by
        )
        finished.keep(missing, found)
    prices = finished.prices
    dense = {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}
    points = []
    for budget in budgets:
        choice = finished.choices[str(budget)]
        names = sorted(choice.dense)
        loss = finished.losses.get(str(budget))
        if loss is None:
            try:
                skip = [*(options.get("skip") or []), *names]
                folder = None if work_dir is None else Path(work_dir) / f"budget_{budget}"
                given = {**options, "skip": skip or None, "device": device, "progress": progress, "work_dir": folder}
                prune_layerwise(model, batches, **given)
                loss = evaluate(model)
            finally:
                model.load_state_dict(dense)
            finished.add(str(budget), loss)
        label = "2:4" if budget == 0 else f"{budget:g}"
        points.append(TradeoffPoint(label, budget, tuple(names), predicted_speedup(prices, names), loss, choice.name))
        log.info("budget %g: %d layers dense by %s, loss %.4f", budget, len(names), choice.name, loss)
    everything = tuple(price.name for price in prices)
    points.append(TradeoffPoint("dense", 1.0, everything, 1.0, evaluate(model)))
    return Tradeoff(tuple(points), prices, bool(layer_times))


class _Finished:
    """Choices and losses of an earlier run with the same model, batches and settings, in one JSON file."""

    def __init__(
        self,
        work_dir: str | Path | None,
        model: nn.Module,
        batches: Sequence[Any],
        options: dict[str, Any],
        layer_times: LayerTimes | None,
    ) -> None:
        self._path = None if work_dir is None else Path(work_dir) / "tradeoff.json"
        times = sorted((layer_times or {}).items())
        self._identity = checksum(
            [*model.parameters(), *tensors_in(list(batches)), repr(sorted(options.items())), repr(times)]
        )
        self.prices: tuple[LayerPrice, ...] = ()
        self.choices: dict[str, Choice] = {}
        self.losses: dict[str, float] = {}
        if self._path is not None and self._path.exists():
            self._read(self._path)

    def _read(self, path: Path) -> None:
        try:
            content = json_object(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}): use another folder, or remove that file") from None
        # A file without choices is of a version that made others.
        if content.get("identity") != self._identity or "choices" not in content:
            raise ValueError(
                f"{path} belongs to a run with another model, text, settings or version: use another folder"
            )
        self.prices = tuple(LayerPrice(**price) for price in content["prices"])
        self.choices = {key: Choice.from_dict(one) for key, one in content["choices"].items()}
        self.losses = content["losses"]

    def keep(self, budgets: Sequence[float], found: BudgetChoices) -> None:
        """Keep what has been chosen at budgets."""
        self.prices = found.prices
        self.choices |= {str(budget): choice for budget, choice in zip(budgets, found.choices, strict=True)}
        self._write()

    def add(self, budget: str, loss: float) -> None:
        """Keep the loss at a budget."""
        self.losses[budget] = loss
        self._write()

    def _write(self) -> None:
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            content = {
                "identity": self._identity,
                "prices": [asdict(price) for price in self.prices],
                "choices": {budget: choice.to_dict() for budget, choice in self.choices.items()},
                "losses": self.losses,
            }
            write_text(self._path, json.dumps(content, indent=1))
