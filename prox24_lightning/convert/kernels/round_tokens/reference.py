"""What the kernel of this folder computes, in plain torch on any device, bit for bit."""

from __future__ import annotations

from prox24_lightning.weights.rounding import round_tokens

__all__ = ["round_tokens"]
