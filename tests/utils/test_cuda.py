import pytest
import torch

from prox24_lightning.solvers import solve_layer
from prox24_lightning.utils.devices.cuda import allows_tf32, exact_device, without_tf32


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


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_layers_are_solved_in_full_precision(precision):
    generator = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(64, 64, generator=generator), torch.randn(256, 64, generator=generator)
    hessian = inputs.T @ inputs
    found = solve_layer(weight, hessian, steps=20).weight
    torch.set_float32_matmul_precision(precision)
    assert torch.equal(solve_layer(weight, hessian, steps=20).weight, found)


def test_a_device_is_named_as_its_tensors_name_it():
    assert exact_device("cpu:0") == torch.zeros(1, device="cpu:0").device
