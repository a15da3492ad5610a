"""Packed models as folders: ``packed.safetensors`` beside the configs and tokenizer of a Hugging Face model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prox24_lightning.convert.form_choice import layers_of_16_bits
from prox24_lightning.convert.format.header import PackedEntry, version_of
from prox24_lightning.convert.format.shards import PackedModel, open_packed, write_packed_files
from prox24_lightning.convert.packed_model import EmptyOnMeta, Packable, load_packed
from prox24_lightning.oneshot.save import forget_quantization
from prox24_lightning.utils.files import DENSE_FILES, PACKED_FILE, PACKED_FILES, PACKED_INDEX, filling, write_text
from prox24_lightning.utils.markdown import markdown_table
from prox24_lightning.utils.module_copy import cast_model
from prox24_lightning.utils.names import counted
from prox24_lightning.weights.names import clean_name
from prox24_lightning.weights.rounding import LARGEST, RoundedForm

PACKED_ENDING = ".safetensors"

QUANT_METHOD = "prox24"
"""What ``config.json`` of a packed folder names as the method that transformers looks up."""


def is_packed_folder(folder: str | Path) -> bool:
    """Return whether the folder holds a packed Hugging Face model."""
    return _holds_packed(folder) and (Path(folder) / "config.json").is_file()


def is_packed_module(folder: str | Path) -> bool:
    """Return whether the folder holds a packed model that is none of Hugging Face's: its weights, and no config."""
    return _holds_packed(folder) and not (Path(folder) / "config.json").is_file()


def _holds_packed(folder: str | Path) -> bool:
    return any((Path(folder) / name).is_file() for name in (PACKED_FILE, PACKED_INDEX))


@torch.inference_mode(False)
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
        auto: the class of transformers that builds the model: an auto class (``AutoModelForCausalLM``), or its own.
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
    file = open_packed(folder)
    if not (Path(folder) / "config.json").is_file():
        raise ValueError(
            f"{folder} holds {PACKED_FILE} but no config.json, so which model to build is not known: build it and fill "
            "it with prox24_lightning.convert.load_packed"
        )
    config = AutoConfig.from_pretrained(str(folder))
    stored = _most_common_dtype(file)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # what is loaded here are plain tensors
    model = _build(auto, config, dtype or stored)
    load_packed(model, file, device=device, sparse=sparse)
    if dtype is not None:
        cast_model(model, dtype)
    if (Path(folder) / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(str(folder))
    return model.eval()


def _build(auto: Any, config: Any, dtype: torch.dtype) -> Any:
    """Build the model with weights on the meta device. Buffers that it computes, such as tables of positions, are as
    from_pretrained makes them: computed in float32, then cast to the model's dtype."""
    make = auto.from_config if hasattr(auto, "from_config") else auto._from_config
    with EmptyOnMeta():
        precise = dict(make(deepcopy(config), dtype=torch.float32).named_buffers())
        model = make(config, dtype=dtype)
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
    max_shard_bytes: int | None = None,
    weights: RoundedForm | None = None,
    input_scales: Mapping[str, float] | None = None,
    keep_16bit: Sequence[str] = (),
) -> PackedModel:
    """Write a packed model, with a card and, for a Hugging Face model, its configs.

    Args:
        folder: made if it does not exist; a failure leaves none of the new files in it. One that holds dense weights
            is refused.
        model: its weights do not change.
        packable: the decisions of :func:`~prox24_lightning.convert.packed_model.find_packable`.
        source: one line on the model's origin.
        companions: tokenizer and the like; anything with ``save_pretrained``.
        max_shard_bytes: dense bytes of one file; None writes one file.
        weights: round the packed weights to 8 bits with a scale a row; None stores them as they are. A weight that has
            8 bits already stays as it is.
        input_scales: fixed scales of the inputs of rounded layers, by layer
            (:func:`~prox24_lightning.convert.input_scales.measure_input_scales`); None gives each token its own.
        keep_16bit: names of layers, or patterns, that are not rounded; layers that servers run as one have one form.

    Returns:
        the written files, open.

    Raises:
        ValueError: for a weight that is not 2:4, holds NaN or cannot be rounded, by name; for a folder with dense
            weights; for a pattern that matches no layer.
        RuntimeError: if the file, read back, differs from the model.
    """
    forget_quantization(model)
    state = {clean_name(name): tensor for name, tensor in model.state_dict().items()}
    info = {"source": source, "model": _kind(model), "dense": packable.dense}
    forms: dict[str, RoundedForm] = {}
    if weights is not None:
        kept = layers_of_16_bits([name.removesuffix(".weight") for name in packable.dims], keep_16bit)
        forms = {
            name: weights
            for name in packable.dims
            if state[name].itemsize > 1 and name.removesuffix(".weight") not in kept
        }
    fixed = {f"{name}.weight": scale for name, scale in (input_scales or {}).items() if f"{name}.weight" in forms}
    return write_folder(folder, model, state, packable.dims, info, companions, max_shard_bytes, forms, fixed)


