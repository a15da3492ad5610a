"""MODEL on the command line: a Hugging Face name or folder, a packed folder or file, a checkpoint, or a config."""

from __future__ import annotations

from argparse import ArgumentError
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from shutil import copyfile
from typing import Any

import torch
from torch import Tensor, nn

from prox24_lightning.convert.format.header import FORMAT
from prox24_lightning.convert.format.reader import PackedFile
from prox24_lightning.convert.format.shards import open_packed
from prox24_lightning.convert.state_dict_model import layers_of
from prox24_lightning.io.packed_folder import PACKED_ENDING, is_packed_module
from prox24_lightning.io.pretrained import Dtype, Head, Pretrained
from prox24_lightning.utils.errors import first_reason, yaml_problem
from prox24_lightning.utils.files import load_state_dict
from prox24_lightning.utils.module_copy import cast_model

_CHECKPOINTS = (".ckpt", ".pt", ".pth", ".bin", ".safetensors")
_CONFIGS = (".yaml", ".yml")


@dataclass(frozen=True)
class Source:
    """A loaded model and its origin.

    Attributes:
        model: in eval mode, on the CPU.
        companions: objects saved along with it (``save_pretrained``): tokenizer, files of an image processor.
        tokenizer: of a language model; None without one.
        description: one line.
        callable: False for a list of layers from a bare state dict, which has no forward.
        pretrained: how Hugging Face has loaded it; None for other files.
    """

    model: nn.Module
    companions: tuple[Any, ...]
    description: str
    callable: bool = True
    pretrained: Pretrained | None = None
    tokenizer: Any = None


def load_source(
    name: str,
    *,
    package: bool = False,
    file: str | None = None,
    head: Head = "auto",
    dtype: Dtype = "auto",
    revision: str | None = None,
    download: bool = False,
    config: Path | None = None,
) -> Source:
    """Load the model that ``name`` stands for.

    - ``x.ckpt`` (or .pt, .pth, .bin, .safetensors): a Lightning checkpoint or a state dict; likewise a folder of packed
      weights without a ``config.json``. With ``config``, the
      config of its run (LightningCLI saves it beside the ``checkpoints`` folder), the module itself; without, its
      weights as a list of layers.
    - ``x.yaml``: the module that a config describes, as it is before training.
    - anything else: :class:`~prox24_lightning.io.pretrained.Pretrained`, a packed folder included.

    Raises:
        FileNotFoundError: for a file that does not exist.
        ValueError: for a file that holds no model, or more than plain data.
    """
    path = Path(name)
    if path.suffix in _CONFIGS:
        module = _from_config(path)
        return Source(_cast(module, dtype).eval(), (), f"{name}, untrained")
    if (path.suffix in _CHECKPOINTS or is_packed_module(path)) and not package:
        state = _state_of(path)
        if config is None:
            return Source(_cast(layers_of(state), dtype).eval(), (), f"weights of {name}{_hint(path)}", callable=False)
        module = _from_config(config)
        try:
            module.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(f"{name} does not fit the model of {config}: {error}") from error
        return Source(_cast(module, dtype).eval(), (), f"{name} with {config}")
    pretrained = Pretrained(name, package, file, head, dtype, revision, download)
    model = pretrained.model()
    try:
        tokenizer = pretrained.tokenizer()
    except (OSError, ValueError):  # a model without text, or a folder of weights alone
        tokenizer = None
    companions = (*([] if tokenizer is None else [tokenizer]), ProcessorFiles(pretrained.folder()))
    return Source(model, companions, pretrained.describe(), pretrained=pretrained, tokenizer=tokenizer)


@dataclass(frozen=True)
class ProcessorFiles:
    """Settings of the image, sound or joint processor in a model's folder, kept byte for byte; made from no library."""

    folder: Path

    def save_pretrained(self, save_directory: str) -> None:
        """Copy those files that are there."""
        for name in ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"):
            if (self.folder / name).is_file() and not (Path(save_directory) / name).exists():
                copyfile(self.folder / name, Path(save_directory) / name)


def _cast(model: nn.Module, dtype: Dtype) -> nn.Module:
    return model if dtype == "auto" else cast_model(model, getattr(torch, dtype))


def _hint(checkpoint: Path) -> str:
    """Name a config beside the checkpoint: it runs classes, so only the user may ask for it."""
    places = (checkpoint.parent / "config.yaml", checkpoint.parent.parent / "config.yaml")
    found = next((place for place in places if place.is_file()), None)
    return "" if found is None else f" (for the model itself: --run_config {found})"


def _state_of(path: Path) -> Mapping[str, Tensor]:
    if path.is_dir():
        return open_packed(path).state_dict()
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    if path.suffix == PACKED_ENDING:
        from safetensors import SafetensorError, safe_open
        from safetensors.torch import load_file

        try:
            with safe_open(str(path), framework="pt") as file:
                packed = (file.metadata() or {}).get("format") == FORMAT
            return PackedFile(path).state_dict() if packed else load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or no safetensors file: {error}") from error
    return {key: value for key, value in load_state_dict(path).items() if isinstance(value, Tensor)}


def _from_config(path: Path) -> nn.Module:
    """Return the LightningModule of a config for ``prox24 fit``; trainer and data are not made."""
    import yaml
    from jsonargparse import ArgumentParser
    from lightning.pytorch import LightningModule

    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: {yaml_problem(str(error))}") from error
    if not isinstance(found, Mapping) or "model" not in found:
        raise ValueError(f"{path} has no entry 'model': it is not a config of prox24 fit")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningModule, "model", required=True)
    try:
        parsed = parser.parse_object({"model": found["model"]})
    except ArgumentError as error:
        raise ValueError(f"the entry 'model' of {path} makes no module: {first_reason(str(error))}") from error
    module = parser.instantiate_classes(parsed).model
    module.configure_model()
    return module
