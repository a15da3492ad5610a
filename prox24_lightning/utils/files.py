"""Write files so that a kill or a full disk never leaves half of one under its final name."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp

PACKED_FILE = "packed.safetensors"
"""The usual name of a packed model, beside its ``config.json``."""

DENSE_FILES = (
    *("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"),
    *("pytorch_model.bin", "pytorch_model-*-of-*.bin", "pytorch_model.bin.index.json"),
)
"""Patterns of the names under which ``save_pretrained`` writes weights, or has written them."""


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Give a temporary path in the same folder; what is written there becomes ``path`` when the block ends well.

    The file is flushed to the disk before it is renamed, and the folder after, so that a power cut leaves the old file
    or the new one as well. After an exception ``path`` is what it was before, and the temporary file is gone. A
    kill may leave the temporary file behind; its name begins with a dot and holds ``.partial``.

    Raises:
        OSError: if the folder does not exist or the disk is full; ``path`` is as it was then.
    """
    path = Path(path)
    # Same folder, so that the exchange is a rename on one file system. The suffix stays: some writers go by it.
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
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
    """Give a temporary folder; the files written there move into ``folder``, one by one, when the block ends well.

    For writers that name their own files. ``folder`` is made if it does not exist, and files in it that are not
    written anew stay. After an exception it holds none of the new files.

    Args:
        folder: to fill.
        instead_of: patterns of names in ``folder`` whose files are removed at the end if they are not written anew,
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
    """Refuse a folder that cannot be made or written into, before the work whose results go there; nothing is made.

    Raises:
        OSError: if it is a file or lies in one, or if writing there is not permitted.
    """
    path = Path(folder).absolute()
    nearest = next(one for one in (path, *path.parents) if os.path.lexists(one))
    if not nearest.is_dir():
        raise NotADirectoryError(f"{folder} cannot be a folder, because {nearest} is a file: name another folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise PermissionError(f"{folder} cannot be written: no permission to write into {nearest}; name another folder")


def write_text(path: str | Path, text: str) -> None:
    """Write ``text`` as UTF-8 under ``path``, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
