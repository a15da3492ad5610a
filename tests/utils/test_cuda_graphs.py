import gc

import pytest
import torch

from prox24_lightning.solvers import solve_layer
from prox24_lightning.utils.devices.cuda_graphs import GraphedFunction, GraphedStep, GraphMemory, _log_once, capture
from tests.helpers.gpu_memory import memory_comes_back


def test_off_cuda_every_call_runs_the_step():
    value = torch.zeros(())
    run = GraphedStep(lambda: value.add_(1), torch.device("cpu"))
    for _ in range(5):
        run()
    assert value.item() == 5


@pytest.mark.gpu
def test_on_cuda_every_call_counts_and_reads_what_changed_in_between():
    value, step = torch.zeros((), device="cuda"), torch.zeros((), device="cuda")
    run = GraphedStep(lambda: value.add_(step), value.device)
    for number in range(6):
        step.fill_(number)
        run()
    assert value.item() == sum(range(6))


@pytest.mark.gpu
def test_one_graph_serves_all_arguments_of_a_form():
    total = torch.zeros(3, device="cuda")
    calls = []

    def step(inputs, factor):
        calls.append(factor)
        total.add_(inputs["x"].sum(0) * factor)

    run = GraphedFunction(step, total.device)
    expected = torch.zeros(3)
    for number in range(12):
        x = torch.full((2 + number % 2, 3), float(number))
        run({"x": x.cuda()}, 1 + number % 3)
        expected += x.sum(0) * (1 + number % 3)
    assert torch.equal(total.cpu(), expected)
    assert len(calls) == 2 * 6, "each of six forms runs twice: as written, and when it is captured"


def test_off_cuda_arguments_are_given_as_they_are():
    seen = []
    run = GraphedFunction(lambda *arguments: seen.append(arguments), torch.device("cpu"))
    given = ({"x": torch.ones(2)}, None, "text")
    run(*given)
    assert seen[0][0] is given[0]
    assert seen[0][1:] == given[1:]


@pytest.mark.gpu
def test_graphs_share_their_memory():
    """Of many layers, one after the other: torch would keep what each has used for nobody else."""
    values = torch.ones(1 << 24, device="cuda")
    reserved = []
    memory = GraphMemory()
    for _ in range(6):
        run = GraphedStep(lambda: values.mul_((values * 2 - values).mean()), values.device)
        with memory.shared():
            for _ in range(4):
                run()
        del run
        reserved.append(torch.cuda.memory_reserved())
    assert reserved[-1] == reserved[1]
    assert float(values.mean()) == 1.0
    memory.release()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() < reserved[0]


@pytest.mark.gpu
def test_a_step_that_waits_runs_as_written_and_memory_still_comes_back(caplog):
    """Torch does not end a capture that fails for its allocator, which then keeps all memory."""
    assert memory_comes_back(), "a capture of another test has not ended"
    _log_once.cache_clear()
    value = torch.ones(1 << 22, device="cuda")
    run = GraphedStep(lambda: value.mul_(2 * float(value[0])), value.device)
    with caplog.at_level("INFO"):
        for _ in range(4):
            run()
    assert float(value[0]) == 2.0**15
    assert "cannot be captured" in caplog.text
    del run
    assert memory_comes_back()


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["prox", "prox_gradient"])
def test_the_gpu_ends_at_the_loss_of_the_cpu(method):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 128, generator=generator)
    x = torch.randn(1000, 128, generator=generator) + torch.randn(1000, 1, generator=generator)
    hessian = x.T @ x / 1000
    here = solve_layer(weight, hessian, method=method)
    there = solve_layer(weight.cuda(), hessian.cuda(), method=method)
    assert there.refined_loss == pytest.approx(here.refined_loss, rel=2e-3)


@pytest.mark.gpu
def test_garbage_is_not_collected_during_a_capture():
    value = torch.zeros((), device="cuda")
    seen = []

    def step():
        ring = [torch.ones(8)]
        ring.append(ring)  # garbage that holds a tensor
        seen.append(gc.isenabled())
        value.add_(1)

    graph = capture(step, warm_ups=1)
    assert seen == [True, False]
    assert gc.isenabled()
    graph.replay()
    assert value.item() == 2
