"""Experts of a mixture whose weights are one 3-D parameter: (experts, out, in), or (experts, in, out).

transformers 5 keeps the experts of every mixture so (``experts.gate_up_proj``, ``experts.down_proj``). Each expert's
matrix is pruned by itself, with groups of four along the inputs of its own matrix.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

_COUNTS = ("num_experts", "n_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "n_shared_experts")
_HIDDEN = ("hidden_dim", "hidden_size", "d_model", "embed_dim", "input_size", "in_features")
_INNER = ("intermediate_dim", "intermediate_size", "expert_dim", "ffn_dim", "ffn_hidden_size", "output_size")
_UP = ("gate_up", "up", "gate", "w1", "w3", "fc1", "wi", "input")
"""How the names of parameters begin that multiply an expert's input; others (``down_proj``, ``w2``) multiply theirs."""


def is_expert_parameter(module: nn.Module, parameter: Tensor) -> bool:
    """Whether a parameter of ``module`` holds one matrix for each of several experts."""
    if is_lazy(parameter) or parameter.dim() != 3 or isinstance(module, (nn.Conv1d, nn.ConvTranspose1d)):
        return False
    counts = _numbers(module, _COUNTS)
    named = any(word in type(module).__name__.lower() for word in ("expert", "moe", "mixture"))
    return parameter.shape[0] in counts or named


def expert_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of ``module`` itself that hold one matrix for each of several experts."""
    return [parameter for parameter in module.parameters(recurse=False) if is_expert_parameter(module, parameter)]


def expert_input_dim(module: nn.Module, parameter_name: str) -> int | None:
    """Return the dimension, 1 or 2, along which the inputs of each expert's matrix lie; None if nothing tells.

    Modules of transformers have an attribute for it, ``is_transposed``. Else the shapes of a gated pair decide:
    ``down`` has as many outputs as ``gate_up`` has inputs, and half as many inputs as that has outputs. Else the sizes
    that are the module's attributes.
    """
    transposed = getattr(module, "is_transposed", None)
    if isinstance(transposed, bool):
        return 1 if transposed else 2
    shape = module.get_parameter(parameter_name).shape
    others = [
        parameter.shape
        for name, parameter in module.named_parameters(recurse=False)
        if name != parameter_name and parameter.dim() == 3
    ]
    for other in others:
        for first, second in ((shape, other), (other, shape)):
            if first[1] == 2 * second[2] and first[2] == second[1]:
                return 2
            if first[2] == 2 * second[1] and first[1] == second[2]:
                return 1
    hidden, inner = _numbers(module, _HIDDEN), _numbers(module, _INNER)
    inputs, outputs = (hidden, inner) if parameter_name.lower().startswith(_UP) or not others else (inner, hidden)
    fits = {dim for dim in (1, 2) if shape[dim] in inputs and shape[3 - dim] in outputs}
    if len(fits) == 2 and parameter_name == "weight":
        return 2  # square, and laid out as a linear layer's
    return fits.pop() if len(fits) == 1 else None


def _numbers(module: nn.Module, names: Iterable[str]) -> set[int]:
    values = [getattr(module, name, None) for name in names]
    return {value for value in values if isinstance(value, int)}


def expert_matrices(parameter: Tensor, input_dim: int) -> Tensor:
    """Return a 3-D parameter, or a tensor of its shape, as (experts, out, in) in float32; float64 stays."""
    return parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32)).movedim(input_dim, -1)


def from_expert_matrices(matrices: Tensor, input_dim: int) -> Tensor:
    """Undo :func:`expert_matrices`, with a contiguous result in the dtype of ``matrices``."""
    return matrices.movedim(-1, input_dim).contiguous()
