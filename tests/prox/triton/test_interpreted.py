"""The fused kernel in Triton's interpreter, which needs no GPU but must be asked for before triton is imported."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import sys
sys.path.insert(0, {folder!r})
import numpy as np
import torch
from brute import GAP, GOLDEN, hard_groups, relative_gap
from prox24_lightning.prox import ProxTogether, prox_24, prox_24_reference, settle_24, together
from prox24_lightning.prox.triton_kernel import prox_24_triton

with np.load(GOLDEN) as file:
    y, lam = torch.from_numpy(file["y"][::4]).float(), torch.from_numpy(file["lam"][::4]).float()
w = prox_24_triton(y, lam[:, None], out=torch.full_like(y, torch.nan))
assert relative_gap(w, prox_24_reference(y, lam.double()[:, None]), y, lam.double()).max() < GAP[torch.float32]

y = torch.tensor([[0.9547580480575562, 0.00016303927986882627, 0.00016303927986882627, 0.00016303927986882627]])
assert relative_gap(prox_24_triton(y, 1.0), prox_24(y.double(), 1.0), y, 1.0).max() < GAP[torch.float32]

y = torch.tensor([[10, 1e-40, -1e-40, 0], [1e-40, 1e-40, 1e-40, 1e-40]])
for settle in (False, True):
    w = prox_24_triton(y, torch.inf, settle=settle)
    assert torch.equal(w, torch.where(torch.tensor([True, True, False, False]), y, 0.0))

y = hard_groups(1100, seed=21).float()
for strength in (0.125, 0.75):
    want = prox_24_triton(y, strength)
    assert relative_gap(want, prox_24(y.double(), strength), y, strength).max() < GAP[torch.float32]
    inplace = y.clone()
    assert torch.equal(prox_24_triton(inplace, strength, out=inplace), want)
    columns = y.reshape(-1, 44).T.contiguous()
    assert torch.equal(prox_24_triton(columns, strength, dim=0, out=columns).T, want.reshape(-1, 44))
assert torch.equal(prox_24_triton(y, 0.75, settle=True), settle_24(y, 0.75))

together.can_go_together = lambda weight: True
y = y.clamp(-30, 30)
weights = [y[:512].reshape(32, 64), y[512:768].reshape(64, 16), y[768:].reshape(-1, 8).clone()]
scales = [torch.linspace(0.3, 3, 64), None, None]
mine, strengths, dims = [weight.clone() for weight in weights], torch.tensor([0.3, 0.7, 1.1]), [1, 0, 1]
together = ProxTogether()
together(mine, strengths, dims, scales)
assert together.launches == 3
for got, weight, strength, dim, scale in zip(mine, weights, strengths, dims, scales):
    torch.testing.assert_close(got, prox_24(weight, strength, dim=dim, scale=scale), rtol=2e-4, atol=2e-4)

from prox24_lightning.prox.triton_sums import group_sums
from prox24_lightning.sparsify.mask_codes import flipped_entries
codes = [None, None, None]
for strengths in (torch.tensor([0.3, 0.7, 1.1]), torch.tensor([0.5, 0.9, 1.2])):
    looks = together(mine, strengths, dims, scales, befores=codes)
    for look, weight, dim, scale, before in zip(looks, mine, dims, scales, codes):
        sums, code = group_sums(weight, dim=dim, scale=scale)
        assert torch.equal(look.code.movedim(dim, -1).flatten(), code) and torch.equal(look.sums[4:9], sums[4:])
        torch.testing.assert_close(look.sums[:9], sums, rtol=1e-4, atol=1e-4)
        assert before is None or look.sums[9] == flipped_entries(before, look.code)
    codes = [look.code for look in looks]

from prox24_lightning.prox.triton_kernel import critical_24_triton
from prox24_lightning.prox import critical_strength_24
torch.testing.assert_close(critical_24_triton(y), critical_strength_24(y), rtol=3e-6, atol=0.0)
sampled = together.critical(weights, dims, scales, 64)
for row, weight, dim, scale in zip(sampled, weights, dims, scales):
    assert torch.isin(row, critical_24_triton(weight, dim=dim, scale=scale)).all()

from prox24_lightning.mask import pack_mask
from prox24_lightning.mask.triton_kernel import zero_pruned_triton
for mostly_zero in (False, True):
    for values in (y[:501].clone(), y[:7, :3].bfloat16().contiguous()):
        mask = torch.rand(values.shape) < 0.5
        want = torch.where(mask, values, 0.0)
        zero_pruned_triton(values, pack_mask(mask), mostly_zero=mostly_zero)
        assert torch.equal(values, want) and not torch.signbit(values[~mask]).any()

from prox24_lightning.sparsify.statistics import weight_sums
for shape, dim in (((44, 100), 1), ((44, 100), 0), ((11, 4, 10, 10), 1)):
    for scale in (None, torch.linspace(0.3, 3, shape[-1])):
        sums, code = group_sums(y.reshape(shape), dim=dim, scale=scale)
        wanted, masks = weight_sums(y.reshape(shape), dim=dim, scale=scale)
        assert torch.equal(code, masks) and torch.equal(sums[4:], wanted[4:])
        torch.testing.assert_close(sums, wanted)
print("all good")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_kernel_in_the_interpreter():
    code = CODE.format(folder=str(Path(__file__).parents[2] / "helpers"))
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=environment, capture_output=True, text=True)
    assert run.stdout.strip() == "all good", run.stderr[-3000:]
