"""The state of a sparsification in the checkpoints of transformers, so that both are always of the same step.

transformers announces a checkpoint only once its folder is whole. So the state is written beside the folders before,
and moved into the folder after: after a kill at any time, a resumed run finds the state, or knows that it is missing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from prox24_lightning.utils.checksum import checksum
from prox24_lightning.utils.files import save_object, write_text
from prox24_lightning.utils.sampling import spread_sample
from prox24_lightning.weights.selection import GroupedWeight
from prox24_lightning.weights.sharded import local_part

_SAMPLES = 64
_CHECKSUM = "weights_checksum"


class CheckpointState:
    """Read and write ``NAME.pt`` in the folders ``checkpoint-STEP`` of ``output_dir``. One process writes.

    Beside the folders lie ``NAME-pending.pt``, the state of a checkpoint that transformers is about to write, and
    ``NAME-since.json``, the step after which all checkpoints have a state.

    Args:
        output_dir: of the ``TrainingArguments``.
        name: of the callback.
        weights: the weights that become 2:4. A checksum of samples of them ties a state to its folder.
    """

    def __init__(self, output_dir: str | Path, name: str, weights: Sequence[GroupedWeight]) -> None:
        self._root = Path(output_dir)
        self._name = name
        self._weights = tuple(weights)
        self._pending = self._root / f"{name}-pending.pt"
        self._since = self._root / f"{name}-since.json"

    def folder(self, step: int) -> Path:
        """Return where transformers writes the checkpoint of a step."""
        return self._root / f"checkpoint-{step}"

    def begin(self, step: int, *, resumed: bool) -> None:
        """Complete the checkpoint that the run goes on from, and note that those after ``step`` have a state.

        Args:
            resumed: the run goes on from a state, so that checkpoints before ``step`` have one as well.
        """
        own = self.folder(step)
        if resumed and own.is_dir() and not self._file(own).exists():
            state = _load(self._pending)
            if state.get(_CHECKSUM) == self._checksum():
                save_object(self._file(own), state)  # copied: other ranks may still read it
        if not (resumed and self._since.exists()):
            self._root.mkdir(parents=True, exist_ok=True)
            write_text(self._since, json.dumps({"since": 0 if resumed else step}))

    def prepare(self, step: int, state: dict[str, Any]) -> None:
        """Write the state of a checkpoint that transformers writes next."""
        self._root.mkdir(parents=True, exist_ok=True)
        save_object(self._pending, {**state, _CHECKSUM: self._checksum()})
        self._file(self.folder(step)).unlink(missing_ok=True)  # of an earlier run in the same folders

    def finish(self, step: int) -> None:
        """Move the prepared state into the folder that transformers has written."""
        os.replace(self._pending, self._file(self.folder(step)))

    def discard(self) -> None:
        """Remove a state that was prepared for a checkpoint which transformers then has not written."""
        self._pending.unlink(missing_ok=True)

    def write(self, step: int, state: dict[str, Any]) -> None:
        """Write the state of a checkpoint into the folder that transformers has written."""
        save_object(self._file(self.folder(step)), {**state, _CHECKSUM: self._checksum()})

    def read(self, step: int, folder: str | Path | None = None) -> dict[str, Any]:
        """Return the state of the checkpoint whose weights the model has now; empty if it was written without one.

        Args:
            folder: the user's word that the checkpoint is this folder; None is that of ``step``.

        Raises:
            ValueError: if a kill has left the checkpoint without the state that belongs to its weights.
        """
        if folder is not None:
            return _without_checksum(_load(self._file(Path(folder))))
        own = self.folder(step)
        for path in (self._file(own), self._pending):
            state = _load(path)
            if state and own.is_dir() and state.get(_CHECKSUM, self._checksum()) == self._checksum():
                return _without_checksum(state)
        if self._file(own).exists() or (own.is_dir() and self._wrote_after() < step):
            whole = [path for path in self._root.glob("checkpoint-*") if self._file(path).exists() and path != own]
            newest = max(whole, key=lambda path: path.stat().st_mtime, default=None)
            raise ValueError(
                f"{own} holds no state of {self._name} that belongs to its weights: the run was killed while it was "
                f"written; resume from {newest or 'the beginning'}, or name {own} as resume_from to take it as it is"
            )
        return {}

    def _file(self, folder: Path) -> Path:
        return folder / f"{self._name}.pt"

    def _wrote_after(self) -> float:
        try:
            return int(json.loads(self._since.read_text(encoding="utf-8"))["since"])
        except (OSError, ValueError, KeyError, TypeError):
            return float("inf")

    def _checksum(self) -> str:
        parts = []
        for weight in self._weights:
            parts += [weight.name, spread_sample(local_part(weight.parameter), _SAMPLES)]
        return checksum(parts)


def _load(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        return torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # torch raises of many kinds
        raise ValueError(f"{path} is damaged and cannot be read: resume from another checkpoint ({error})") from error


def _without_checksum(state: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in state.items() if key != _CHECKSUM}
