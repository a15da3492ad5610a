"""Check which nodes of an ONNX graph have weights that TensorRT accepts as 2:4 sparse.

TensorRT reads dense weights with zeros and decides itself. Its rule: for every output channel, and every kernel
position of a convolution, each four consecutive input channels hold at most two non-zeros, and their number divides
by four. A pruned model exported as it is (``torch.onnx.export(model, inputs, path)``) keeps its zeros; this check
confirms it. Needs the ``onnx`` package (``pip install prox24_lightning[onnx]``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from prox24_lightning.mask import violations_24

_WEIGHTED = ("Conv", "Gemm", "MatMul")


@dataclass(frozen=True)
class OnnxNode:
    """A node that multiplies by a weight.

    Attributes:
        name, kind: of the node (``"Conv"``, ``"Gemm"``, ``"MatMul"``).
        weight: name of the weight in the graph.
        shape: of the weight as stored; ``dim`` is the dimension of its input channels.
        problem: why TensorRT runs it dense; empty if it meets the rule.
    """

    name: str
    kind: str
    weight: str
    shape: tuple[int, ...]
    dim: int
    problem: str

    @property
    def is_24(self) -> bool:
        """Whether the node meets the rule."""
        return not self.problem


def check_onnx(model: str | Path | Any) -> list[OnnxNode]:
    """Check every node of a graph that multiplies by a stored weight, in the graph's order.

    Args:
        model: path of an ``.onnx`` file (weights stored beside it are found), or an ``onnx.ModelProto``.

    Raises:
        ImportError: without the ``onnx`` package.
    """
    try:
        import onnx
    except ImportError as error:
        raise ImportError("check_onnx needs the onnx package: pip install prox24_lightning[onnx]") from error
    graph = (onnx.load(str(model)) if isinstance(model, (str, Path)) else model).graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    found = []
    for node in graph.node:
        if node.op_type in _WEIGHTED and len(node.input) > 1 and node.input[1] in stored:
            values = onnx.numpy_helper.to_array(stored[node.input[1]])
            attributes = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
            weight, dim = torch.from_numpy(values.astype("float32")), _channels(node.op_type, values.ndim, attributes)
            found.append(
                OnnxNode(node.name, node.op_type, node.input[1], tuple(weight.shape), dim, sparse_problem(weight, dim))
            )
    return found


def _channels(kind: str, dimensions: int, attributes: Mapping[str, Any]) -> int:
    """Return the dimension of the input channels: 1 of (out, in, ...), the last but one of (..., in, out)."""
    if kind == "Conv" or (kind == "Gemm" and attributes.get("transB", 0)):
        return 1
    return max(dimensions - 2, 0)


def sparse_problem(weight: torch.Tensor, dim: int) -> str:
    """Return why TensorRT runs a weight with input channels along ``dim`` dense; empty if it meets the rule."""
    if weight.shape[dim] % 4:
        return f"{weight.shape[dim]} input channels do not divide by 4"
    broken = violations_24(weight, dim=dim, limit=3)
    return str(broken) if broken else ""