def write_folder(
    folder: str | Path,
    model: nn.Module,
    state: Mapping[str, Tensor],
    dims: Mapping[str, int],
    info: Mapping[str, Any],
    companions: Sequence[Any] = (),
    max_shard_bytes: int | None = None,
    forms: Mapping[str, RoundedForm] | None = None,
    input_scales: Mapping[str, float] | None = None,
) -> PackedModel:
    """Write the files of a packed folder.

    Args:
        folder: see :func:`save_folder`.
        model: whose configs are written.
        state: its dense state dict.
        dims: the weights to pack, and the dimension along which the groups of each lie.
        info: ``source``, ``model`` (the class) and ``dense`` (name -> reason); the header and the card hold it.
        companions, max_shard_bytes: see :func:`save_folder`.
        forms: the packed weights that are rounded to 8 bits; all to the same form.
        input_scales: fixed scales of their inputs, by weight.

    Raises:
        ValueError, RuntimeError: as :func:`save_folder`.
    """
    folder = Path(folder)
    refuse_dense(folder)
    if len(kinds := sorted(set((forms or {}).values()))) > 1:
        raise ValueError(f"the weights are to be rounded to {' and '.join(kinds)}: a folder holds one rounded form")
    with filling(folder, instead_of=PACKED_FILES) as temporary:
        written = write_packed_files(temporary, state, dims, info, max_shard_bytes, forms, input_scales)
        for name, entry in written.packed.items():
            expected = entry.rounded(state[name], name)
            if not torch.equal(written.read(name, state[name].device), expected):
                if expected.float().isnan().any():
                    raise ValueError(
                        f"{name} holds NaN, so the model is damaged: mend it, or store this weight dense: skip={name!r}"
                    )
                raise RuntimeError(f"{name} read back from {written.path} differs from the model's")
        if getattr(model, "_auto_class", None) is not None:  # its class lies in files beside the weights
            from transformers.dynamic_module_utils import custom_object_save

            custom_object_save(model, str(temporary), config=model.config)  # type: ignore[arg-type]
        for part in (getattr(model, "config", None), getattr(model, "generation_config", None), *companions):
            if hasattr(part, "save_pretrained"):
                part.save_pretrained(str(temporary))
        config = temporary / "config.json"
        if config.is_file():
            _name_loader(config, written, str(info["model"]))
        write_text(temporary / "README.md", _card(written, hugging_face=config.is_file()))
    return open_packed(folder)


