"""The dtype that ``prox24 bench`` and ``prox24 doctor`` give a model's layers."""

from __future__ import annotations

from collections import Counter
from typing import Literal

import torch
from torch import nn

from prox24_lightning.convert.eligibility import DTYPES

LayerDtype = Literal["auto", "bfloat16", "float16"]


def layer_dtype(model: nn.Module, dtype: LayerDtype) -> torch.dtype:
    """Return the dtype in which the layers of ``model`` run: the one named or, for "auto", the model's own 16 bits.

    A model in another dtype runs in bfloat16.
    """
    if dtype != "auto":
        return torch.bfloat16 if dtype == "bfloat16" else torch.float16
    sizes: Counter[torch.dtype] = Counter()
    for parameter in model.parameters():
        sizes[parameter.dtype] += parameter.numel()
    own = max(sizes, key=lambda kind: sizes[kind], default=torch.bfloat16)
    return own if own in DTYPES else torch.bfloat16
