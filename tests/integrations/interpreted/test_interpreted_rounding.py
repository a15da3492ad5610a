"""The Triton kernels whose last step rounds tokens to 8 bits, against their reference in plain torch.

In float16: the interpreter cuts bfloat16 off instead of rounding it. A few values of float8 are others too (it loses
the carry where they are rounded up to a power of two): a GPU test compares these.
"""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from prox24_lightning.convert.kernels.round_tokens.kernel import Rounding
from prox24_lightning.integrations.transformers.decoding import rounded_inputs, rounding_kernel

FORMS = ["fp8_e4m3", "int8"]
COLUMNS = 256  # of tokens of 192: the rest are zeros


@pytest.fixture(autouse=True)
def _on_a_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    torch.manual_seed(0)


def same(found, expected, tokens, form):
    """Scales to the last bit of float16, values nearly all to the bit."""
    size = tokens * COLUMNS
    torch.testing.assert_close(
        found[size:].view(torch.float32), expected[size:].view(torch.float32), rtol=2**-10, atol=0, equal_nan=True
    )
    away = (found[:size].int() - expected[:size].int()).abs()
    assert away.max() <= 1 or form == "fp8_e4m3"
    assert (away > 0).float().mean() < (0.05 if form == "fp8_e4m3" else 0.01)


def rounding(form, scale=0.0):
    return Rounding(form, COLUMNS, torch.tensor([scale, 0, 0, 0]))


@pytest.mark.parametrize("form", [*FORMS, None])
@pytest.mark.parametrize("adds", [True, False])
def test_add_and_norm(adds, form):
    residual, update = (torch.randn(3, 1, 192).half() for _ in range(2))
    residual[1] = residual[1] * 1e-3
    weight = torch.randn(192).half()
    given = residual, update if adds else None, weight, 1e-5, None if form is None else rounding(form)
    expected = rounded_inputs.add_norm(*given)
    found = rounding_kernel.add_norm(*given)
    torch.testing.assert_close(found[0], expected[0], rtol=2**-10, atol=0)
    assert torch.equal(found[1], expected[1])
    assert (found[1] is residual) == (not adds)
    if form is None:
        assert found[2] is expected[2] is None
    else:
        same(found[2], expected[2], 3, form)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scale", [0.0, 0.01])
def test_silu_times_up(form, scale):
    both = torch.randn(3, 1, 2 * 192).half() * 3
    both[2] = 0
    found, expected = (m.silu_multiply(both, rounding(form, scale)) for m in (rounding_kernel, rounded_inputs))
    same(found, expected, 3, form)


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("odd", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("scale", [0.0, 0.01])
def test_what_is_not_finite_stays_so(form, odd, scale):
    both = torch.ones(2, 2 * 192, dtype=torch.float16)
    both[0, 192 + 5] = odd
    found, expected = (m.silu_multiply(both, rounding(form, scale)) for m in (rounding_kernel, rounded_inputs))
    scales = found[2 * COLUMNS :].view(torch.float32)
    assert not scales[0].isfinite()
    torch.testing.assert_close(scales, expected[2 * COLUMNS :].view(torch.float32), equal_nan=True)
    assert torch.equal(found[COLUMNS : 2 * COLUMNS], expected[COLUMNS : 2 * COLUMNS])
