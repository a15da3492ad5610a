"""Models of the Hugging Face hub as local folders: from its cache, and from the network only where that is asked."""

from __future__ import annotations

import json
from pathlib import Path

_FILES = (
    *("*.json", "*.jinja", "*.txt", "*.model", "*.py", "README.md"),
    *("model*.safetensors", "packed*.safetensors"),
)
"""What a model of transformers, dense or packed, consists of; exports to other formats are left where they are."""
_OLD_WEIGHTS = ("pytorch_model*.bin",)


def hub_folder(name: str, *, revision: str | None = None, file: str | None = None, download: bool = False) -> Path:
    """Return the local folder of a model of the hub.

    Args:
        name: ``owner/name``, or ``name``.
        revision: branch, tag or commit; None is the main branch.
        file: a GGUF file that is all the model consists of.
        download: fetch what the cache lacks. False opens no connection.

    Raises:
        FileNotFoundError: if the cache lacks the model, and ``download`` is False.
        OSError: if it cannot be fetched, with the hub's reason.
    """
    from huggingface_hub import snapshot_download, try_to_load_from_cache

    if download:
        patterns = (file,) if file else _FILES
        try:
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
            if not file and not any(folder.glob("*.safetensors")):
                snapshot_download(name, revision=revision, allow_patterns=list(_OLD_WEIGHTS))
        except Exception as error:  # of the hub's, of the network's, of the disk's
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise OSError(f"{name}{_at(revision)} was not fetched from the hub: {reason}") from error
        return folder
    found = try_to_load_from_cache(name, file or "config.json", revision=revision)
    if not isinstance(found, str):
        raise FileNotFoundError(
            f"there is no folder {name}, and the cache holds no model {name}{_at(revision)} of the hub: check the "
            "name, or fetch it with --download"
        )
    folder = Path(found).parents[len(Path(file or "config.json").parts) - 1]
    if (lost := _missing(folder)) is not None:
        raise FileNotFoundError(
            f"the cache holds {name}{_at(revision)} of the hub in part only ({lost} is missing): fetch the rest with "
            "--download"
        )
    return folder


def _missing(folder: Path) -> str | None:
    """Return a file of weights that an index in the folder names and that is not there."""
    for index in folder.glob("*.index.json"):
        names = set(json.loads(index.read_text(encoding="utf-8")).get("weight_map", {}).values())
        for name in sorted(names):
            if not (folder / name).exists():
                return name
    return None


def _at(revision: str | None) -> str:
    return "" if revision is None else f" at {revision}"
