"""The kernels for products with a packed 2:4 weight by name, and the text that says which one runs when.

That text (``"8=few:0,1,1,1,16,1,2,2,2 4096=cusparselt:17"``: up to so many tokens, this kernel) is an argument of the
operator that ``torch.compile`` writes into its programs, and these outlive the process.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from functools import cache
from typing import Literal

import torch

from prox24_lightning.convert.kernels import packed_buffer
from prox24_lightning.convert.kernels.cublas.kernel import prepare as prepare_cublas
from prox24_lightning.convert.kernels.cusparselt.kernel import prepare as prepare_cusparselt
from prox24_lightning.convert.kernels.dense_fp8.kernel import OLDEST_CAPABILITY as OLDEST_FP8_CAPABILITY
from prox24_lightning.convert.kernels.dense_fp8.kernel import WAYS as DENSE_FP8_WAYS
from prox24_lightning.convert.kernels.dense_fp8.kernel import prepare as prepare_dense_fp8
from prox24_lightning.convert.kernels.expand.kernel import prepare as prepare_expand
from prox24_lightning.convert.kernels.few_tokens.kernel import compile_few_tokens
from prox24_lightning.convert.kernels.few_tokens.kernel import prepare as prepare_few_tokens
from prox24_lightning.convert.kernels.few_tokens.tiling import TILINGS as FEW_TOKENS_TILINGS
from prox24_lightning.convert.kernels.few_tokens.tiling import Tiling as FewTokensTiling
from prox24_lightning.convert.kernels.few_tokens.tiling import tilings as few_tokens_tilings
from prox24_lightning.convert.kernels.many_tokens.kernel import compile_many_tokens
from prox24_lightning.convert.kernels.many_tokens.kernel import prepare as prepare_many_tokens
from prox24_lightning.convert.kernels.many_tokens.tiling import TILINGS as MANY_TOKENS_TILINGS
from prox24_lightning.convert.kernels.many_tokens.tiling import Tiling as ManyTokensTiling
from prox24_lightning.convert.kernels.many_tokens.tiling import tilings as many_tokens_tilings
from prox24_lightning.convert.kernels.product import Product
from prox24_lightning.convert.kernels.torch_cusparselt.kernel import prepare as prepare_torch_cusparselt
from prox24_lightning.convert.kernels.warpgroup.kernel import compile_warpgroup
from prox24_lightning.convert.kernels.warpgroup.kernel import prepare as prepare_warpgroup
from prox24_lightning.convert.kernels.warpgroup.tiling import ROUNDED_TILINGS as WARPGROUP_ROUNDED_TILINGS
from prox24_lightning.convert.kernels.warpgroup.tiling import TILINGS as WARPGROUP_TILINGS
from prox24_lightning.convert.kernels.warpgroup.tiling import Tiling as WarpgroupTiling
from prox24_lightning.convert.kernels.warpgroup.tiling import tilings as warpgroup_tilings
from prox24_lightning.weights.rounding import RoundedForm

KernelName = Literal["dense", "dense_fp8", "few", "warpgroup", "many", "cusparselt", "torch", "expand"]

_Prepare = Callable[[Sequence[int], torch.dtype, tuple[int, int], int, int, "RoundedForm | None"], Product]

_PREPARE: dict[KernelName, _Prepare] = {
    "dense": prepare_cublas,
    "dense_fp8": prepare_dense_fp8,
    "few": prepare_few_tokens,
    "warpgroup": prepare_warpgroup,
    "many": prepare_many_tokens,
    "cusparselt": prepare_cusparselt,
    "torch": prepare_torch_cusparselt,
    "expand": prepare_expand,
}

_ALGORITHM = re.compile(r"0|[1-9][0-9]{0,3}")
_FEW_BESIDE_WARPGROUP = 16  # up to so many tokens few_tokens wins on one shape or another


@dataclass(frozen=True)
class Kernel:
    """A kernel and its configuration.

    Attributes:
        name: "dense" (cuBLAS on the dense weight that is kept), "dense_fp8" (a dense buffer takes the place of the
            packed one), "few" (few_tokens), "warpgroup", "many" (many_tokens), "cusparselt", "torch" (torch_cusparselt)
            or "expand"; see :mod:`prox24_lightning.convert.kernels`.
        config: of "few", "warpgroup" and "many" the fields of their ``Tiling``; of "cusparselt" the algorithm, or
            nothing for the library's default; of "dense_fp8" the way; empty for the others.
    """

    name: KernelName
    config: tuple[int, ...] = ()

    @classmethod
    def few(cls, tiling: FewTokensTiling) -> Kernel:
        return cls("few", astuple(tiling))

    @classmethod
    def warpgroup(cls, tiling: WarpgroupTiling) -> Kernel:
        return cls("warpgroup", _without_default(astuple(tiling)))

    @classmethod
    def many(cls, tiling: ManyTokensTiling) -> Kernel:
        return cls("many", _without_default(astuple(tiling)))

    @classmethod
    def parse(cls, text: str) -> Kernel:
        """Return the kernel of a text that ``str(kernel)`` has made."""
        name, _, config = text.partition(":")
        return cls(name, tuple(int(number) for number in config.split(",") if number))  # type: ignore[arg-type]

    def __str__(self) -> str:
        return f"{self.name}:{','.join(map(str, self.config))}" if self.config else self.name


def _without_default(numbers: tuple[int, ...]) -> tuple[int, ...]:
    """Return a tiling's numbers as texts of earlier versions have them, without a last 0."""
    return numbers if numbers[-1] else numbers[:-1]


