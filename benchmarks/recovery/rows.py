"""The rows of the comparison: each is a list of callbacks, and nothing else differs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from lightning.pytorch import Callback
from torch import nn

from benchmarks.peers import SRSTE, GradualMagnitude, OneShot, ProxSparse
from benchmarks.recovery.averages import Averages
from prox24_lightning import Prox24, RoundWeights
from prox24_lightning.io.pretrained import Pretrained
from recipes.compiled_blocks import compile_blocks

PEERS: dict[str, type[Callback]] = {"sr_ste": SRSTE, "gradual_magnitude": GradualMagnitude, "proxsparse": ProxSparse}


@dataclass(frozen=True)
class Row:
    """What one row does; everything left out is dense training.

    Attributes:
        prune: arguments of ``prune_layerwise``, before the first step; the masks are enforced from then on.
        peer: name in :data:`PEERS`, and ``arguments`` its arguments.
        prox24: whether Prox24 runs, and ``arguments`` its arguments.
        distillation: share of the distillation from the dense model in the loss; 0 is none.
        teacher: further arguments of ``Distillation``. Two make another teacher than the model before the run:
            ``folder`` holds a model, say of a dense run with ``--keep``; ``fine_tuned`` (``lr``, and further arguments
            of the module) trains the dense model first, for as many steps on the same batches.
        module: further arguments of the module, its schedule among them.
        rounding: arguments of ``RoundWeights``; None leaves it out.
        averages: whether averages and mixtures of its weights are scored too; the row's own scores do not change.
    """

    prune: dict[str, Any] | None = None
    peer: str | None = None
    prox24: bool = False
    arguments: dict[str, Any] = field(default_factory=dict)
    distillation: float = 0.0
    teacher: dict[str, Any] = field(default_factory=dict)
    module: dict[str, Any] = field(default_factory=dict)
    rounding: dict[str, Any] | None = None
    averages: bool = False

    def definition(self) -> dict[str, Any]:
        """What tells this row from another of the same name; what older records do not hold is left out if empty."""
        later = ("teacher", "module", "rounding", "averages")
        return {key: value for key, value in asdict(self).items() if key not in later or value}

    def callbacks(self, calibration: Sequence[Any], teacher: nn.Module | None = None) -> list[Callback]:
        """The callbacks in the order in which they have to act.

        Args:
            calibration: batches for ``prune``.
            teacher: the fine-tuned one, if the row asks for one.
        """
        found: list[Callback] = []
        if self.distillation:
            from prox24_lightning import Distillation

            given = {name: value for name, value in self.teacher.items() if name not in ("folder", "fine_tuned")}
            if folder := self.teacher.get("folder"):
                teacher = _saved_model(folder)
            if teacher is not None:
                given["teacher"] = teacher
            found.append(Distillation(**{"share": self.distillation, "verbose": False, **given}))
        if self.prune is not None:
            found.append(OneShot(calibration, **self.prune))
            found.append(Prox24(start=0, freeze=0, strategy="post_step", metric="weight", verbose=False))
        if self.peer is not None:
            found.append(PEERS[self.peer](**self.arguments))
        if self.prox24:
            found.append(Prox24(**{"verbose": False, **self.arguments}))
        if self.rounding is not None:
            found.append(RoundWeights(**self.rounding))
        if self.averages:
            found.append(Averages())
        return found


@lru_cache(maxsize=1)
def _saved_model(folder: str) -> nn.Module:
    """The model of an earlier run, compiled by blocks where that pays."""
    model = Pretrained(folder, head="causal_lm").model()
    model.config.use_cache = False
    if torch.cuda.is_available():
        compile_blocks(model)
    return model


def _one_shot(
    method: str,
    *,
    refine: bool = True,
    dense_target: float = 0.0,
    distillation: float = 0.0,
    reorder_inputs: bool = False,
) -> Row:
    prune = {"method": method, "refine": "masked_gradient" if refine else None, "dense_target": dense_target}
    if reorder_inputs:
        prune["reorder_inputs"] = True
    return Row(prune=prune, distillation=distillation)


_CAREFUL = {"freeze": 0.1, "damping": 0.1, "calibration_batches": 16, "reconstruction_steps": 192}
_RECIPE = {"start": 0.05, "freeze": 0.05, "damping": 0.1, "calibration_batches": 16, "reorder_inputs": True}
"""As in ``configs/causal_lm.yaml``."""

_FINE_TUNED = {"fine_tuned": {"lr": 2e-4, "embedding_lr": 0.1}}
"""The teacher of ``configs/causal_lm_teacher.yaml``."""

FINETUNING: dict[str, Row] = {
    "dense": Row(),
    "magnitude": _one_shot("magnitude", refine=False),
    "wanda": _one_shot("wanda", refine=False),
    "sparsegpt+mg": _one_shot("sparsegpt"),
    "prox+mg": _one_shot("prox"),
    "prox+mg half dense target": _one_shot("prox", dense_target=0.5),
    "sr-ste": Row(peer="sr_ste"),
    "gradual magnitude": Row(peer="gradual_magnitude"),
    "proxsparse": Row(peer="proxsparse"),
    "prox24 post_step": Row(prox24=True, arguments={"strategy": "post_step"}),
    "prox24": Row(prox24=True),
    "dense slow embeddings": Row(module={"embedding_lr": 0.1}),
    "prox24 embeddings kept": Row(prox24=True, arguments=_CAREFUL, module={"embedding_lr": 0.0}),
    "prox24 causal_lm": Row(prox24=True, arguments=_RECIPE, module={"embedding_lr": 0.0}),
    "prox24 causal_lm_distilled": Row(prox24=True, arguments=_RECIPE, distillation=1.0, teacher=_FINE_TUNED),
    "sparsegpt+mg fine-tuned teacher": replace(_one_shot("sparsegpt", distillation=1.0), teacher=_FINE_TUNED),
    "prox24 streamed": Row(prox24=True, arguments={"calibration": "stream"}),
    "prox24 by magnitude": Row(prox24=True, arguments={"calibration": "magnitude"}),
    "prox+mg half dense target reordered": _one_shot("prox", dense_target=0.5, reorder_inputs=True),
    "prox24 reordered": Row(prox24=True, arguments={"reorder_inputs": True}),
    "prox24 quarter given back": Row(prox24=True, arguments={"budget": 0.25}),
    "prox24 reordered distilled": Row(prox24=True, arguments={"reorder_inputs": True}, distillation=0.5),
    "dense distilled": Row(distillation=0.5),
    "sparsegpt+mg distilled": _one_shot("sparsegpt", distillation=0.5),
    "prox24 distilled": Row(prox24=True, distillation=0.5),
    "prox24 distilled fp8": Row(prox24=True, distillation=0.5, rounding={"weights": "fp8_e4m3"}),
    "prox24 distilled hidden": Row(prox24=True, distillation=0.5, teacher={"features": 1.0}),
}
"""Rows for a trained model; "+mg" is refined by masked gradient before the first step, and "causal_lm" and
"causal_lm_distilled" are the recipes of these names."""

SCRATCH: dict[str, Row] = {
    "dense": Row(),
    "asp": Row(prox24=True, arguments={"start": 0.5, "freeze": 0.5, "strategy": "post_step", "metric": "weight"}),
    "sr-ste": Row(peer="sr_ste"),
    "gradual magnitude": Row(peer="gradual_magnitude", arguments={"start": 0.2, "freeze": 0.8}),
    "prox24 post_step": Row(prox24=True, arguments={"strategy": "post_step"}),
    "prox24": Row(prox24=True),
    "prox24 streamed": Row(prox24=True, arguments={"calibration": "stream"}),
    "prox24 by magnitude": Row(prox24=True, arguments={"calibration": "magnitude"}),
}
"""Rows for a run from scratch; "asp" prunes by magnitude at half of the run."""


def further_rows(variants: dict[str, dict[str, Any]] | None) -> dict[str, Row]:
    """Rows of Prox24 with other arguments. Among them ``distillation`` is the row's share of it, ``teacher`` further
    arguments of ``Distillation``, ``rounding`` those of ``RoundWeights``, ``module`` of the module, and
    ``averages`` as in :class:`Row`; ``prune``, arguments of ``prune_layerwise``, takes the place of
    Prox24, and ``prox24: false`` leaves it out."""
    rows = {}
    for name, given in (variants or {}).items():
        arguments = dict(given)
        own = ("teacher", "module", "rounding", "averages", "prune", "distillation", "prox24")
        of_row = {key: arguments.pop(key) for key in own if key in arguments}
        rows[name] = Row(**{"prox24": "prune" not in of_row, "arguments": arguments, **of_row})
    return rows


def chosen_rows(names: Sequence[str] | None, table: dict[str, Row]) -> dict[str, Row]:
    """The rows of these names, in their order; None takes all.

    Raises:
        ValueError: for a name that is not in the table.
    """
    if unknown := [name for name in names or () if name not in table]:
        raise ValueError(f"rows {unknown} are unknown; choose from {list(table)}")
    return {name: table[name] for name in names or table}
