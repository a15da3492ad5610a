import pytest
import torch

from prox24_lightning.utils.cuda import allows_tf32, without_tf32


@pytest.fixture(autouse=True)
def restored():
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_tf32_is_off_inside_and_as_it_was_outside(precision):
    torch.set_float32_matmul_precision(precision)
    assert allows_tf32() is (precision != "highest")
    with without_tf32():
        assert not allows_tf32()
    assert allows_tf32() is (precision != "highest")
    assert torch.get_float32_matmul_precision() == precision


@pytest.mark.gpu
def test_products_inside_are_whole():
    torch.set_float32_matmul_precision("high")
    matrix = torch.randn(512, 512, device="cuda")
    exact = matrix.double() @ matrix.double()
    rounded = (matrix @ matrix - exact).abs().max()
    with without_tf32():
        whole = (matrix @ matrix - exact).abs().max()
    assert float(whole) < 0.02 * float(rounded)