_OWN_KERNELS = {
    *(str(Kernel.few(tiling)) for tiling in FEW_TOKENS_TILINGS),
    *(str(Kernel.warpgroup(tiling)) for tiling in (*WARPGROUP_TILINGS, *WARPGROUP_ROUNDED_TILINGS)),
    *(str(Kernel.many(tiling)) for tiling in MANY_TOKENS_TILINGS),
}


def is_packed_kernel(text: str) -> bool:
    """Return whether a text, from a file, names a kernel of this release that runs on a packed weight."""
    name, _, config = text.partition(":")
    if name in ("few", "warpgroup", "many"):
        return text in _OWN_KERNELS
    if name == "cusparselt":
        return text == name or _ALGORITHM.fullmatch(config) is not None
    return text in ("torch", "expand")


def own_kernels(tokens: int, capability: tuple[int, int], form: RoundedForm | None = None) -> tuple[Kernel, ...]:
    """Return the package's kernels worth measuring at a number of tokens on a GPU of this compute capability."""
    found = tuple(map(Kernel.warpgroup, warpgroup_tilings(tokens, capability, rounded=form is not None)))
    if form is not None:
        found += tuple(map(Kernel.many, many_tokens_tilings(tokens, capability)))
    if found and tokens > _FEW_BESIDE_WARPGROUP:
        return found
    return (*map(Kernel.few, few_tokens_tilings(tokens, capability, form)), *found)


def dense_fp8_kernels(capability: tuple[int, int]) -> tuple[Kernel, ...]:
    """Return the ways of multiplying with a dense float8 weight on a GPU; none where it has no float8."""
    return tuple(Kernel("dense_fp8", (way,)) for way in DENSE_FP8_WAYS) if capability >= OLDEST_FP8_CAPABILITY else ()


def compile_kernel(
    kernel: Kernel, dtype: torch.dtype, capability: tuple[int, int], form: RoundedForm | None = None
) -> None:
    """Compile one of the package's kernels ahead of its use; several threads may compile at once."""
    if kernel.name == "few":
        compile_few_tokens(FewTokensTiling(*kernel.config), dtype, capability, form)
    elif kernel.name == "warpgroup":
        compile_warpgroup(WarpgroupTiling(*kernel.config), dtype, form)
    elif kernel.name == "many" and form is not None:
        compile_many_tokens(ManyTokensTiling(*kernel.config), dtype, form)


def missing_inputs(kernel: Kernel, shape: tuple[int, int], form: RoundedForm | None = None) -> int:
    """Return by how many zeros each token must be padded for a kernel; those that round tokens pad them themselves."""
    if form is not None or kernel.name in ("dense", "dense_fp8"):
        return 0
    return packed_buffer.padded_shape(shape)[1] - shape[1]


def takes_rounded(kernel: Kernel) -> bool:
    """Return whether a kernel for weights of 8 bits takes tokens that are rounded already in place of its inputs."""
    return kernel.name not in ("dense", "torch", "expand")


def takes_any_shape(kernel: Kernel, form: RoundedForm | None = None) -> bool:
    """Return whether a kernel's product reads tokens in any number of dimensions, and answers in the same.

    Two views less a call: they take the host as long as a launch.
    """
    return form is None and kernel.name in ("few", "warpgroup")


def prepare(
    kernel: Kernel,
    dtype: torch.dtype,
    shape: tuple[int, int],
    tokens: int,
    device: int,
    form: RoundedForm | None = None,
) -> Product:
    """Do all that can be done before the call: the product that is returned only allocates and launches.

    Args:
        kernel: which, and its configuration.
        dtype: float16 or bfloat16, of inputs and outputs.
        shape: (out_features, in_features).
        tokens: rows of the inputs.
        device: index of the GPU.
        form: of a weight of 8 bits; None for one in ``dtype``.

    Raises:
        CusparseltError, CudaError: if the library or the compiler cannot be used here.
    """
    return _PREPARE[kernel.name](kernel.config, dtype, shape, tokens, device, form)


@cache
def parse_table(table: str) -> tuple[tuple[int, ...], tuple[Kernel, ...]]:
    """Return ascending token counts and the kernel up to each; the last kernel serves larger counts too."""
    entries = [entry.split("=") for entry in table.split()]
    return tuple(int(tokens) for tokens, _ in entries), tuple(Kernel.parse(kernel) for _, kernel in entries)


def kernel_for(table: str, tokens: int) -> Kernel:
    """Return the kernel that a table names for a number of tokens."""
    counts, kernels = parse_table(table)
    return kernels[min(bisect_left(counts, tokens), len(kernels) - 1)]
