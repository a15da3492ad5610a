"""The Hessian ``H = X^T X / tokens`` of a layer's squared output error, summed over calibration inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from prox24_lightning.utils.distributed import gathered_objects, world_size


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total += left^T right`` in its dtype. Tensor cores multiply 16-bit entries exactly, and add up in float32."""
    if left.is_cuda and left.dtype == right.dtype and left.dtype in (torch.bfloat16, torch.float16):
        total.add_(torch.mm(left.T, right, out_dtype=torch.float32))
    else:
        total.addmm_(left.to(total.dtype).T, right.to(total.dtype))


class HessianAccumulator:
    """Running ``H = X^T X / tokens`` of a layer's inputs, and optionally ``C = X_dense^T X / tokens``, in float32.

    Inputs of float64 give them in float64: then no order of batches or ranks shows in the result.

    ``X`` is what the layer sees now, with everything before it pruned; ``X_dense`` what it saw in the dense model.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self._sum: Tensor | None = None
        self._cross: Tensor | None = None

    @torch.no_grad()
    def add(self, rows: Tensor, dense_rows: Tensor | None = None, weights: Tensor | None = None) -> None:
        """Count a batch.

        Args:
            rows, dense_rows: (tokens, in_features), any floating dtype.
            weights: (tokens,), what each token counts; None is 1 for all.
        """
        if weights is not None:
            # A product of float16 would overflow.
            dtype = torch.float32 if rows.dtype is torch.float16 else rows.dtype
            roots = weights.to(rows.device).sqrt().unsqueeze(1).to(dtype)
            rows = rows * roots
            dense_rows = None if dense_rows is None else dense_rows * roots
        if self._sum is None:
            wide = torch.promote_types(rows.dtype, torch.float32)
            self._sum = torch.zeros(rows.shape[1], rows.shape[1], dtype=wide, device=rows.device)
        _add_product(self._sum, rows, rows)
        self.tokens += rows.shape[0]
        if dense_rows is not None:
            if self._cross is None:
                self._cross = torch.zeros_like(self._sum)
            _add_product(self._cross, dense_rows, rows)

    def drop_cross(self) -> None:
        """Forget ``C``: some of the inputs have no counterpart in the dense model."""
        self._cross = None

    @property
    def hessian(self) -> Tensor:
        """``H``, (in_features, in_features)."""
        if self._sum is None:
            raise RuntimeError("no input has been counted")
        return self._sum / max(1, self.tokens)

    @property
    def cross(self) -> Tensor | None:
        """``C``, or None if no dense inputs were given."""
        return None if self._cross is None else self._cross / max(1, self.tokens)

    def state_dict(self) -> dict[str, Any]:
        """Return the sums of this rank, on the CPU."""
        sums = {"sum": self._sum, "cross": self._cross}
        return {"tokens": self.tokens, **{name: value.cpu() for name, value in sums.items() if value is not None}}

    def load_state_dict(self, states: Sequence[Mapping[str, Any]], device: torch.device) -> None:
        """Take over the sums that :meth:`state_dict` gave on one or more ranks."""
        self.tokens = sum(state["tokens"] for state in states)
        for name in ("sum", "cross"):
            values = [state[name].to(device) for state in states if name in state]
            setattr(self, f"_{name}", torch.stack(values).sum(0) if values else None)

    def all_reduce(self, columns: int, device: torch.device) -> None:
        """Add up the sums of all ranks of the process group, if there is one; a rank that counted nothing adds zeros.

        Args:
            columns: number of the layer's inputs.
            device: where a rank that has counted nothing puts its zeros.
        """
        if world_size() == 1:
            return
        mine = None if self._sum is None else self._sum.dtype
        counted, dtypes = zip(*gathered_objects(((self.tokens, self._cross is not None), mine)), strict=True)
        self.tokens = sum(tokens for tokens, _ in counted)
        if self._sum is None:
            dtype = next((one for one in dtypes if one is not None), torch.float32)
            self._sum = torch.zeros(columns, columns, dtype=dtype, device=device)
        dist.all_reduce(self._sum)
        # What one rank could not compare with the dense model none of them does.
        if not any(cross for _, cross in counted) or not all(cross for tokens, cross in counted if tokens):
            self._cross = None
            return
        if self._cross is None:
            self._cross = torch.zeros_like(self._sum)
        dist.all_reduce(self._cross)