def _name_loader(config: Path, written: PackedModel, model: str) -> None:
    """Say in ``config.json`` what loads the weights, and what transformers' own ``save_pretrained`` says."""
    content = json.loads(config.read_text(encoding="utf-8"))
    content["quantization_config"] = {
        "quant_method": QUANT_METHOD,
        "version": version_of(written.packed.values()),
        "weights_file": written.path.name,
        "modules_to_not_convert": sorted(name.rpartition(".")[0] for name in written.info["dense"]),
    }
    if columns := sorted(name for name, entry in written.packed.items() if entry.dim != 1):
        content["quantization_config"]["packed_along_outputs"] = columns
    rounded = {name: entry.form for name, entry in written.packed.items() if entry.form is not None}
    if rounded:
        content["quantization_config"]["weights"] = next(iter(rounded.values()))
        if others := sorted(name.rpartition(".")[0] for name in set(written.packed) - set(rounded)):
            content["quantization_config"]["modules_not_rounded"] = others
        fixed = {name: entry.input_scale for name, entry in written.packed.items() if entry.input_scale is not None}
        if fixed:
            scales = {name.rpartition(".")[0]: scale for name, scale in sorted(fixed.items())}
            content["quantization_config"]["input_scales"] = scales
    content["architectures"] = [model]
    content["dtype"] = str(_most_common_dtype(written)).removeprefix("torch.")
    for part in content.values():  # of a model of several: transformers names it there as well, once it has loaded it
        if isinstance(part, dict) and "model_type" in part and part.get("dtype") is None:
            part["dtype"] = content["dtype"]
    write_text(config, json.dumps(content, indent=2, sort_keys=True) + "\n")


def _most_common_dtype(file: PackedModel) -> torch.dtype:
    dtypes = [file.dtype(name) for name in file.names if file.dtype(name).is_floating_point]
    if not dtypes:
        raise ValueError(f"{file.path} holds no floating-point tensor, so it is not a model")
    return max(sorted(set(dtypes), key=str), key=dtypes.count)


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


def _how_to_load(model: str, *, hugging_face: bool) -> str:
    if hugging_face:
        return (
            "In this folder:\n\n```python\nimport transformers\n\nimport prox24_lightning\n\n"
            "prox24_lightning.register_with_transformers()\n"
            f'model = transformers.{model}.from_pretrained(".", device_map="auto")\n```\n\n'
            "The auto classes of transformers load it as well. On a GPU with sparse tensor cores its 2:4 layers run on "
            "them; on a CPU they are expanded, exactly. `prox24 convert THIS_FOLDER OUT --form dense` writes an "
            "ordinary model, which needs nothing of this package."
        )
    return (
        "In this folder, with a model of the same structure:\n\n```python\n"
        "from prox24_lightning.convert import load_packed, open_packed\n\n"
        'load_packed(model, open_packed("."))\n```\n\n'
        "It is dense then, exactly, in the dtype of the file; on a GPU `sparse=True` makes sparse layers. "
        f"`prox24 convert THIS_FOLDER/{PACKED_FILE} OUT --form dense` writes an ordinary `model.safetensors`."
    )


def _rounding(entries: Iterable[PackedEntry]) -> str:
    """Say in the card how many weights are rounded, and how."""
    forms = [entry.form for entry in entries if entry.form is not None]
    if not forms:
        return ""
    return (
        f". {len(forms)} of them {'is' if len(forms) == 1 else 'are'} rounded to {forms[0]} (up to "
        f"{LARGEST[forms[0]]:.0f}) with a float32 scale for each row (`NAME.scales`); a weight is value times scale"
    )


def _card(file: PackedModel, *, hugging_face: bool) -> str:
    info = file.info
    lines = [
        "---",
        *(["library_name: transformers"] if hugging_face else []),
        "tags: [sparse, '2:4', packed]",
        "---",
        "",
        f"# {info['model']}, 2:4 sparse, packed",
        "",
        f"From {info['source']}. `{file.path.name}` holds {counted(len(file.packed), 'weight')} as two values and two "
        "2-bit positions for every four entries (tensors `NAME.values` and `NAME.indices`), the others as they are"
        f"{_rounding(file.packed.values())}: "
        f"{file.stored_bytes:,} bytes instead of {file.dense_bytes:,} ({file.stored_bytes / file.dense_bytes:.4f}).",
        "",
        _how_to_load(info["model"], hugging_face=hugging_face),
        "",
        *([markdown_table(("stored dense", "why"), info["dense"].items()), ""] if info["dense"] else []),
    ]
    return "\n".join(lines)
