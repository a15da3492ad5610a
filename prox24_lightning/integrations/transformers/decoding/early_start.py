"""Triton kernels that start while the kernel before them ends, which hides the time of starting (Hopper and newer).

Such a kernel lets the one behind it start at once, and waits before it reads or writes memory. So it ends after all
earlier work, and what waits for it waits for all. A product of 8 bits behind it loads its weight before it waits, which
may be while the product before is still running: neither writes a weight.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from prox24_lightning.convert.kernels.round_tokens.kernel import OVERLAPPING

try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:  # a version of Triton without
    gdc_launch_dependents = gdc_wait = None


@triton.jit
def start_early(EARLY: tl.constexpr):  # noqa: N803
    """Let the next kernel start, and wait for all earlier work; the first statement of a kernel."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()


def settings(device: torch.device) -> dict[str, Any]:
    """Return the argument EARLY of a kernel on a device, and the option that it needs."""
    early = gdc_wait is not None and device.type == "cuda" and torch.cuda.get_device_capability(device) >= OVERLAPPING
    return {"EARLY": True, "launch_pdl": True} if early else {"EARLY": False}
