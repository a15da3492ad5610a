"""Where the hidden states of calibration batches wait between blocks: on their device, on CPU, or in files."""

from __future__ import annotations

from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp

from safetensors.torch import load_file, save_file
from torch import Tensor


class HiddenStates:
    """One hidden state for each calibration batch.

    Args:
        place: ``"device"`` leaves tensors where they are, ``"cpu"`` moves them there. Any other text is a folder, in
            which this object makes one of its own, so that runs may share it; :meth:`close` removes that.
    """

    def __init__(self, place: str = "device") -> None:
        self.place = place
        self._entries: list[Tensor | Path] = []
        self._folder: Path | None = None
        if place not in ("device", "cpu"):
            Path(place).mkdir(parents=True, exist_ok=True)
            self._folder = Path(mkdtemp(prefix="hidden_", dir=place))

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> Tensor:
        entry = self._entries[index]
        return entry if isinstance(entry, Tensor) else load_file(entry)["hidden"]

    def append(self, hidden: Tensor) -> None:
        """Add the hidden state of one more batch."""
        self._entries.append(self._stored(len(self._entries), hidden))

    def __setitem__(self, index: int, hidden: Tensor) -> None:
        self._entries[index] = self._stored(index, hidden)

    def close(self) -> None:
        """Forget all hidden states, and remove their files."""
        self._entries.clear()
        if self._folder is not None:
            rmtree(self._folder, ignore_errors=True)

    def _stored(self, index: int, hidden: Tensor) -> Tensor | Path:
        if self._folder is not None:
            path = self._folder / f"{index:05d}.safetensors"
            save_file({"hidden": hidden.contiguous()}, path)
            return path
        return hidden.cpu() if self.place == "cpu" else hidden
