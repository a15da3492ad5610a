"""Settings of a conversion benchmark, and its inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from prox24_lightning.convert.benchmark.report import RunMode
from prox24_lightning.convert.eligibility import DTYPES
from prox24_lightning.weights.rounding import VALUE_DTYPES, RoundedForm, WeightForm


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
        weights: the form of converted layers: "fp8_e4m3" or "int8" round them to 8 bits, None and the name of
            ``dtype`` keep 16.
        max_error: largest relative error of a layer's output that is acceptable for a form of 8 bits. Gaussian weights
            and inputs give 0.037 in fp8_e4m3 and 0.010 in int8.
        input_quantile: of the largest magnitudes of tokens, at which the scale of a rounded layer's inputs is fixed;
            None gives each token its own.
    """

    token_counts: tuple[int, ...] = (1, 64, 1024, 4096)
    dtype: torch.dtype = torch.bfloat16
    only_if_faster: bool = True
    run_mode: RunMode = "graph"
    keep_dense: bool = False
    rounds: int = 20
    weights: WeightForm | None = None
    max_error: float = 0.05
    input_quantile: float | None = None

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
        if self.weights not in (*VALUE_DTYPES, None):
            raise ValueError(f"weights={self.weights!r} is unknown; use one of {', '.join(VALUE_DTYPES)}, or None")
        if self.weights is not None and self.form is None and VALUE_DTYPES[self.weights] != self.dtype:
            raise ValueError(f"weights={self.weights!r} does not fit dtype={self.dtype}: name one of them")
        if not 0 < self.max_error < 1:
            raise ValueError(f"max_error={self.max_error} must lie in (0, 1)")
        if self.input_quantile is not None:
            if not 0 < self.input_quantile <= 1:
                raise ValueError(f"input_quantile={self.input_quantile} must lie in (0, 1]; None leaves scales free")
            if self.form is None:
                raise ValueError(
                    f"input_quantile={self.input_quantile} is for rounded weights: name weights='fp8_e4m3' or 'int8'"
                )
        object.__setattr__(self, "token_counts", tuple(dict.fromkeys(counts)))

    @property
    def form(self) -> RoundedForm | None:
        """The form of 8 bits; None for 16."""
        return self.weights if self.weights == "fp8_e4m3" or self.weights == "int8" else None


@dataclass(frozen=True)
class ExampleInputs:
    """Arguments with which one module of the model is called; ``module_name`` "" is the model itself."""

    module_name: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
