"""A recipe as a task: trained from scratch as its config says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import yaml
from lightning.pytorch import LightningDataModule, LightningModule
from typing_extensions import override

from benchmarks.recovery.rows import Row
from benchmarks.recovery.task import Task
from recipes.bytelm import PythonText

SPLIT = "near-duplicates on one side"
"""Part of a run's identity: runs of another split of the text do not count."""


@dataclass(frozen=True)
class Recipe(Task):
    """A recipe's own config, as ``prox24 fit`` would run it."""

    config: Path
    steps: int
    plain: tuple[str, ...] = ("asp",)
    split: Literal["val", "test"] = "test"

    @classmethod
    def of(cls, config: Path) -> Recipe:
        return cls(config, yaml.safe_load(config.read_text())["trainer"]["max_steps"])

    @override
    def identity(self) -> dict[str, Any]:
        parts = {name: self._read()[name] for name in ("model", "data")}
        split = {"split": SPLIT} if isinstance(self.data(0), PythonText) else {}
        return {"config": self.config.stem, "steps": self.steps, **parts, "prox24": self._prox24(), **split}

    @override
    def module(self, lr: float | None, more: Mapping[str, Any] | None = None) -> LightningModule:
        return _made(self._read()["model"], {**({} if lr is None else {"lr": lr}), **(more or {})})

    @override
    def data(self, seed: int) -> LightningDataModule:
        return _made(self._read()["data"], {})

    @override
    def check_texts(self) -> str | None:
        data = self.data(0)
        return data.check_texts() if isinstance(data, PythonText) else None

    @override
    def trainer(self) -> dict[str, Any]:
        settings = self._read()["trainer"]
        return {name: settings[name] for name in ("gradient_clip_val", "precision") if name in settings}

    @override
    def losses(self, scores: dict[str, float]) -> dict[str, float]:
        return {"test": scores["test_loss"]}

    @override
    def adapted(self, row: Row) -> Row:
        if not row.prox24 or "start" in row.arguments:
            return row
        return replace(row, arguments={**self._prox24(), **row.arguments})

    def _prox24(self) -> dict[str, Any]:
        callbacks = self._read()["trainer"]["callbacks"]
        return next(c.get("init_args", {}) for c in callbacks if c["class_path"].endswith(".Prox24"))

    def _read(self) -> dict[str, Any]:
        return yaml.safe_load(self.config.read_text())


def _made(entry: dict[str, Any], more: dict[str, Any]) -> Any:
    module, name = entry["class_path"].rsplit(".", 1)
    return getattr(import_module(module), name)(**{**entry.get("init_args", {}), **more})
