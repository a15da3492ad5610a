"""Settings of a conversion benchmark, and its inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from prox24_lightning.convert.benchmark.report import RunMode
from prox24_lightning.convert.eligibility import DTYPES


@dataclass(frozen=True)
class Settings:
    """How to measure and how to decide.

    Attributes:
        token_counts: rows of the layer's input at which every layer is timed.
        dtype: of weights and inputs, dense and sparse alike.
        only_if_faster: keep a layer dense that is slower at any of these token counts; False converts every layer
            that can run sparse.
        run_mode: which times decide: "eager" (a plain call, the host's work included) or "graph" (the call replayed
            from a CUDA graph, as serving engines do).
        keep_dense: keep the dense weight beside the packed one, and let cuBLAS take the token counts at which it is
            faster; costs 1.56 times the dense memory instead of 0.56.
        rounds: how many times each measurement is repeated; medians are reported.
    """

    token_counts: tuple[int, ...] = (1, 64, 1024, 4096)
    dtype: torch.dtype = torch.bfloat16
    only_if_faster: bool = True
    run_mode: RunMode = "graph"
    keep_dense: bool = False
    rounds: int = 20

    def __post_init__(self) -> None:
        counts = tuple(self.token_counts)
        if not counts or any(isinstance(count, bool) or not isinstance(count, int) or count < 1 for count in counts):
            raise ValueError(f"token_counts={self.token_counts!r} must be one or more whole numbers from 1 up")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype} has no sparse kernel; use torch.bfloat16 or torch.float16")
        if self.run_mode not in ("eager", "graph"):
            raise ValueError(f"run_mode={self.run_mode!r} is unknown; use 'eager' or 'graph'")
        if self.rounds < 2:
            raise ValueError(f"rounds={self.rounds} is too few for a median; use 2 or more")
        object.__setattr__(self, "token_counts", tuple(dict.fromkeys(counts)))


@dataclass(frozen=True)
class ExampleInputs:
    """Arguments with which one module of the model is called; ``module_name`` "" is the model itself."""

    module_name: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
