"""Which parameters can be cut into groups of four, along which dimension, and why the others cannot."""

from __future__ import annotations

from torch import Tensor, nn

from prox24_lightning.weights.experts import expert_input_dim, is_expert_parameter
from prox24_lightning.weights.groups import Dim, Geometry
from prox24_lightning.weights.layer_matrix import is_transposed_linear
from prox24_lightning.weights.used_weight import why_recomputed

UNKNOWN_KIND = "is neither a linear layer nor a convolution"
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED_CONVOLUTIONS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def fit_groups(module: nn.Module, parameter_name: str, parameter: Tensor, geometry: Geometry) -> tuple[str | None, Dim]:
    """Return why ``parameter`` cannot be made 2:4 (None if it can), and the dimension along which its groups lie."""
    if (reason := why_recomputed(module, parameter_name)) is not None:
        return reason, 0
    if parameter.is_complex():
        return "complex numbers: masks and kernels are for real weights", 0
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return "embedding: looked up, not multiplied", 0
    if isinstance(module, nn.RNNBase):
        return "recurrent layers have no sparse kernel", 0
    if isinstance(module, _TRANSPOSED_CONVOLUTIONS):
        return "transposed convolutions have no sparse kernel", 0
    inputs, outputs = (0, 1) if is_transposed_linear(module) else (1, 0)
    if is_expert_parameter(module, parameter):
        found = expert_input_dim(module, parameter_name)
        if found is None:
            return f"experts of {type(module).__name__}: nothing tells which side of {parameter_name} is its input", 0
        inputs, outputs = found, 3 - found
    elif isinstance(module, nn.MultiheadAttention):
        if parameter_name not in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
            return "not a projection weight", 0
    elif parameter_name != "weight" or not (
        isinstance(module, (nn.Linear, *_CONVOLUTIONS)) or is_transposed_linear(module)
    ):
        return f"{type(module).__name__} {UNKNOWN_KIND}", 0
    if isinstance(module, _CONVOLUTIONS) and parameter.shape[1] == 1:
        kind = "convolution" if module.groups == 1 else "depthwise convolution"
        return f"{kind} with one input channel a filter: no four to choose from", 0
    sides = {"input": inputs, "output": outputs}
    taken = {"row": ["input"], "column": ["output"], "block": ["output", "input"]}[geometry]
    dims = [sides[side] for side in taken]
    dim: Dim = (dims[0], dims[1]) if geometry == "block" else dims[0]
    for side in taken:
        if parameter.shape[sides[side]] % 4:
            return f"{side} size {parameter.shape[sides[side]]} does not divide by 4", dim
    if "output" in taken and isinstance(module, _CONVOLUTIONS) and parameter.shape[0] // module.groups % 4:
        return f"grouped convolution: {parameter.shape[0] // module.groups} outputs a group do not divide by 4", dim
    return None, dim
