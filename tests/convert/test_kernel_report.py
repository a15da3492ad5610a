"""The table of kernels in words."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import get_args

from rich.console import Console

from prox24_lightning.convert.autotune.kernel_table import (
    KernelTimes,
    choose,
)
from prox24_lightning.convert.kernel_report import in_words, print_kernels
from prox24_lightning.convert.kernels.few_tokens.tiling import TILINGS
from prox24_lightning.convert.kernels.registry import Kernel, KernelName

SHAPE = (4096, 1024)
FEW = str(Kernel.few(TILINGS[0]))


def times(tokens: int, dense: float, **kernels: float) -> KernelTimes:
    return KernelTimes(tokens, dense, {{"few": FEW, "plan": "cusparselt:7"}[name]: us for name, us in kernels.items()})


def test_the_table_of_kernels():
    table = choose(SHAPE, [times(1, 10, few=5), replace(times(256, 10, plan=12), notes=("algorithm 3 died",))])
    console = Console(width=240, record=True, file=io.StringIO())
    print_kernels([table], console)
    lines = [line for line in console.export_text().splitlines() if "(4096, 1024)" in line]
    assert "own kernel, tiling 0,1,1,1,16,1,2,2,2" in lines[0]
    assert "5.00" in lines[0]
    assert "2.00" in lines[0]
    assert "cuSPARSELt, algorithm 7" in lines[1]
    assert "slower than dense" in lines[1]
    assert "algorithm 3 died" in lines[1]
    assert in_words(Kernel("cusparselt")) == "cuSPARSELt, algorithm by default"


def test_every_kernel_has_words():
    assert all(name != in_words(Kernel(name)) for name in get_args(KernelName))
