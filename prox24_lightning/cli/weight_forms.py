"""``--weights`` of the commands: a dtype to load a model in, or a form of 8 bits for the packed weights."""

from __future__ import annotations

from typing import Literal

from prox24_lightning.io.pretrained import Dtype
from prox24_lightning.weights.rounding import RoundedForm

Weights = Literal["auto", "float32", "bfloat16", "float16", "bf16", "fp16", "fp8_e4m3", "int8"]


def storage(weights: Weights, dtype: Dtype = "auto") -> tuple[RoundedForm | None, Dtype]:
    """Return the form that packed weights are rounded to, None for none, and the dtype to load the model in.

    Raises:
        ValueError: for a ``dtype`` without a rounded form.
    """
    if weights == "fp8_e4m3" or weights == "int8":
        return weights, dtype
    if dtype != "auto":
        raise ValueError(f"--dtype {dtype} is for rounded weights: without them --weights names the dtype")
    if weights == "bf16":
        return None, "bfloat16"
    return None, "float16" if weights == "fp16" else weights
