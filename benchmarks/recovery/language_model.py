"""The task of the recovery benchmark: fine-tuning of a causal language model."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor
from torch.utils.data import DataLoader, default_collate
from typing_extensions import override

from benchmarks.recovery.task import Task
from prox24_lightning.io.near_duplicates import check_apart
from prox24_lightning.io.pretrained import Pretrained
from prox24_lightning.io.texts import TextSource
from prox24_lightning.utils.checksum import checksum
from prox24_lightning.utils.files import write_text
from recipes.causal_lm import CausalLM
from recipes.text_tokens import TextTokens


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
    plain: tuple[str, ...] = ("magnitude", "wanda", "sparsegpt+mg", "prox+mg")
    split: Literal["val", "test"] = "val"
    keep: Path | None = None
    """Folder for the model of the last run that ends; it changes no result."""

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
    def module(self, lr: float | None, more: Mapping[str, Any] | None = None) -> LightningModule:
        kept = Kept(self.model.name, self.model.package, self.model.file, self.model.head, self.model.dtype)
        given = {**({} if lr is None else {"lr": lr}), **(more or {})}
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
    def check_texts(self) -> str:
        """Check once for each cache, since it reads the whole training text."""
        facts = [self.training.describe(), *(source.describe() for source in self.evaluation.values())]
        known = self.cache / f"{checksum([facts])[:24]}.apart.txt"
        if not known.exists():
            held_out = {name: source.texts("evaluation") for name, source in self.evaluation.items()}
            line = check_apart(held_out, self.training.texts("calibration"))
            self.cache.mkdir(parents=True, exist_ok=True)
            write_text(known, line)
        return known.read_text(encoding="utf-8")

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
    def finished(self, module: LightningModule) -> None:
        if self.keep is not None:
            assert isinstance(module, CausalLM)
            module.model.save_pretrained(self.keep)
            self.model.tokenizer().save_pretrained(self.keep)

    @override
    def calibration(self, data: LightningDataModule) -> list[dict[str, Tensor]]:
        """The first sequences that the run will train on."""
        assert isinstance(data, TextTokens)
        sequences = data.training_sequences()
        count = min(self.calibration_sequences, len(sequences))
        rows = [sequences[index] for index in range(count)]
        return [default_collate(rows[at : at + self.batch_size]) for at in range(0, count, self.batch_size)]


def default_precision() -> str:
    """bf16-mixed where there is a GPU, else float32."""
    return "bf16-mixed" if torch.cuda.is_available() else "32-true"
