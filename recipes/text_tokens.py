"""Text as sequences of tokens for language models: shuffled over the corpus, each used at most once."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from prox24_lightning.io.pretrained import Pretrained
from prox24_lightning.io.texts import Split, TextSource
from recipes.token_corpus import cut, source_tokens


@lru_cache(maxsize=1)
def _tokenizer(model: Pretrained) -> Any:
    """Read once a process for all texts and runs: from a GGUF file that takes ten seconds."""
    return model.tokenizer()


class TextTokens(LightningDataModule):
    """Text as sequences of tokens, shuffled over the whole corpus; no sequence is trained on twice.

    Args:
        model: whose tokenizer is used, as in :class:`~recipes.causal_lm.CausalLM`.
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
            tokenizer = _tokenizer(self.model)
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
        return self._loader(self.training_sequences(), ResumableLoader, drop_last=True)

    def val_dataloader(self) -> dict[str, DataLoader]:
        return {name: self._loader(self.held_out_sequences(name)) for name in self.evaluation}

    def test_dataloader(self) -> dict[str, DataLoader]:
        return self.val_dataloader()

    def _loader(self, sequences: Sequences, kind: type[DataLoader] = DataLoader, **options: Any) -> DataLoader:
        return kind(
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


class ResumableLoader(DataLoader):
    """Goes on where it stood after a resume in the middle of an epoch: Lightning keeps its state in checkpoints.

    Its order must not depend on random numbers. Batches before that place are loaded again, and dropped.
    """

    _begin = 0
    _position = 0

    @override
    def __iter__(self) -> Any:
        begin, self._begin = self._begin, 0
        for number, batch in enumerate(super().__iter__(), start=1):
            if number > begin:
                self._position = number
                yield batch

    def state_dict(self) -> dict[str, int]:
        """The number of batches that this epoch has had; none after the last."""
        return {"batches": self._position % max(1, len(self))}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Begin the next epoch behind so many batches."""
        self._begin = self._position = state_dict["batches"]


class Sequences(Dataset):
    """``rows[order]`` as batches want them: ``{"input_ids": int64 (length,)}``."""

    def __init__(self, rows: np.ndarray, order: np.ndarray) -> None:
        self.rows = rows
        self.order = order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": torch.from_numpy(self.rows[self.order[index]].astype(np.int64))}
