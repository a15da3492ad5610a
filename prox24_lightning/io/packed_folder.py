"""Packed models as folders: ``packed.safetensors`` beside the configs and tokenizer of a Hugging Face model."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prox24_lightning.convert.format.reader import PackedFile
from prox24_lightning.convert.format.writer import write_packed
from prox24_lightning.convert.packed_model import EmptyOnMeta, Packable, load_packed
from prox24_lightning.oneshot.save import forget_quantization
from prox24_lightning.utils.files import DENSE_FILES, PACKED_FILE, filling, write_text
from prox24_lightning.utils.markdown import markdown_table
from prox24_lightning.utils.module_copy import cast_model
from prox24_lightning.weights.names import clean_name

PACKED_ENDING = ".safetensors"


def is_packed_folder(folder: str | Path) -> bool:
    """Return whether the folder holds a packed Hugging Face model."""
    return (Path(folder) / PACKED_FILE).is_file() and (Path(folder) / "config.json").is_file()


def load_folder(
    folder: str | Path,
    auto: Any,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    sparse: bool = False,
) -> Any:
    """Load a packed folder with exactly the stored values: dense, or on a GPU with sparse layers.

    Args:
        folder: written by :func:`save_folder`.
        auto: the auto class of transformers that builds the model (``AutoModelForCausalLM``).
        dtype: cast the weights of a dense model to it; None keeps them as they are stored.
        device: of the model.
        sparse: see :func:`~prox24_lightning.convert.packed_model.load_packed`; the dense model never exists.

    Raises:
        FileNotFoundError: if the folder holds no packed file.
        ValueError: if the file is damaged or does not fit the folder's config, or the folder has no config; for
            ``sparse`` without a suitable GPU or with a dtype.
    """
    from transformers import AutoConfig, GenerationConfig

    if sparse and dtype is not None:
        raise ValueError(f"sparse=True takes the stored weights as they are: leave dtype={dtype} out")
    file = PackedFile(Path(folder) / PACKED_FILE)
    if not (Path(folder) / "config.json").is_file():
        raise ValueError(
            f"{folder} holds {PACKED_FILE} but no config.json, so which model to build is not known: build it and fill "
            "it with prox24_lightning.convert.load_packed"
        )
    config = AutoConfig.from_pretrained(str(folder))
    dtypes = [file.dtype(name) for name in file.names if file.dtype(name).is_floating_point]
    if not dtypes:
        raise ValueError(f"{file.path} holds no floating-point tensor, so it is not the model of {folder}/config.json")
    model = _build(auto, config, dtype or max(set(dtypes), key=dtypes.count))
    load_packed(model, file, device=device, sparse=sparse)
    if dtype is not None:
        cast_model(model, dtype)
    if (Path(folder) / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(str(folder))
    return model.eval()


def _build(auto: Any, config: Any, dtype: torch.dtype) -> Any:
    """Build the model with weights on the meta device. Buffers that it computes, such as tables of positions, are as
    from_pretrained makes them: computed in float32, then cast to the model's dtype."""
    with EmptyOnMeta():
        precise = dict(auto.from_config(deepcopy(config), dtype=torch.float32).named_buffers())
        model = auto.from_config(config, dtype=dtype)
    for name, buffer in model.named_buffers():
        if not buffer.is_meta:
            buffer.copy_(precise[name])
    return model


def save_folder(
    folder: str | Path,
    model: nn.Module,
    packable: Packable,
    *,
    source: str,
    companions: Sequence[Any] = (),
) -> PackedFile:
    """Write a packed model, with a card and, for a Hugging Face model, its configs.

    Args:
        folder: made if it does not exist; a failure leaves none of the new files in it. One that holds dense weights
            is refused.
        model: its weights do not change.
        packable: the decisions of :func:`~prox24_lightning.convert.packed_model.find_packable`.
        source: one line on the model's origin.
        companions: tokenizer and the like; anything with ``save_pretrained``.

    Returns:
        the written file, open.

    Raises:
        ValueError: for a weight that is not 2:4 or holds NaN, by name; for a folder with dense weights.
        RuntimeError: if the file, read back, differs from the model.
    """
    folder = Path(folder)
    refuse_dense(folder)
    forget_quantization(model)
    state = {clean_name(name): tensor for name, tensor in model.state_dict().items()}
    with filling(folder) as temporary:
        path = write_packed(temporary / PACKED_FILE, state, packable.dims, {"source": source, "model": _kind(model)})
        file = PackedFile(path)
        for name in file.packed:
            if not torch.equal(file.read(name, state[name].device), state[name]):
                if state[name].float().isnan().any():
                    raise ValueError(
                        f"{name} holds NaN, so the model is damaged: mend it, or store this weight dense: skip={name!r}"
                    )
                raise RuntimeError(f"{name} read back from {path} differs from the model's")
        for part in (getattr(model, "config", None), getattr(model, "generation_config", None), *companions):
            if hasattr(part, "save_pretrained"):
                part.save_pretrained(str(temporary))
        write_text(temporary / "README.md", _card(file, packable, model, source))
    return PackedFile(folder / PACKED_FILE)


def refuse_dense(folder: str | Path) -> None:
    """Refuse to put packed weights beside dense ones, since a folder holds one model.

    Raises:
        ValueError: if the folder holds dense weights, with their name.
    """
    found = sorted(path.name for pattern in DENSE_FILES for path in Path(folder).glob(pattern))
    if found:
        raise ValueError(
            f"{folder} holds dense weights ({found[0]}), and {PACKED_FILE} beside them is a second model in one "
            "folder: remove one of the two, or name another folder"
        )


def _kind(model: nn.Module) -> str:
    return type(getattr(model, "_orig_mod", model)).__name__


def _how_to_load(model: nn.Module) -> str:
    if hasattr(getattr(model, "config", None), "save_pretrained"):
        return (
            "`prox24_lightning.io.packed_folder.load_folder` loads the model from it, exactly dense or, on a "
            "GPU, with sparse layers (`sparse=True`). `prox24 convert THIS_FOLDER OUT --form dense` writes an "
            "ordinary model, which `from_pretrained` reads; this one it does not."
        )
    return (
        "`prox24_lightning.convert.load_packed` fills a model of the same structure from it, exactly "
        f"dense or, on a GPU, with sparse layers (`sparse=True`). `prox24 convert THIS_FOLDER/{PACKED_FILE} OUT "
        "--form dense` writes an ordinary `model.safetensors`."
    )


def _card(file: PackedFile, packable: Packable, model: nn.Module, source: str) -> str:
    lines = [
        "---",
        "tags: [sparse, '2:4', packed]",
        "---",
        "",
        f"# {_kind(model)}, 2:4 sparse, packed",
        "",
        f"From {source}. `{PACKED_FILE}` holds {len(file.packed)} weights as two values and two 2-bit positions for "
        f"every four entries (tensors `NAME.values` and `NAME.indices`), the others as they are: "
        f"{file.stored_bytes:,} bytes instead of {file.dense_bytes:,} ({file.stored_bytes / file.dense_bytes:.4f}).",
        "",
        _how_to_load(model),
        "",
        markdown_table(("stored dense", "why"), packable.dense.items()),
        "",
    ]
    return "\n".join(lines)
