"""Write files so that a kill or a full disk never leaves half of one under its final name; read checkpoints."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from pickle import UnpicklingError
from shutil import rmtree
from tempfile import mkdtemp
from typing import Any
from zipfile import is_zipfile

from prox24_lightning.utils.errors import describe

PACKED_FILE = "packed.safetensors"
"""The usual name of a packed model, beside its ``config.json``."""

PACKED_INDEX = f"{PACKED_FILE}.index.json"
"""Which file holds which tensor of a packed model in several files."""

PACKED_FILES = (PACKED_FILE, PACKED_INDEX, "packed-*-of-*.safetensors")
"""Patterns of the names of all packed files."""

DENSE_FILES = (
    *("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"),
    *("pytorch_model.bin", "pytorch_model-*-of-*.bin", "pytorch_model.bin.index.json"),
)
"""Patterns of the names that ``save_pretrained`` gives to files of weights, today or in older releases."""


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder; the file written there becomes ``path`` when the block ends.

    The file is flushed to the disk before it is renamed, and the folder after, so that a power cut leaves the old file
    or the new one. After an exception ``path`` is unchanged, and the temporary file is gone. A kill may leave the
    temporary file behind; its name begins with a dot and holds ``.partial``. The name is unique: writers in other
    threads, processes, containers and machines never share it, and the last one to finish wins.

    Raises:
        OSError: if the folder does not exist or the disk is full; ``path`` is then as it was before.
    """
    path = Path(path)
    # Same folder, so that the exchange is a rename on one file system. The suffix stays: some writers go by it.
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(8)}.partial{path.suffix}")
    try:
        yield temporary
        _flush(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    with suppress(OSError):  # not every file system can flush a folder
        _flush(path.parent)


@contextmanager
def filling(folder: str | Path, *, instead_of: Sequence[str] = ()) -> Iterator[Path]:
    """Yield a temporary folder; the files written there move into ``folder``, one by one, when the block ends.

    For writers that name their own files. ``folder`` is made if it does not exist; its files that are not written
    again stay. After an exception it holds none of the new files.

    Args:
        folder: to fill.
        instead_of: patterns of names in ``folder``; matching files that are not written again are removed at the end,
            because they would be read in place of the new ones.

    Raises:
        OSError: if the folder cannot be made or the disk is full.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = Path(mkdtemp(prefix=".", suffix=".partial", dir=folder))
    try:
        yield temporary
        files = sorted(path.relative_to(temporary) for path in temporary.rglob("*") if path.is_file())
        for name in files:
            _flush(temporary / name)
        for name in files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(temporary / name, folder / name)
        for old in {path for pattern in instead_of for path in folder.glob(pattern)}:
            if old.relative_to(folder) not in files:
                old.unlink()
    finally:
        rmtree(temporary)
    with suppress(OSError):
        _flush(folder)


def check_folder(folder: str | Path) -> None:
    """Refuse a folder that cannot be made or written into, before the work whose results go there. Makes nothing.

    Raises:
        OSError: if it is a file or lies in one, or if writing there is not permitted.
    """
    path = Path(folder).absolute()
    nearest = next(one for one in (path, *path.parents) if os.path.lexists(one))
    if not nearest.is_dir():
        raise NotADirectoryError(f"{folder} cannot be a folder, because {nearest} is a file: name another folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise PermissionError(f"{folder} cannot be written: no permission to write into {nearest}; name another folder")


def check_output(folder: str | Path, *, overwrite: bool) -> None:
    """Refuse an output folder that holds files, unless they may be replaced; and what :func:`check_folder` refuses.

    Raises:
        FileExistsError: with the name of a file in it.
        OSError: as :func:`check_folder`.
    """
    check_folder(folder)
    path = Path(folder)
    names = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []
    if names and not overwrite:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise FileExistsError(
            f"{folder} exists and holds {names[0]}{more}: name another folder, or replace files with --overwrite"
        )


def write_text(path: str | Path, text: str) -> None:
    """Write ``text`` as UTF-8 under ``path``, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def save_object(path: str | Path, content: Any) -> None:
    """``torch.save`` plain types and tensors under ``path``, whole or not at all.

    Raises:
        OSError: if the folder does not exist or the disk is full.
    """
    import torch

    with replacing(path) as temporary, temporary.open("wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # so torch reports a failed write, which is the context of its own error
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def load_state_dict(path: str | Path, *, mapped: bool = False) -> Mapping[str, Any]:
    """Return the state dict in a file of ``torch.save``: that of a Lightning checkpoint, or the file's own.

    No code of the file runs (``weights_only=True``); tensors come to the CPU.

    Args:
        path: of the file.
        mapped: leave tensors on the disk until they are used, for a caller who takes few of them and at once.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged, or holds no state dict or more than plain data.
    """
    import torch

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped and is_zipfile(path))
    except UnpicklingError as error:
        if (found_class := re.search(r"GLOBAL (\S+)", str(error))) is None:
            raise ValueError(f"{path} is damaged or holds more than plain data: save a state_dict() alone") from error
        raise ValueError(
            f"{path} holds more than plain data ({found_class[1]}), and loading that could run code: save its "
            "state_dict() alone"
        ) from error
    except (EOFError, KeyError, RuntimeError) as error:  # files that torch did not write, or that are cut short
        raise ValueError(f"{path} is damaged or no checkpoint: {describe(error)}") from error
    state = found.get("state_dict", found) if isinstance(found, Mapping) else None
    if not isinstance(state, Mapping) or not any(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"{path} holds no state dict")
    return state


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
