import pytest
import torch

from prox24_lightning.layerwise import solve_layer
from prox24_lightning.layerwise.replay import Replayed


def test_off_cuda_every_call_runs_the_step():
    value = torch.zeros(())
    run = Replayed(lambda: value.add_(1), torch.device("cpu"))
    for _ in range(5):
        run()
    assert value.item() == 5


@pytest.mark.gpu
def test_on_cuda_every_call_counts_and_reads_what_changed_in_between():
    value, step = torch.zeros((), device="cuda"), torch.zeros((), device="cuda")
    run = Replayed(lambda: value.add_(step), value.device)
    for number in range(6):
        step.fill_(number)
        run()
    assert value.item() == sum(range(6))


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["prox", "prox_gradient"])
def test_the_gpu_ends_at_the_loss_of_the_cpu(method):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 128, generator=generator)
    x = torch.randn(1000, 128, generator=generator) + torch.randn(1000, 1, generator=generator)
    moments = x.T @ x / 1000
    here = solve_layer(weight, moments, method=method)
    there = solve_layer(weight.cuda(), moments.cuda(), method=method)
    assert there.refined_loss == pytest.approx(here.refined_loss, rel=2e-3)
