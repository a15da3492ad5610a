"""Undo a conversion that has failed half-way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def restored_on_error(module: nn.Module) -> Iterator[None]:
    """Put the submodules and tensors of ``module`` back if the block raises.

    The tensors of before stay in memory until the block ends: on the CPU, where Lightning puts the model after a fit.
    """
    children = [(parent, dict(parent._modules)) for parent in module.modules()]
    parameters = list(module.parameters())
    gradients = [parameter.grad for parameter in parameters]
    buffers = [(owner, dict(owner._buffers)) for owner in module.modules()]
    tensors = [*parameters, *module.buffers(), *(gradient for gradient in gradients if gradient is not None)]
    contents = [tensor.data for tensor in tensors]
    try:
        yield
    except BaseException:
        for parent, before in children:
            parent._modules.update(before)
        for owner, before_buffers in buffers:
            owner._buffers.update(before_buffers)
        for parameter in parameters:
            parameter.grad = None
        for tensor, data in zip(tensors, contents, strict=True):
            tensor.data = data
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        raise
