"""The kernel of the critical strength gives what the batched equations give."""

from __future__ import annotations

import torch

from prox24_lightning.prox import critical_strength_24
from prox24_lightning.prox.triton.launch import critical_24_triton


def test_critical_strengths(groups):
    y = groups.clamp(-30, 30)
    torch.testing.assert_close(critical_24_triton(y), critical_strength_24(y), rtol=3e-6, atol=0.0)
