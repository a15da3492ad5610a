"""What is trained: a module, its data and how its scores are read."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor
from torch.utils.data import DataLoader, default_collate
from typing_extensions import override

from benchmarks.recovery.rows import Row
from prox24_lightning.commands.pretrained import Pretrained
from prox24_lightning.commands.texts import TextSource
from recipes.causal_lm import CausalLM, TextTokens


class Task(ABC):
    """One training problem; everything that all rows share."""

    steps: int
    plain: str
    """The row whose fit is the unit of wall time: plain masked fine-tuning."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """All settings that change a result, as plain types."""

    @abstractmethod
    def module(self, lr: float | None) -> LightningModule:
        """A fresh module; ``lr`` None is the task's own."""

    @abstractmethod
    def data(self, seed: int) -> LightningDataModule:
        """The data of a seed."""

    @abstractmethod
    def trainer(self) -> dict[str, Any]:
        """Arguments of the Trainer beyond those of the protocol."""

    @abstractmethod
    def losses(self, scores: dict[str, float]) -> dict[str, float]:
        """Loss by text, of what validation logged."""

    def search_loss(self, scores: dict[str, float]) -> float:
        """The loss that learning rates are chosen by."""
        raise ValueError(f"{type(self).__name__} holds no text apart for choosing learning rates; leave lrs out")

    def calibration(self, data: LightningDataModule) -> list[Any]:
        """Batches for pruning before the first step."""
        raise ValueError(f"{type(self).__name__} has no calibration batches; leave out the rows that prune at once")

    def adapted(self, row: Row) -> Row:
        """The row with what the task itself sets."""
        return row


@lru_cache(maxsize=1)
def _loaded(model: Pretrained) -> tuple[Any, list[Any]]:
    return model.load()


@dataclass(frozen=True)
class Kept(Pretrained):
    """A pretrained model that is read once a process: every run gets a copy."""

    @override
    def load(self) -> tuple[Any, list[Any]]:
        network, others = _loaded(Pretrained(self.name, self.package, self.file, self.head, self.dtype))
        return copy.deepcopy(network), others


class SearchTokens(TextTokens):
    """Adds the text ``search``: the sequences of the last held-out text that follow those that are reported."""

    def val_dataloader(self) -> dict[str, DataLoader]:
        further = self.held_out_sequences(self.evaluation[-1], begin=self.eval_sequences or 0)
        return {**super().val_dataloader(), "search": self._loader(further)}


@dataclass(frozen=True)
class LanguageModel(Task):
    """Fine-tuning of a causal language model by ``recipes/causal_lm.py``."""

    model: Pretrained
    training: TextSource
    evaluation: dict[str, TextSource]
    steps: int
    batch_size: int
    length: int
    eval_sequences: int
    warmup_steps: int
    weight_decay: float
    calibration_sequences: int
    compile: bool
    precision: str
    cache: Path
    plain: str = "magnitude"

    @override
    def identity(self) -> dict[str, Any]:
        return {
            "model": self.model.describe(),
            "training": self.training.describe(),
            "evaluation": {name: source.describe() for name, source in self.evaluation.items()},
            **{name: getattr(self, name) for name in ("steps", "batch_size", "length", "eval_sequences")},
            **{name: getattr(self, name) for name in ("warmup_steps", "weight_decay", "calibration_sequences")},
            **{name: getattr(self, name) for name in ("compile", "precision")},
        }

    @override
    def module(self, lr: float | None) -> LightningModule:
        kept = Kept(self.model.name, self.model.package, self.model.file, self.model.head, self.model.dtype)
        given = {} if lr is None else {"lr": lr}
        return CausalLM(
            kept, warmup_steps=self.warmup_steps, weight_decay=self.weight_decay, compile=self.compile, **given
        )

    @override
    def data(self, seed: int) -> TextTokens:
        return SearchTokens(
            self.model,
            self.training,
            self.evaluation,
            length=self.length,
            batch_size=self.batch_size,
            eval_sequences=self.eval_sequences,
            seed=seed,
            cache=self.cache,
        )

    @override
    def trainer(self) -> dict[str, Any]:
        return {"precision": self.precision, "gradient_clip_val": 1.0}

    @override
    def losses(self, scores: dict[str, float]) -> dict[str, float]:
        return {name: scores[f"val_loss_{name}"] for name in self.evaluation}

    @override
    def search_loss(self, scores: dict[str, float]) -> float:
        return scores["val_loss_search"]

    @override
    def calibration(self, data: LightningDataModule) -> list[dict[str, Tensor]]:
        """The first sequences that the run will train on."""
        assert isinstance(data, TextTokens)
        sequences = data.training_sequences()
        count = min(self.calibration_sequences, len(sequences))
        rows = [sequences[index] for index in range(count)]
        return [default_collate(rows[at : at + self.batch_size]) for at in range(0, count, self.batch_size)]


@dataclass(frozen=True)
class Recipe(Task):
    """A recipe's own config, as ``prox24 fit`` would run it."""

    config: Path
    steps: int
    plain: str = "asp"

    @classmethod
    def of(cls, config: Path) -> Recipe:
        return cls(config, yaml.safe_load(config.read_text())["trainer"]["max_steps"])

    @override
    def identity(self) -> dict[str, Any]:
        parts = {name: self._read()[name] for name in ("model", "data")}
        return {"config": self.config.stem, "steps": self.steps, **parts, "prox24": self._prox24()}

    @override
    def module(self, lr: float | None) -> LightningModule:
        return _made(self._read()["model"], {} if lr is None else {"lr": lr})

    @override
    def data(self, seed: int) -> LightningDataModule:
        return _made(self._read()["data"], {})

    @override
    def trainer(self) -> dict[str, Any]:
        settings = self._read()["trainer"]
        return {name: settings[name] for name in ("gradient_clip_val", "precision") if name in settings}

    @override
    def losses(self, scores: dict[str, float]) -> dict[str, float]:
        return {"validation": scores["val_loss"]}

    @override
    def adapted(self, row: Row) -> Row:
        if not row.prox24 or "start" in row.arguments:
            return row
        return Row(prox24=True, arguments={**self._prox24(), **row.arguments}, distillation=row.distillation)

    def _prox24(self) -> dict[str, Any]:
        callbacks = self._read()["trainer"]["callbacks"]
        return next(c.get("init_args", {}) for c in callbacks if c["class_path"].endswith(".Prox24"))

    def _read(self) -> dict[str, Any]:
        return yaml.safe_load(self.config.read_text())


def _made(entry: dict[str, Any], more: dict[str, Any]) -> Any:
    module, name = entry["class_path"].rsplit(".", 1)
    return getattr(import_module(module), name)(**{**entry.get("init_args", {}), **more})


def default_precision() -> str:
    """bf16-mixed where there is a GPU, else float32."""
    return "bf16-mixed" if torch.cuda.is_available() else "32-true"
