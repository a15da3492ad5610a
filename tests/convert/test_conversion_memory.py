"""Converting a model takes the memory of one more layer and no more: it goes layer by layer and frees as it goes."""

from __future__ import annotations

import pytest
import torch
from live_bytes import LiveBytes
from torch import nn

from prox24_lightning.convert import Target, convert, convert_model
from prox24_lightning.convert.autotune.kernel_table import KernelTable, TableRow
from prox24_lightning.convert.kernels import packed_buffer, rounded_buffer
from prox24_lightning.convert.kernels.registry import Kernel
from prox24_lightning.mask import check, mask_24
from prox24_lightning.weights import chunks

HOPPER = Target("pretended H200", (9, 0), "cusparselt")
WIDTH = 2048
LAYER = 2 * WIDTH * WIDTH


def dense_model(device="cpu"):
    layers = []
    for _ in range(4):
        layer = nn.Linear(WIDTH, WIDTH, bias=False, device=device)
        with torch.no_grad():
            layer.weight.mul_(mask_24(layer.weight))
        layers.append(layer.bfloat16())
    return nn.Sequential(*layers)


@pytest.mark.parametrize(("weights", "share"), [(None, 9 / 16), ("fp8_e4m3", 5 / 16 + 4 / (2 * WIDTH))])
def test_conversion_takes_one_layer_more_than_the_dense_model(monkeypatch, weights, share):
    monkeypatch.setattr(convert, "target_of", lambda device: HOPPER)
    table = KernelTable((WIDTH, WIDTH), (TableRow(16384, Kernel("cusparselt")),))
    monkeypatch.setattr(convert, "stored_table", lambda *args, **options: table)
    # Parts of a size that is small beside these small layers, as the real one is beside real layers.
    monkeypatch.setattr(chunks, "CHUNK_ENTRIES", 2**17)
    monkeypatch.setattr(packed_buffer, "CHUNK_ENTRIES", 2**17)
    monkeypatch.setattr(rounded_buffer, "CHUNK_ENTRIES", 2**17)
    monkeypatch.setattr(check, "ENTRIES_AT_A_TIME", 2**17)
    model = dense_model()
    with LiveBytes() as live:
        live.count(parameter.detach() for parameter in model.parameters())
        done = convert_model(model, weights=weights)
    assert done.converted == ("0", "1", "2", "3")
    assert sum(layer.stored_bytes for layer in model) == pytest.approx(4 * LAYER * share, rel=1e-5)
    assert 4 * LAYER < live.peak <= 5 * LAYER


def test_a_head_that_stays_dense_is_looked_at_in_parts(monkeypatch):
    monkeypatch.setattr(convert, "target_of", lambda device: HOPPER)
    monkeypatch.setattr(check, "ENTRIES_AT_A_TIME", 2**17)
    monkeypatch.setattr(chunks, "CHUNK_ENTRIES", 2**17)
    head = nn.Linear(WIDTH, 8 * WIDTH, bias=False).bfloat16()
    with LiveBytes() as live:
        live.count([head.weight.detach()])
        done = convert_model(nn.Sequential(head))
    assert next(verdict.why for verdict in done.dense).startswith("not 2:4: ")
    assert live.peak <= head.weight.nbytes * 9 // 8


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")
def test_conversion_takes_one_layer_more_on_the_gpu():
    torch.manual_seed(0)
    shapes = [(14336, 4096), (4096, 14336), (4096, 4096)]
    model = nn.Sequential()
    for rows, columns in shapes:
        weight = torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16)
        layer = nn.Linear(columns, rows, bias=False, device="meta")
        layer.weight = nn.Parameter(weight * mask_24(weight), requires_grad=False)
        model.append(layer)
    del weight, layer
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    dense = sum(2 * rows * columns for rows, columns in shapes)
    torch.cuda.reset_peak_memory_stats()
    done = convert_model(model)
    peak = torch.cuda.max_memory_allocated() - before
    left = torch.cuda.memory_allocated() - before
    assert len(done.converted) == 3
    assert peak <= 2 * 14336 * 4096, f"{peak / 2**20:.0f} MiB above the dense model"
    assert left <= -0.42 * dense, "the dense weights are gone"
