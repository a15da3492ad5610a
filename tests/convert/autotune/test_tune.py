"""Kernels from the cache, from measurements or by rule. No GPU needed."""

from __future__ import annotations

from contextlib import nullcontext

import torch

from prox24_lightning.convert.autotune import disk_cache, tune
from prox24_lightning.convert.autotune.disk_cache import Machine
from prox24_lightning.convert.autotune.kernel_table import (
    BUCKETS,
    KernelTimes,
)
from prox24_lightning.convert.kernels import nvrtc
from prox24_lightning.convert.kernels.cusparselt.library import Support
from prox24_lightning.convert.kernels.few_tokens.tiling import TILINGS
from prox24_lightning.convert.kernels.registry import Kernel

SHAPE = (4096, 1024)
MACHINE = Machine("some GPU", "580.1", "2.11", "800", "abc")
FEW = str(Kernel.few(TILINGS[0]))


def times(tokens: int, dense: float, **kernels: float) -> KernelTimes:
    return KernelTimes(tokens, dense, {{"few": FEW, "plan": "cusparselt:7"}[name]: us for name, us in kernels.items()})


def test_whatever_number_of_tokens_was_measured_is_found(tmp_path, monkeypatch):
    path = tmp_path / "kernels.json"
    measured = {tokens: times(tokens, 10, few=5) for tokens in (100, 3)}
    disk_cache.add(path, {disk_cache.key(MACHINE, torch.float16, SHAPE, at): entry for at, entry in measured.items()})
    disk_cache.add(path, {disk_cache.key(MACHINE, torch.float16, SHAPE[::-1], 7): times(7, 10, few=5)})
    assert disk_cache.find(path, MACHINE, torch.float16, SHAPE) == measured
    monkeypatch.setattr(disk_cache.Machine, "here", lambda device: MACHINE)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(tune, "support", lambda device: Support("cusparselt", ""))
    monkeypatch.setattr(nvrtc, "is_available", lambda: True)
    table = tune.stored_table(SHAPE, torch.float16, device=0, cache=path)
    assert {1, 3, 100, BUCKETS[-1]} <= {row.tokens for row in table.rows}
    assert [row.kernel for row in table.rows if row.us is not None] == [Kernel.parse(FEW)] * 2


def test_times_that_cannot_be_kept_are_used_all_the_same(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(disk_cache.Machine, "here", lambda device: MACHINE)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(
        tune, "time_kernels", lambda points, dtype, device: {at: times(at[1], 10, few=5) for at in points}
    )
    tables = tune.kernel_tables(
        [SHAPE],
        torch.float16,
        token_counts=(8,),
        device=torch.device("cuda", 0),
        cache=tmp_path / "file" / "cache.json",
    )
    assert tables[SHAPE].text == f"8={FEW}"
    assert "not kept for the next run" in caplog.text
