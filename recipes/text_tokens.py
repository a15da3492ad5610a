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
        generated: file of text that the model wrote itself, of ``python -m recipes.generated_text``; null: none.
        generated_share: share of each batch, on every process, that comes from it; above 0 and below 1.

    Raises:
        ValueError: if that share of a batch is no sequence, or all.
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
        generated: Path | None = None,
        generated_share: float = 0.25,
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
        self.generated = generated
        self.generated_share = generated_share
        if generated is not None:
            self._share()
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

    def training_sequences(self) -> Sequences | MixedSequences:
        """All sequences to train on, in the order of the run."""
        text = Sequences(*cut(self.tokens("training"), self.length, seed=self.seed, label="the training text"))
        if self.generated is None:
            return text
        written = self._written(self.generated)
        generated = Sequences(*cut(written, self.length, seed=self.seed, label=str(self.generated)))
        # Lightning deals sequences out to processes in turn: so each has its share in each of its batches.
        trainer: Any = self.trainer
        processes = 1 if trainer is None else trainer.world_size
        return MixedSequences(text, generated, processes * self.batch_size, processes * self._share())

    def _share(self) -> int:
        """Return how many sequences of a batch are generated; a tuner may have changed the batch."""
        share = round(self.generated_share * self.batch_size)
        if not 0 < share < self.batch_size:
            raise ValueError(
                f"generated_share={self.generated_share} of batch_size={self.batch_size} leaves {share} generated "
                "sequences a batch; at least one, and one of the training text, is needed"
            )
        return share

    def _written(self, path: Path) -> np.ndarray:
        """Return the tokens of the file of generated text, mapped from disk."""
        written = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(written, np.ndarray) or not np.issubdtype(written.dtype, np.integer):
            raise ValueError(f"{path} holds no array of tokens; write it by python -m recipes.generated_text")
        return written.reshape(-1)

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

    def _loader(self, sequences: Dataset, **options: Any) -> DataLoader:
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
        and_generated = "" if self.generated is None else f" and a share of {self.generated_share} of {self.generated}"
        if wanted > sequences:
            raise ValueError(
                f"{trainer.max_steps} steps need {wanted} sequences of {self.length} tokens, but the training text "
                f"({self.sources['training'].describe()}{and_generated}) holds {sequences}, and none is used twice; "
                "lower max_steps, batch_size or length, or name a larger source"
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


class MixedSequences(Dataset):
    """Whole batches: sequences of a text in their order, then ``share`` sequences that the model wrote.

    Args:
        text: the training text.
        generated: what the model wrote.
        batch_size: sequences a batch, of all processes together.
        share: of them, how many are generated.
    """

    def __init__(self, text: Sequences, generated: Sequences, batch_size: int, share: int) -> None:
        self.text = text
        self.generated = generated
        self.share = share
        self.rest = batch_size - share

    def __len__(self) -> int:
        return (self.rest + self.share) * min(len(self.text) // self.rest, len(self.generated) // self.share)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        batch, place = divmod(index, self.rest + self.share)
        if place < self.rest:
            return self.text[batch * self.rest + place]
        return self.generated[batch * self.share + place - self.rest]
