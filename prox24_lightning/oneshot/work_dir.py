"""A folder with one file for each finished block, from which a killed run goes on."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from prox24_lightning.oneshot.pruning_report import LayerRecord, records_from_json
from prox24_lightning.utils.checksum import checksum
from prox24_lightning.utils.distributed import on_first
from prox24_lightning.utils.file_lock import locked
from prox24_lightning.utils.files import write_text
from prox24_lightning.utils.safetensors_file import json_object, open_tensors, save_tensors
from prox24_lightning.weights.selection import SkippedWeight

logger = logging.getLogger(__name__)

FORMAT, VERSION = "prox24 finished block", 1


@dataclass(frozen=True)
class FinishedBlock:
    """The result for one block: weights and masks by name, a record for each layer, and the weights left dense.

    ``moves`` holds what was reordered before: "dimension.name" -> the entry that came to each place.
    """

    weights: dict[str, Tensor]
    masks: dict[str, Tensor]
    records: list[LayerRecord]
    skipped: list[SkippedWeight]
    moves: dict[str, Tensor] = field(default_factory=dict)


class FinishedBlocks:
    """The finished blocks in one folder; :meth:`open` makes it. Among several ranks the first reads and writes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    @contextmanager
    def open(cls, folder: str | Path, settings: Mapping[str, Any]) -> Iterator[FinishedBlocks]:
        """Own ``folder`` for as long as the context lasts: two runs in one folder would mix their blocks.

        Args:
            folder: made if it does not exist.
            settings: must equal those of the run whose blocks lie there; JSON values only.

        Raises:
            ValueError: if another run is at work in the folder, or if it belongs to a run with other settings.
        """
        found = cls(Path(folder))
        with ExitStack() as lock:
            on_first(lambda: found._claim(lock, json.loads(json.dumps(settings))))
            yield found

    def _claim(self, lock: ExitStack, settings: dict[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.enter_context(locked(self.folder / "lock"))
        except BlockingIOError as error:
            raise ValueError(
                f"work_dir {self.folder} is in use by another run ({error}); wait for it, or use another work_dir"
            ) from None
        except OSError as error:
            logger.warning("work_dir %s cannot be locked (%s): give it to one run alone", self.folder, error)
        self._check_settings(settings)

    def _check_settings(self, wanted: dict[str, Any]) -> None:
        found = self._json("settings.json")
        if found is None:
            self._keep_json("settings.json", wanted)
            return
        different = sorted(key for key in {*found, *wanted} if found.get(key, "missing") != wanted.get(key, "missing"))
        if different:
            key = different[0]
            dense = "load the dense model again, " if key == "dense_weights" else ""
            raise ValueError(
                f"{self.folder} holds blocks of another run: {key} was {found.get(key)!r} and is now "
                f"{wanted.get(key)!r}; {dense}use another work_dir, or remove that folder"
            )

    def once(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return what ``make`` has returned in the run that first asked for ``name``; all ranks call it.

        Raises:
            ValueError: if the file that keeps it is damaged.
        """
        if (found := on_first(lambda: self._json(f"{name}.json"))) is None:
            found = make()
            on_first(lambda: self._keep_json(f"{name}.json", found))
        return found

    def _json(self, name: str) -> dict[str, Any] | None:
        path = self.folder / name
        if not path.exists():
            return None
        try:
            return json_object(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}); use another work_dir, or remove that folder") from None

    def _keep_json(self, name: str, content: dict[str, Any] | None) -> None:
        write_text(self.folder / name, json.dumps(content, indent=1))

    def save(self, index: int, block: FinishedBlock) -> None:
        """Write block ``index`` with a checksum, whole or not at all."""
        on_first(lambda: self._write(index, block))

    def load(self, index: int) -> FinishedBlock | None:
        """Return block ``index``; None if it is not finished, or if its file is damaged, which is logged."""
        return on_first(lambda: self._read(index))

    def _write(self, index: int, block: FinishedBlock) -> None:
        tensors = {f"weight.{name}": tensor.detach().cpu() for name, tensor in block.weights.items()}
        tensors |= {f"mask.{name}": mask.cpu() for name, mask in block.masks.items()}
        tensors |= {f"move.{name}": index for name, index in block.moves.items()}
        content = {
            "layers": json.dumps([asdict(record) for record in block.records]),
            "skipped": json.dumps([asdict(weight) for weight in block.skipped]),
        }
        facts = {"format": FORMAT, "version": str(VERSION), "checksum": _checksum(index, tensors, content)}
        save_tensors(self._path(index), tensors, {**facts, **content})

    def _read(self, index: int) -> FinishedBlock | None:
        path = self._path(index)
        try:
            handle, metadata = open_tensors(path, what="finished block", format=FORMAT, versions=(VERSION,))
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 (no mapping)
            content = {name: metadata[name] for name in ("layers", "skipped")}
            if metadata["checksum"] != _checksum(index, tensors, content):
                raise ValueError("its checksum differs from its content")
        except FileNotFoundError:
            return None
        except (SafetensorError, ValueError, KeyError) as error:
            logger.warning("%s is damaged (%s): this block is solved again", path, error)
            return None
        weights, masks, moves = (_part(tensors, prefix) for prefix in ("weight.", "mask.", "move."))
        skipped = [SkippedWeight(**{**row, "shape": tuple(row["shape"])}) for row in json.loads(content["skipped"])]
        return FinishedBlock(weights, masks, records_from_json(json.loads(content["layers"])), skipped, moves)

    def _path(self, index: int) -> Path:
        return self.folder / f"block_{index:05d}.safetensors"


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _checksum(index: int, tensors: Mapping[str, Tensor], content: Mapping[str, str]) -> str:
    """Return the checksum of all that is read from a block's file, and of its place among the blocks."""
    names = sorted(tensors)
    return checksum([index, names, *(tensors[name] for name in names), content])
