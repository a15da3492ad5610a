"""Choose the kernels of a shape on the user's GPU: measured once a machine and kept on disk, or by rule."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from prox24_lightning.convert.autotune import disk_cache
from prox24_lightning.convert.autotune.kernel_table import BUCKETS, KernelTable, choose, completed, table_by_rule
from prox24_lightning.convert.autotune.time_kernels import Shape, time_kernels
from prox24_lightning.convert.kernels import nvrtc
from prox24_lightning.convert.kernels.cusparselt.bindings import support
from prox24_lightning.weights.rounding import RoundedForm

log = logging.getLogger(__name__)


def kernel_tables(
    shapes: Sequence[Shape],
    dtype: torch.dtype,
    *,
    token_counts: Sequence[int] = BUCKETS,
    keep_dense: bool = False,
    device: torch.device | None = None,
    cache: Path | None = None,
    form: RoundedForm | None = None,
) -> dict[Shape, KernelTable]:
    """Return the fastest kernels of each shape on a GPU: read from the cache, or measured and added to it.

    Args:
        shapes: (out_features, in_features) of each.
        dtype: float16 or bfloat16, of inputs and outputs.
        token_counts: the numbers of tokens to measure; a call uses the next one above its own number.
        keep_dense: whether cuBLAS on a dense weight that is kept is among the kernels.
        device: None takes the current GPU.
        cache: the file; None takes :func:`~prox24_lightning.convert.autotune.disk_cache.default_path`.
        form: of weights of 8 bits; None for weights in ``dtype``.

    Raises:
        ValueError: if nothing packed runs at one of the token counts.
    """
    index = torch.cuda.current_device() if device is None or device.index is None else device.index
    counts = sorted(set(token_counts))
    path = cache or disk_cache.default_path()
    machine = disk_cache.Machine.here(index)
    known = {shape: disk_cache.find(path, machine, dtype, shape, counts, form=form) for shape in dict.fromkeys(shapes)}
    missing = [(shape, tokens) for shape, found in known.items() for tokens in counts if tokens not in found]
    if missing:
        with torch.cuda.device(index), torch.no_grad():
            measured = time_kernels(missing, dtype, index, form)
        for (shape, tokens), times in measured.items():
            known[shape][tokens] = times
        try:
            entries = {disk_cache.key(machine, dtype, *at, form): times for at, times in measured.items()}
            disk_cache.add(path, entries)
        except OSError as error:
            log.warning("measured times are not kept for the next run: %s; set $%s", error, disk_cache.PATH_VARIABLE)
    return {
        shape: choose(shape, list(found.values()), keep_dense=keep_dense, form=form) for shape, found in known.items()
    }


def stored_table(
    shape: Shape,
    dtype: torch.dtype,
    *,
    keep_dense: bool = False,
    device: int,
    cache: Path | None = None,
    form: RoundedForm | None = None,
) -> KernelTable:
    """Return what the cache holds of a shape, completed by rule; nothing is measured."""
    machine = disk_cache.Machine.here(device)
    known = disk_cache.find(cache or disk_cache.default_path(), machine, dtype, shape, form=form)
    capability, many_tokens = torch.cuda.get_device_capability(device), support(device, form).kernel
    by_rule = table_by_rule(shape, capability, many_tokens, own=nvrtc.is_available(), form=form)
    measured = choose(shape, list(known.values()), keep_dense=keep_dense).rows
    return KernelTable(shape, completed(measured, by_rule.rows), form)
