"""``save_pretrained`` and ``push_to_hub`` of a model that was loaded from a packed folder: a packed folder again."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers.utils.hub import convert_file_size_to_int

from prox24_lightning.convert.format.header import PackedEntry
from prox24_lightning.convert.layers.semi_structured_linear import SemiStructuredLinear
from prox24_lightning.io.packed_folder import write_folder
from prox24_lightning.mask import violations_24


def save_pretrained(
    model: Any,
    save_directory: str | Path,
    is_main_process: bool = True,
    state_dict: Mapping[str, Tensor] | None = None,
    push_to_hub: bool = False,
    max_shard_size: int | str | None = None,
    **kwargs: Any,
) -> None:
    """Write ``model`` packed; a folder that was loaded and not changed is written byte for byte as it was.

    Weights of 8 bits that have changed since are rounded again, with one warning. ``model.dequantize()`` first makes
    this write an ordinary dense folder, with every value as it is.

    Args:
        model: loaded by the quantizer of this package.
        save_directory: folder, made if it does not exist.
        is_main_process: False writes nothing.
        state_dict: dense values to write instead of the model's own.
        push_to_hub: upload the folder afterwards; see :func:`push_to_hub`.
        max_shard_size: of the dense tensors of one file, as transformers takes it (``"5GB"``); None writes one file.
        kwargs: of :func:`push_to_hub`; transformers' others have no meaning here.

    Raises:
        ValueError: for a weight that is no longer 2:4, by name with the remedy; for a folder with dense weights.
    """
    if not is_main_process:
        return
    state = dense_state_dict(model) if state_dict is None else dict(state_dict)
    quantizer = model.hf_quantizer
    stored = {name: quantizer.stored_name(name, model) for name in state}
    entries = {name: quantizer.entries[packed] for name, packed in stored.items() if packed is not None}
    dims = {name: entry.dim for name, entry in entries.items()}
    _check_values(state, entries)
    forms = {name: entry.form for name, entry in entries.items() if entry.form is not None}
    fixed = {name: entry.input_scale for name, entry in entries.items() if entry.input_scale is not None}
    info = {**quantizer.info, "model": type(model).__name__}
    limit = None if max_shard_size is None else convert_file_size_to_int(max_shard_size)
    write_folder(save_directory, model, state, dims, info, max_shard_bytes=limit, forms=forms, input_scales=fixed)
    if push_to_hub:
        _upload(save_directory, kwargs.pop("repo_id", Path(save_directory).name), **kwargs)


def push_to_hub(model: Any, repo_id: str, *, max_shard_size: int | str | None = None, **kwargs: Any) -> Any:
    """Upload ``model`` as a packed folder with its card.

    Args:
        model: loaded by the quantizer of this package.
        repo_id: ``"user/name"``.
        max_shard_size: see :func:`save_pretrained`.
        kwargs: ``commit_message``, ``private``, ``token``, ``revision``, ``create_pr``.
    """
    with TemporaryDirectory() as folder:
        save_pretrained(model, folder, max_shard_size=max_shard_size)
        return _upload(folder, repo_id, **kwargs)


def dense_state_dict(model: Any) -> dict[str, Tensor]:
    """Return the state dict with the weights of converted layers expanded: names and order of the dense model."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, SemiStructuredLinear)}
    state: dict[str, Tensor] = {}
    for key, tensor in model.state_dict().items():
        name, _, entry = key.rpartition(".")
        if name not in layers:
            state[key] = tensor
            continue
        if f"{name}.weight" not in state:  # a dense layer has it before the bias
            weight = layers[name].weight
            state[f"{name}.weight"] = weight if layers[name].transposed is None else weight.t().contiguous()
        if entry != "packed":
            state[key] = tensor
    return state


def _check_values(state: Mapping[str, Tensor], entries: Mapping[str, PackedEntry]) -> None:
    """Refuse weights that packing would cut; warn of those that it rounds."""
    for name, entry in entries.items():
        if broken := violations_24(state[name], dim=entry.dim):
            raise ValueError(
                f"{name} is not 2:4: {broken}; it has changed since the packed folder was loaded, and cannot be packed "
                "again: call model.dequantize() first, and save_pretrained writes dense weights (to keep the zeros "
                "while the model trains, use Prox24 or Prox24TrainerCallback with strategy='keep', or load_masks)"
            )
    changed = [
        name
        for name, entry in entries.items()
        if entry.form is not None and not torch.equal(entry.rounded(state[name], name), state[name])
    ]
    if changed:
        warnings.warn(
            f"{changed[0]} and {len(changed) - 1} more of the {len(entries)} packed weights are not as they were "
            f"stored (trained, edited, or loaded in another dtype), and are rounded to {entries[changed[0]].form} "
            "again: changes below a rounding step are lost, and fixed scales of inputs stay those of the old model; "
            "call model.dequantize() before save_pretrained to write dense weights as they are, and prox24 convert "
            "for a packed folder of them",
            stacklevel=3,
        )


def _upload(
    folder: str | Path,
    repo_id: str,
    *,
    commit_message: str = "Upload a packed 2:4 model",
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    **_: Any,
) -> Any:
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    target = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    return api.upload_folder(
        folder_path=str(folder),
        repo_id=target,
        commit_message=commit_message,
        revision=revision,
        create_pr=create_pr,
    )
