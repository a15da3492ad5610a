"""Cholesky factors of Hessians that may be singular in float32."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


def damped(hessian: Tensor, damping: float) -> Tensor:
    """Return ``H + damping * mean(diag) * I``, as SparseGPT publishes it; ``H + I`` where the diagonal is all zero."""
    mean = hessian.diagonal().mean()
    result = hessian.clone()
    result.diagonal().add_(torch.where(mean > 0, damping * mean, 1.0))
    return result


def cholesky(matrix: Tensor, *, damping: float = 0.0, attempts: int = 3, name: str = "layer") -> Tensor:
    """Return the lower Cholesky factor of ``matrix + damping * mean(diag) * I``.

    Where float32 fails, the damping (at least 1e-6) grows tenfold up to ``attempts`` times; then the same in float64.

    Returns:
        the factor, in the dtype of ``matrix``; the log tells (level INFO) when the first try failed.

    Raises:
        ValueError: if no factor is found.
    """
    for dtype in (matrix.dtype, torch.float64):
        shift = damping
        for attempt in range(attempts + 1):
            lower, failed = torch.linalg.cholesky_ex(damped(matrix.to(dtype), shift))
            if not int(failed) and bool(torch.isfinite(lower).all()):
                if attempt or dtype != matrix.dtype:
                    logger.info("%s: the Cholesky factor needed damping %g in %s", name, shift, dtype)
                return lower.to(matrix.dtype)
            shift = max(10 * shift, 1e-6)
    raise ValueError(
        f"{name}: the Hessian has no Cholesky factor even with damping {shift / 10:g} in float64; give more "
        "calibration tokens, or leave the layer dense with skip="
    )
