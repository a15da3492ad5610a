"""Kernels from the cache, from measurements or by rule. No GPU needed."""

from __future__ import annotations

import json
from contextlib import nullcontext

import pytest
import torch

from prox24_lightning.convert.autotune import disk_cache, tune
from prox24_lightning.convert.autotune.disk_cache import Machine
from prox24_lightning.convert.autotune.kernel_table import BUCKETS, KernelTimes, table_by_rule
from prox24_lightning.convert.kernels import nvrtc
from prox24_lightning.convert.kernels.cusparselt.bindings import Support
from prox24_lightning.convert.kernels.few_tokens.tiling import TILINGS
from prox24_lightning.convert.kernels.registry import Kernel

SHAPE = (4096, 1024)
MACHINE = Machine("some GPU", "580.1", "2.11", "800", "abc")
FEW = str(Kernel.few(TILINGS[0]))


def times(tokens: int, dense: float, **kernels: float) -> KernelTimes:
    return KernelTimes(tokens, dense, {{"few": FEW, "plan": "cusparselt:7"}[name]: us for name, us in kernels.items()})


@pytest.fixture
def pretended_gpu(monkeypatch):
    """A Hopper with cuSPARSELt, on which everything takes 10 us dense and 5 us in the kernel for few tokens."""
    monkeypatch.setattr(disk_cache.Machine, "here", lambda device: MACHINE)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(tune, "support", lambda device, form=None: Support("cusparselt", ""))
    monkeypatch.setattr(nvrtc, "is_available", lambda: True)
    monkeypatch.setattr(
        tune, "time_kernels", lambda points, dtype, device, form: {at: times(at[1], 10, few=5) for at in points}
    )


DAMAGED = [
    "",
    "[" * 100_000,
    json.dumps({"version": 1, "entries": {disk_cache.key(MACHINE, torch.float16, SHAPE, 8): {"tokens": 8}}}),
    json.dumps(
        {
            "version": 1,
            "entries": {
                disk_cache.key(MACHINE, torch.float16, SHAPE, 8): {
                    **{"tokens": 8, "dense_us": 10.0, "notes": []},
                    "kernels": {"few:0,1,1,1,17,1,2,2,2": 0.1, "dense": 0.1},
                }
            },
        }
    ),
]


@pytest.mark.parametrize("text", DAMAGED, ids=["empty", "nested", "without times", "with impossible kernels"])
def test_a_damaged_cache_stops_nothing_and_is_measured_anew(pretended_gpu, tmp_path, caplog, text):
    path = tmp_path / "kernels.json"
    path.write_text(text)
    by_rule = table_by_rule(SHAPE, (9, 0))
    assert tune.stored_table(SHAPE, torch.float16, device=0, cache=path) == by_rule
    where = torch.device("cuda", 0)
    tables = tune.kernel_tables([SHAPE], torch.float16, token_counts=(8,), device=where, cache=path)
    assert tables[SHAPE].text == f"8={FEW}"
    assert len(caplog.records) == 1
    assert disk_cache.find(path, MACHINE, torch.float16, SHAPE) == {8: times(8, 10, few=5)}


def test_whatever_number_of_tokens_was_measured_is_found(pretended_gpu, tmp_path):
    path = tmp_path / "kernels.json"
    measured = {tokens: times(tokens, 10, few=5) for tokens in (100, 3)}
    disk_cache.add(path, {disk_cache.key(MACHINE, torch.float16, SHAPE, at): entry for at, entry in measured.items()})
    disk_cache.add(path, {disk_cache.key(MACHINE, torch.float16, SHAPE[::-1], 7): times(7, 10, few=5)})
    assert disk_cache.find(path, MACHINE, torch.float16, SHAPE) == measured
    table = tune.stored_table(SHAPE, torch.float16, device=0, cache=path)
    assert {1, 3, 100, BUCKETS[-1]} <= {row.tokens for row in table.rows}
    assert [row.kernel for row in table.rows if row.us is not None] == [Kernel.parse(FEW)] * 2


def test_times_that_cannot_be_kept_are_used_all_the_same(pretended_gpu, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    tables = tune.kernel_tables(
        [SHAPE],
        torch.float16,
        token_counts=(8,),
        device=torch.device("cuda", 0),
        cache=tmp_path / "file" / "cache.json",
    )
    assert tables[SHAPE].text == f"8={FEW}"
    assert "not kept for the next run" in caplog.text
