"""``bytelm``: a small GPT over bytes, trained from scratch on the text that ships with Python."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics.text import Perplexity

from prox24_lightning.io.near_duplicates import check_apart
from recipes.optim import adamw_with_cosine
from recipes.stdlib_text import held_out_documents, stdlib_documents

BYTES = 256


class Block(nn.Module):
    """Pre-norm transformer block: causal self-attention, then a GELU MLP of four times the width."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class ByteGPT(nn.Module):
    """Bytes ``(batch, length)`` -> logits ``(batch, length, 256)``; the output layer shares the byte embedding."""

    def __init__(self, width: int, depth: int, heads: int, context: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width={width} does not divide by heads={heads}; change one of the two")
        self.embedding = nn.Embedding(BYTES, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, BYTES, bias=False)
        self.head.weight = self.embedding.weight
        self.apply(self._init)
        for name, parameter in self.named_parameters():
            if name.endswith(("out.weight", "down.weight")):  # residual branches start small (GPT-2)
                nn.init.normal_(parameter, std=0.02 / (2 * depth) ** 0.5)

    @staticmethod
    def _init(module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        return self.head(self.norm(self.blocks(self.embedding(tokens) + self.position(places))))


class ByteLM(LightningModule):
    """Next-byte prediction.

    Args:
        width: size of the residual stream.
        depth: number of transformer blocks.
        heads: attention heads a block; divides ``width``.
        context: longest sequence, in bytes.
        lr: peak learning rate of AdamW.
        weight_decay: decay of matrices and embeddings.
        warmup_steps: optimizer steps of linear warm-up.
    """

    def __init__(
        self,
        width: int = 128,
        depth: int = 4,
        heads: int = 4,
        context: int = 128,
        lr: float = 2e-3,
        weight_decay: float = 0.1,
        warmup_steps: int = 40,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = ByteGPT(width, depth, heads, context)
        self.perplexity = Perplexity()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss, _ = self._loss(batch["bytes"])
        self.log("train_loss", loss, prog_bar=True)
        self.log("lr", self.trainer.optimizers[0].param_groups[0]["lr"])
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def configure_optimizers(self) -> Any:
        return adamw_with_cosine(
            self,
            lr=self.hparams["lr"],
            weight_decay=self.hparams["weight_decay"],
            warmup_steps=self.hparams["warmup_steps"],
        )

    def _evaluate(self, batch: dict[str, Tensor], stage: str) -> None:
        loss, logits = self._loss(batch["bytes"])
        self.perplexity.update(logits.float(), batch["bytes"][:, 1:])
        self.log(f"{stage}_loss", loss, batch_size=len(logits))
        self.log(f"{stage}_ppl", self.perplexity, prog_bar=True)

    def _loss(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        logits = self(tokens[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()), logits


class PythonText(LightningDataModule):
    """Documents of Python's own text as blocks of ``context + 1`` bytes, split by document.

    Documents that repeat each other's passages are on one side of the split.

    Args:
        context: bytes the model reads; a block holds one more, the last target.
        batch_size: blocks a batch.
        validation: fraction of the text held out for validation and test.
        max_validation_blocks: so many of the held-out blocks are for validation, the others for test; None takes
            all for both.
        num_workers: processes that load batches; the blocks lie in memory, so 0 is fast.
    """

    def __init__(
        self,
        context: int = 128,
        batch_size: int = 32,
        validation: float = 0.1,
        max_validation_blocks: int | None = None,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()

    def setup(self, stage: str) -> None:
        documents = Dataset.from_list([{"name": d.name, "text": d.text} for d in stdlib_documents()])
        names = held_out_documents(stdlib_documents(), self.hparams["validation"])
        held_out = [name in names for name in documents["name"]]
        blocks = self._blocks(documents.select(np.flatnonzero(held_out)))
        cut = self.hparams["max_validation_blocks"]
        if cut is not None and cut >= len(blocks):
            raise ValueError(
                f"max_validation_blocks={cut} leaves none of the {len(blocks)} held-out blocks for test; lower it, or "
                "raise validation"
            )
        self.held_out = blocks if cut is None else blocks.select(range(cut))
        self.test = blocks if cut is None else blocks.select(range(cut, len(blocks)))
        self.training = self._blocks(documents.select(np.flatnonzero(np.logical_not(held_out))))

    def check_texts(self) -> str:
        """Return a line with the measured overlap of held-out and training text.

        Raises:
            ValueError: if they share a window of words.
        """
        names = held_out_documents(stdlib_documents(), self.hparams["validation"])
        parts = {held: [d.text for d in stdlib_documents() if (d.name in names) == held] for held in (True, False)}
        return check_apart({"test": parts[True]}, parts[False])

    def train_dataloader(self) -> DataLoader:
        return self._loader(self.training, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader:
        return self._loader(self.held_out)

    def test_dataloader(self) -> DataLoader:
        return self._loader(self.test)

    def _blocks(self, documents: Dataset) -> Dataset:
        size = self.hparams["context"] + 1
        # A zero byte ends each document; the rest of the last block is dropped.
        stream = np.frombuffer(b"".join(text.encode() + b"\0" for text in documents["text"]), dtype=np.uint8)
        blocks = stream[: len(stream) // size * size].reshape(-1, size).astype(np.int64)
        return Dataset.from_dict({"bytes": blocks}).with_format("torch")

    def _loader(self, blocks: Dataset, **options: Any) -> DataLoader:
        return DataLoader(
            blocks, batch_size=self.hparams["batch_size"], num_workers=self.hparams["num_workers"], **options
        )
