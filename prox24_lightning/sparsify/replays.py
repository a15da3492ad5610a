"""The recorded batches once more through one unit: as the model is now, and as its dense copy was."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from prox24_lightning.layerwise.block import Run
from prox24_lightning.layerwise.blocks import hidden_of
from prox24_lightning.sharding import runnable
from prox24_lightning.sparsify.calls import Call, reach
from prox24_lightning.sparsify.dense_weights import DenseWeights
from prox24_lightning.sparsify.units import Unit


def runs_of(model: nn.Module, unit: Unit) -> list[Run]:
    """Calls of the unit, one a recorded call of its site, on what reaches it in the model as it is now."""
    calls = _reach(model, unit.site.module, unit.module, unit.site.calls)
    return [partial(_run, model, call, unit.module) for call in calls]


def dense_runs_of(model: nn.Module, unit: Unit) -> tuple[list[Run] | None, dict[nn.Module, nn.Module] | None]:
    """The same of the unit as it was when the phase began, and its modules' counterparts there; None without a copy."""
    site = unit.site
    if site.dense is None:
        return None, None
    twins = site.twins()
    if isinstance(dense := site.dense, DenseWeights):
        with dense.in_place(site.module):
            calls = _reach(model, site.module, unit.module, site.calls)
        return [partial(_run_dense, model, dense, call, unit.module) for call in calls], twins
    twin = twins[unit.module]
    return [partial(call, twin) for call in reach(dense, twin, site.calls)], twins


def outputs_wanted(
    unit: Unit, runs: Sequence[Run], dense_runs: Sequence[Run] | None, dense_target: float
) -> list[Tensor]:
    """What the unit shall hand on for each batch: its output as it is now, mixed with the dense copy's."""
    targets = [hidden_of(run(), unit.name).detach() for run in runs]
    if dense_runs is None:
        return targets
    return [
        target.lerp(hidden_of(dense(), unit.name).to(target), dense_target)
        for target, dense in zip(targets, dense_runs, strict=True)
    ]


def _reach(model: nn.Module, site: nn.Module, inner: nn.Module, calls: Sequence[Call]) -> list[Call]:
    with runnable(model, site):
        return reach(site, inner, calls)


def _run(model: nn.Module, call: Call, module: nn.Module) -> Any:
    with runnable(model, module):
        return call(module)


def _run_dense(model: nn.Module, dense: DenseWeights, call: Call, module: nn.Module) -> Any:
    with dense.in_place(module):
        return _run(model, call, module)
