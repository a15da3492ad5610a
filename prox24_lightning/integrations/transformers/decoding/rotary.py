"""The rotary embedding while a token is decoded: one launch for queries and keys where that gives the same bits."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)

Rotary = Callable[..., tuple[Tensor, Tensor]]

_HALVES = (torch.bfloat16, torch.float16)


def in_one_launch(function: Rotary, otherwise: Rotary) -> Rotary:
    """Return a function that rotates queries and keys with our kernel, if that gives what ``function`` does.

    Args:
        function: a model's ``apply_rotary_pos_emb(query, key, cosine, sine)``. It is called once for each form of its
            arguments, to compare: models have rotary embeddings of several kinds.
        otherwise: does the same, for arguments that the kernel does not take.
    """
    same: dict[Any, bool] = {}

    def rotate(query: Tensor, key: Tensor, cosine: Tensor, sine: Tensor, *args: Any, **kwargs: Any) -> Any:
        given = query, key, cosine, sine
        if args or kwargs or not _takes(*given):
            return otherwise(*given, *args, **kwargs)
        form = tuple((tensor.shape, tensor.stride()) for tensor in given), query.dtype, query.device
        if form not in same and not torch.cuda.is_current_stream_capturing():
            same[form] = _agrees(function, *given)
        if not same.get(form, False):
            return otherwise(*given)
        from prox24_lightning.integrations.transformers.decoding import rotary_kernel

        return rotary_kernel.rotate(*given)

    return rotate


def _takes(query: Tensor, key: Tensor, cosine: Tensor, sine: Tensor) -> bool:
    """Whether the kernel is made for tensors like these."""
    tensors = query, key, cosine, sine
    if not query.is_cuda or query.dtype not in _HALVES or any(t.dtype != query.dtype for t in tensors):
        return False
    batch, features = query.shape[0], query.shape[-1]
    if features % 2 or any(tensor.stride(-1) != 1 or tensor.shape[-1] != features for tensor in tensors):
        return False
    single = all(tensor.dim() == 4 and tensor.shape[0] == batch and tensor.shape[2] == 1 for tensor in (query, key))
    return single and all(tensor.shape == (batch, 1, features) for tensor in (cosine, sine))


def _agrees(function: Rotary, *given: Tensor) -> bool:
    try:
        from prox24_lightning.integrations.transformers.decoding import rotary_kernel

        found = rotary_kernel.rotate(*given)
    except Exception as error:  # of Triton's compiler, which is not installed everywhere
        log.info("queries and keys are rotated by compiled code: %s", error)
        return False
    return all(torch.equal(one, other) for one, other in zip(found, function(*given), strict=True))
