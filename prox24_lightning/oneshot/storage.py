"""Where a layer-wise run keeps hidden states while they wait, and finished blocks in case it is killed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from prox24_lightning.oneshot.report import LayerRecord, records_from_json
from prox24_lightning.utils.distributed import from_first, rank
from prox24_lightning.utils.files import replacing, write_text
from prox24_lightning.weights.selection import SkippedWeight


class HiddenStates:
    """One hidden state a calibration batch: on the device that computed it, on CPU, or in files.

    Args:
        place: ``"device"`` leaves tensors where they are, ``"cpu"`` moves them there, any other text is a folder
            that takes one file a batch.
    """

    def __init__(self, place: str = "device") -> None:
        self.place = place
        self._held: list[Tensor | Path] = []
        if place not in ("device", "cpu"):
            Path(place).mkdir(parents=True, exist_ok=True)

    def __len__(self) -> int:
        return len(self._held)

    def __getitem__(self, index: int) -> Tensor:
        held = self._held[index]
        return held if isinstance(held, Tensor) else load_file(held)["hidden"]

    def append(self, hidden: Tensor) -> None:
        self._held.append(self._keep(len(self._held), hidden))

    def __setitem__(self, index: int, hidden: Tensor) -> None:
        self._held[index] = self._keep(index, hidden)

    def _keep(self, index: int, hidden: Tensor) -> Tensor | Path:
        if self.place == "device":
            return hidden
        if self.place == "cpu":
            return hidden.cpu()
        path = Path(self.place, f"hidden_{index:05d}.safetensors")
        save_file({"hidden": hidden.contiguous()}, path)
        return path


@dataclass(frozen=True)
class FinishedBlock:
    """What a run did to one block: weights and masks by name, a record a layer, and what it left dense there."""

    weights: Mapping[str, Tensor]
    masks: Mapping[str, Tensor]
    records: Sequence[LayerRecord]
    skipped: Sequence[SkippedWeight]


class FinishedBlocks:
    """A folder with one file a finished block, so that a killed run goes on where it stopped.

    Of several processes the first reads and writes, and tells the others what it has read.

    Args:
        folder: made if it does not exist.
        settings: what must be the same for old blocks to be taken over; JSON values only.

    Raises:
        ValueError: if the folder belongs to a run with other settings.
    """

    def __init__(self, folder: str | Path, settings: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        problem = None
        if rank() == 0:
            try:
                self._open(json.loads(json.dumps(settings)))
            except (OSError, ValueError) as error:
                problem = error
        if (problem := from_first(problem)) is not None:
            raise problem

    def _open(self, wanted: dict[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "settings.json"
        if path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
            different = sorted(
                key for key in {*found, *wanted} if found.get(key, "missing") != wanted.get(key, "missing")
            )
            if different:
                key = different[0]
                dense = "load the dense model again, " if key == "dense_weights" else ""
                raise ValueError(
                    f"{self.folder} holds blocks of another run: {key} was {found.get(key)!r} and is now "
                    f"{wanted.get(key)!r}; {dense}use another work_dir, or remove that folder"
                )
        else:
            write_text(path, json.dumps(wanted, indent=1))

    def save(self, index: int, block: FinishedBlock) -> None:
        """Write block ``index``; a kill in between leaves no half-written file."""
        if rank() != 0:
            return
        tensors = {f"weight.{name}": tensor.detach().cpu().contiguous() for name, tensor in block.weights.items()}
        tensors |= {f"mask.{name}": mask.cpu().contiguous() for name, mask in block.masks.items()}
        layers = json.dumps([asdict(record) for record in block.records])
        skipped = json.dumps([asdict(weight) for weight in block.skipped])
        with replacing(self._path(index)) as temporary:
            save_file(tensors, temporary, metadata={"layers": layers, "skipped": skipped})

    def load(self, index: int) -> FinishedBlock | None:
        """Block ``index``, or None if it is not finished."""
        return from_first(self._read(index) if rank() == 0 else None)

    def _read(self, index: int) -> FinishedBlock | None:
        path = self._path(index)
        if not path.exists():
            return None
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
        weights = {key.removeprefix("weight."): value for key, value in tensors.items() if key.startswith("weight.")}
        masks = {key.removeprefix("mask."): value for key, value in tensors.items() if key.startswith("mask.")}
        skipped = [SkippedWeight(**{**row, "shape": tuple(row["shape"])}) for row in json.loads(metadata["skipped"])]
        return FinishedBlock(weights, masks, records_from_json(json.loads(metadata["layers"])), skipped)

    def _path(self, index: int) -> Path:
        return self.folder / f"block_{index:05d}.safetensors"
