import pytest
import torch

from prox24_lightning.calibration.statistics.hessian import HessianAccumulator


def test_the_hessian_of_two_batches_is_that_of_both():
    x, dense = torch.randn(30, 8), torch.randn(30, 8)
    found = HessianAccumulator()
    found.add(x[:10], dense[:10])
    found.add(x[10:].bfloat16().float(), dense[10:])
    assert found.tokens == 30
    torch.testing.assert_close(found.hessian, x.T @ x / 30, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(found.cross, dense.T @ x / 30, rtol=2e-2, atol=2e-2)


def test_tokens_count_by_their_weights():
    x, dense = torch.randn(3, 8), torch.randn(3, 8)
    found, repeated = HessianAccumulator(), HessianAccumulator()
    found.add(x, dense, torch.tensor([3.0, 0.0, 1.0]))
    repeated.add(x[[0, 0, 0, 2]], dense[[0, 0, 0, 2]])
    torch.testing.assert_close(3 * found.hessian, 4 * repeated.hessian)
    torch.testing.assert_close(3 * found.cross, 4 * repeated.cross)


def test_bfloat16_inputs_are_summed_in_float32():
    x = torch.full((4096, 4), 1.0, dtype=torch.bfloat16)
    found = HessianAccumulator()
    found.add(x)
    assert torch.equal(found.hessian, torch.ones(4, 4))


def test_weights_of_float16_inputs_do_not_overflow():
    x = torch.full((4, 4), 2000.0, dtype=torch.float16)
    found = HessianAccumulator()
    found.add(x, x, torch.full((4,), 4096.0))
    expected = torch.full((4, 4), 4096 * 2000.0**2)
    torch.testing.assert_close(found.hessian, expected)
    torch.testing.assert_close(found.cross, expected)


def test_a_hessian_without_inputs_is_refused():
    with pytest.raises(RuntimeError, match="no input has been counted"):
        _ = HessianAccumulator().hessian


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_hessian_of_16_bit_inputs_is_that_of_float32(dtype):
    x, dense = torch.randn(2, 3000, 64, device="cuda").to(dtype)
    found, exact = HessianAccumulator(), HessianAccumulator()
    found.add(x, dense)
    exact.add(x.double().cpu(), dense.double().cpu())
    torch.testing.assert_close(found.hessian.cpu(), exact.hessian.float(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.cross.cpu(), exact.cross.float(), rtol=1e-4, atol=1e-4)


def test_no_order_of_batches_shows_where_inputs_are_float64():
    torch.manual_seed(0)
    batches = torch.randn(32, 50, 16, dtype=torch.float64) * 10
    found = []
    for order in (batches, batches.flip(0)):
        accumulator = HessianAccumulator()
        for rows in order:
            accumulator.add(rows, rows + 1)
        found.append((accumulator.hessian, accumulator.cross))
    for one, other in zip(*found, strict=True):
        assert one.dtype == torch.float64
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)
