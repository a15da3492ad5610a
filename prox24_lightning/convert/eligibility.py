"""Decide which layers of a model can run as semi-structured 2:4 layers, and why each of the others cannot.

No GPU is needed: the answer follows from the layers and a description of the GPU (:class:`Target`), or none. The check
of the weights is strict because libraries are not: they pack a group with three non-zeros without an error, and lose
one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from prox24_lightning.convert.onnx_check import sparse_problem
from prox24_lightning.mask import is_24, violations_24
from prox24_lightning.weights.chunks import row_chunks
from prox24_lightning.weights.experts import expert_parameters
from prox24_lightning.weights.layer_matrix import is_transposed_linear
from prox24_lightning.weights.names import clean_name

Backend = Literal["cusparselt", "cutlass"]
State = Literal["sparse", "fits", "dense"]
Role = Literal["linear", "convolution", "other"]

SHAPE_MULTIPLES: dict[Backend, tuple[int, int]] = {"cusparselt": (16, 16), "cutlass": (32, 64)}
"""(out_features, in_features) must be multiples of these in 16 bits; a test compares them with torch's."""

DTYPES = (torch.float16, torch.bfloat16)

PLAIN_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CONVOLUTIONS = (nn.modules.conv._ConvNd,)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


@dataclass(frozen=True)
class Target:
    """The GPU that converted layers would run on, and the library that would run them; None if neither can."""

    name: str
    capability: tuple[int, int]
    backend: Backend | None

    @property
    def problem(self) -> str | None:
        """Why no layer at all runs sparse on this GPU; None if layers can."""
        version = f"{self.capability[0]}.{self.capability[1]}"
        if self.capability < (8, 0):
            return f"{self.name} has compute capability {version}: sparse tensor cores need 8.0 or newer"
        if self.backend is None:
            return f"torch was built without cuSPARSELt, and its CUTLASS kernels refuse compute capability {version}"
        return None


def find_target(device: torch.device | int | None = None) -> Target | None:
    """Describe the CUDA GPU ``device`` (default: the current one); None where there is none."""
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return None
    capability = torch.cuda.get_device_capability(device)
    backend: Backend | None = None
    # is_available() is about the library that torch was built with, not about the GPU: hence `problem` above.
    if torch.backends.cusparselt.is_available():
        backend = "cusparselt"
    elif capability[0] == 8:
        backend = "cutlass"
    return Target(torch.cuda.get_device_name(device), capability, backend)


@dataclass(frozen=True)
class LayerVerdict:
    """The decision on one layer.

    Attributes:
        name: the module's name, without ``torch.compile``'s prefix.
        kind: its class.
        shape: (out_features, in_features), or the shape of its weight where it is not a linear layer.
        bias: whether it has one.
        reasons: why the layer cannot run sparse on any GPU of this kind; empty if it can.
        machine: why this machine cannot run it; None if it can.
        note: what conversion changes besides the weight, or what is possible elsewhere.
        role: "linear" (its weight is multiplied with every token), "convolution", "other" (looked up, recurrent, ...).
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    bias: bool
    reasons: tuple[str, ...]
    machine: str | None
    note: str = ""
    role: Role = "linear"

    @property
    def fits(self) -> bool:
        """Whether the layer runs sparse on a suitable GPU."""
        return not self.reasons

    @property
    def runs(self) -> bool:
        """Whether the layer runs sparse here."""
        return self.fits and self.machine is None

    @property
    def why(self) -> str:
        """Why the layer stays dense, in one line; "" if it does not."""
        return "; ".join(self.reasons) or self.machine or ""


def check_model(
    model: nn.Module,
    *,
    dtype: torch.dtype | None = torch.bfloat16,
    target: Target | None = None,
    values: bool = True,
) -> tuple[LayerVerdict, ...]:
    """Check every module of ``model`` that has a weight of two or more dimensions.

    Args:
        model: any module, on any device.
        dtype: what the weights are cast to before they are packed; None: each keeps its own dtype.
        target: from :func:`find_target`. None: no GPU; cuSPARSELt's rules apply.
        values: False takes every weight for 2:4 without reading it; weights may then be on the meta device.
    """
    owners: dict[int, list[str]] = {}
    for name, module in named_layers(model):
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    parents = {id(child): parent for parent in model.modules() for child in parent.children()}
    verdicts = []
    for name, module in named_layers(model):
        if any(is_lazy(parameter) or parameter.dim() >= 2 for parameter in module.parameters(recurse=False)):
            weight = getattr(module, "weight", None)
            shared = [other for other in owners.get(id(weight), []) if other != name]
            verdicts.append(
                check_layer(
                    module,
                    name=name,
                    dtype=dtype,
                    target=target,
                    parent=parents.get(id(module)),
                    tied=shared,
                    values=values,
                )
            )
    return tuple(verdicts)


def check_layer(
    module: nn.Module,
    *,
    name: str = "layer",
    dtype: torch.dtype | None = None,
    target: Target | None = None,
    parent: nn.Module | None = None,
    tied: list[str] | None = None,
    values: bool = True,
) -> LayerVerdict:
    """Check one layer; ``dtype`` None takes the weight's own. See :func:`check_model`."""
    reasons: list[str] = []
    weight = getattr(module, "weight", None)
    structure = why_not_linear(module, parent)
    if structure is not None:
        reasons.append(structure)
    elif tied:
        reasons.append(f"tied: shares its weight with {', '.join(tied)}")
    if not isinstance(weight, Tensor):
        first = next(module.parameters(recurse=False))
        return LayerVerdict(
            name, type(module).__name__, tuple(first.shape), False, tuple(reasons), _machine(target), role=_role(module)
        )
    bias = getattr(module, "bias", None) is not None
    shape = () if is_lazy(weight) else tuple(weight.shape)
    transposed = is_transposed_linear(module)
    if transposed:
        shape = shape[::-1]
    if structure is None:
        if is_lazy(weight) or (weight.is_meta and values):
            reasons.append("the weight has no values yet (lazy or meta)")
        elif weight.dim() != 2 or hasattr(weight, "placements"):
            reasons.append(f"the weight is sharded over ranks ({type(weight).__name__} of {weight.dim()} dimensions)")
        else:
            reasons += _rules(shape, weight.dtype if dtype is None else dtype, target)
            reasons += _values(weight, 0 if transposed else 1) if values else ()
    note = "stored transposed: converted as nn.Linear(weight.t())" if transposed else ""
    if isinstance(module, PLAIN_CONVOLUTIONS) and not is_lazy(weight) and not weight.is_meta:
        problem = sparse_problem(weight, 1)
        note = f"not for TensorRT either: {problem}" if problem else "TensorRT may use its zeros: see check_onnx"
    return LayerVerdict(name, type(module).__name__, shape, bias, tuple(reasons), _machine(target), note, _role(module))


