"""One launch for many weights: a table says where they are, and each program works on a part of one of them."""

# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: N803

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from prox24_lightning.prox.statistics import ProxStatistics
from prox24_lightning.prox.triton.arguments import SIZES, SUMS, Tensors, Variant
from prox24_lightning.prox.triton.critical import critical_strengths
from prox24_lightning.prox.triton.fused import prox_tiles
from prox24_lightning.prox.triton.interpreter import INTERPRETED, queue_memory
from prox24_lightning.prox.triton.launch import (
    CRITICAL_BLOCK,
    ROUND,
    WIDE,
    Launch,
    has_words,
    launch_for,
    programs_for,
    strided,
)
from prox24_lightning.prox.triton.memory import read_row
from prox24_lightning.utils.sampling import sample_stride

STATISTICS_REGISTERS = 96
"""Registers a thread at most where statistics are gathered too."""


class WeightTable:
    """Addresses, shapes, strides and shares of many weights on the device, for kernels that change them in place.

    Args:
        weights: contiguous, of one dtype on one CUDA device; all with groups along the last dimension, or none.
        dims: the dimension of the groups of each, non-negative.
        scales: None, or one float32 tensor of ``(in_features,)`` or the like for each weight, broadcasting to it. They
            are read where they are when the kernel runs.
    """

    def __init__(self, weights: Sequence[Tensor], dims: Sequence[int], scales: list[Tensor] | None) -> None:
        self.weights, self.scales = list(weights), scales
        device = weights[0].device
        total = sum(weight.numel() // 4 for weight in weights)
        inners = [weight.shape[dim + 1 :].numel() for weight, dim in zip(weights, dims, strict=True)]
        self.last_dim = all(inner == 1 for inner in inners)
        self.launch = launch_for(weights[0], last_dim=self.last_dim, plain=scales is None and has_words(weights[0]))
        rows: list[list[int]] = []
        owners: list[int] = []
        for number, (weight, dim, inner) in enumerate(zip(weights, dims, inners, strict=True)):
            groups = weight.numel() // 4
            programs = programs_for(groups, total, self.launch, device)
            values, strides = (
                (weight, (0, 0, 0)) if scales is None else strided(scales[number], weight.shape, dim, device)
            )
            if scales is not None and values.data_ptr() != scales[number].data_ptr():
                raise ValueError(f"scale {number} is not a float32 tensor on {device} that broadcasts without a copy")
            place = [weight.data_ptr(), values.data_ptr(), groups, programs, weight.shape[dim] // 4, inner]
            rows.append([*place, *strides, len(owners)])
            owners += [number] * programs
        self.wide = any(weight.numel() >= WIDE for weight in weights)
        self._sample_strides: dict[int, Tensor] = {}
        self._table = torch.tensor(rows, dtype=torch.int64).to(device, non_blocking=True)
        self._owners = torch.tensor(owners, dtype=torch.int32).to(device, non_blocking=True)

    def critical(self, result: Tensor) -> Tensor:
        """Fill ``result``, float32 ``(weights, samples)``, with the critical strengths of groups spread over each."""
        weights, samples = result.shape
        if samples not in self._sample_strides:
            strides = [sample_stride(weight.numel() // 4, samples) for weight in self.weights]
            self._sample_strides[samples] = torch.tensor(strides, dtype=torch.int32).to(
                result.device, non_blocking=True
            )
        with torch.cuda.device_of(result):
            critical_many_kernel[(weights, triton.cdiv(samples, CRITICAL_BLOCK))](
                self._table,
                self.weights[0],
                result,
                self._sample_strides[samples],
                samples,
                HAS_SCALE=self.scales is not None,
                LAST_DIM=self.last_dim,
                WIDE=self.wide,
                BLOCK=CRITICAL_BLOCK,
                num_warps=4,
            )
        return result

    def prox(self, strengths: Tensor, *, settle: bool, statistics: Sequence[ProxStatistics] | None = None) -> None:
        """Apply the prox to every weight, in place, each with its own strength.

        ``strengths`` are float32 ``(weights,)`` on the device. ``statistics``, one for each weight, are filled from the
        same pass; their sums are rows of one tensor.
        """
        launch = self.launch if statistics is None else Launch(registers=STATISTICS_REGISTERS)
        with torch.cuda.device_of(strengths):
            prox_many_kernel[(len(self._owners),)](
                self._table,
                self._owners,
                strengths,
                *((strengths, self._table, self._table) if statistics is None else _addresses(statistics)),
                self.weights[0],
                queue_memory(launch.tile + 4 * ROUND, strengths.device),
                HAS_SCALE=self.scales is not None,
                LAST_DIM=self.last_dim,
                WIDE=self.wide,
                SETTLE=settle,
                STATISTICS=statistics is not None,
                ALIGNED=has_words(self.weights[0]),
                TILE=launch.tile,
                ROUND=ROUND,
                num_warps=1,
                maxnreg=launch.registers,
            )


def _addresses(statistics: Sequence[ProxStatistics]) -> tuple[Tensor, Tensor, Tensor]:
    """The sums, and the addresses of the codes now and before."""
    device = statistics[0].sums.device
    places = [[one.code.data_ptr() for one in statistics], [one.previous_code.data_ptr() for one in statistics]]
    codes, previous_codes = torch.tensor(places, dtype=torch.int64).to(device, non_blocking=True)
    return statistics[0].sums, codes, previous_codes


@triton.jit
def prox_many_kernel(
    table,
    owners,
    strengths,
    sums,
    codes,
    previous_codes,
    like,
    scratch,
    HAS_SCALE: tl.constexpr,
    LAST_DIM: tl.constexpr,
    WIDE: tl.constexpr,
    SETTLE: tl.constexpr,
    ALIGNED: tl.constexpr,
    STATISTICS: tl.constexpr,
    TILE: tl.constexpr,
    ROUND: tl.constexpr,
):
    """The prox of many weights of the dtype of ``like`` in place: a row of ``table`` and a strength each, and in
    ``owners`` for each program the weight that it works on."""
    number = tl.load(owners + tl.program_id(0))
    weight, scale, groups, programs, first, layout = read_row(table, number, like)
    words: tl.constexpr = ALIGNED and LAST_DIM and not INTERPRETED
    variant: tl.constexpr = Variant(
        one_strength=True,
        has_scale=HAS_SCALE,
        last_dim=LAST_DIM,
        wide=WIDE,
        settle=SETTLE,
        pairs=words and weight.dtype.element_ty == tl.bfloat16,
        vectors=words and weight.dtype.element_ty == tl.float32,
        statistics=STATISTICS,
    )
    code = tl.load(codes + number).to(tl.pointer_type(tl.uint8), bitcast=True)
    previous_code = tl.load(previous_codes + number).to(tl.pointer_type(tl.uint8), bitcast=True)
    strength = tl.load(strengths + number)
    tensors = Tensors(weight, weight, strength, scale, sums + number * SUMS, code, previous_code, scratch)
    prox_tiles(tensors, layout, groups, tl.program_id(0) - first, programs, variant, TILE, ROUND)


@triton.jit(do_not_specialize=SIZES)
def critical_many_kernel(
    table,
    like,
    result,
    strides,
    samples,
    HAS_SCALE: tl.constexpr,
    LAST_DIM: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The critical strengths of ``samples`` groups of each weight: a row of ``table`` each, and in ``strides`` for each
    the distance between its sampled groups."""
    number = tl.program_id(0)
    weight, scale, groups, _, _, layout = read_row(table, number, like)
    sample = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    group = (sample * tl.load(strides + number) % groups).to(tl.int64)
    variant: tl.constexpr = Variant(
        one_strength=True,
        has_scale=HAS_SCALE,
        last_dim=LAST_DIM,
        wide=WIDE,
        settle=False,
        pairs=False,
        vectors=False,
        statistics=False,
    )
    begin = tl.zeros((), tl.int32)
    tensors = Tensors(weight, weight, 0.0, scale, scale, scale, scale, None)
    found = critical_strengths(tensors, layout, begin, group, sample < samples, variant)
    tl.store(result + number * samples + sample, found, mask=sample < samples)