def named_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield ``model.named_modules()`` with clean names; of a compiled module and its original only the original."""
    for name, module in model.named_modules():
        if not hasattr(module, "_orig_mod"):
            yield clean_name(name), module


def _role(module: nn.Module) -> Role:
    if isinstance(module, _CONVOLUTIONS):
        return "convolution"
    matrices = isinstance(module, (nn.Linear, nn.MultiheadAttention)) or is_transposed_linear(module)
    return "linear" if matrices else "other"


def _machine(target: Target | None) -> str | None:
    return "no CUDA GPU in use" if target is None else target.problem


def why_not_linear(module: nn.Module, parent: nn.Module | None) -> str | None:
    """Return why the module is not a linear layer that can be converted, whatever its weight; None if it is.

    Args:
        module: the layer.
        parent: the module that holds it, which may read its weight without calling it.
    """
    if isinstance(module, _CONVOLUTIONS):
        return "no sparse convolution kernel in torch: stays dense with zeros"
    if isinstance(module, _EMBEDDINGS):
        return "embedding: looked up, not multiplied"
    if isinstance(module, nn.MultiheadAttention):
        return "nn.MultiheadAttention packs its projections into one weight and multiplies them itself"
    if isinstance(module, nn.RNNBase):
        return "recurrent layers have no sparse kernel"
    if is_parametrized(module):
        return "parametrized: the stored tensor is not the weight that is used"
    if is_transposed_linear(module):
        return None
    if expert_parameters(module):
        return (
            "experts in one 3-D parameter: no sparse kernel for their grouped products; a packed file holds them packed"
        )
    if not isinstance(module, nn.Linear):
        return f"{type(module).__name__} is not a linear layer"
    if hasattr(parent, "_orig_mod"):
        return "compiled by itself: torch.compile the model after its conversion"
    if isinstance(parent, nn.MultiheadAttention):
        return "nn.MultiheadAttention reads this weight itself instead of calling the layer"
    if isinstance(parent, nn.TransformerEncoderLayer):
        return "the inference path of nn.TransformerEncoderLayer reads this weight itself instead of calling the layer"
    if getattr(module.forward, "__func__", None) is not nn.Linear.forward:
        return f"{type(module).__name__} has a forward of its own"
    return None


def _rules(shape: tuple[int, ...], dtype: torch.dtype, target: Target | None) -> Iterator[str]:
    if dtype not in DTYPES:
        yield f"{str(dtype).removeprefix('torch.')}: the sparse kernels take float16 and bfloat16"
    backend: Backend = target.backend if target is not None and target.backend is not None else "cusparselt"
    rows, columns = SHAPE_MULTIPLES[backend]
    if shape[0] % rows or shape[1] % columns or 0 in shape:
        yield f"{backend} needs (out_features, in_features) to be multiples of ({rows}, {columns}), this is {shape}"


def _values(weight: Tensor, dim: int) -> Iterator[str]:
    """Yield what is wrong with the values; ``dim`` is the input dimension of the weight as it is stored."""
    if weight.is_floating_point() and weight.itemsize == 1:
        weight = weight.float()  # torch has few operations on 8 bits
    matrix = weight.detach() if dim == 1 else weight.detach().t()
    if not all(bool(torch.isfinite(matrix[rows]).all()) for rows in row_chunks(*matrix.shape)):
        yield "the weight holds NaN or inf"
    elif weight.shape[dim] % 4 == 0 and not is_24(weight, dim=dim):
        broken = violations_24(weight, dim=dim, limit=3)
        mostly = broken.count > broken.groups // 2  # a dense weight: its values say nothing
        yield f"not 2:4: {broken.in_short() if mostly else broken}"
        if weight.shape[1 - dim] % 4 == 0 and is_24(weight, dim=1 - dim):
            yield "2:4 along the output dimension (column geometry): the kernels take groups along the input dimension"
