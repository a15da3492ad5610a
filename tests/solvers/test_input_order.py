import itertools

import pytest
import torch

from prox24_lightning.solvers.input_order.search import best_order, pruned_saliency, saliency


def random_values(rows, inputs, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(rows, inputs, generator=generator).square() * torch.rand(inputs, generator=generator)


def test_saliency_is_the_loss_of_pruning_one_weight_and_refitting_its_row():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    inputs = torch.randn(40, 6, generator=generator, dtype=torch.float64)
    hessian = inputs.T @ inputs / 40
    found = saliency(weight, hessian, damping=0.0)
    for row, column in itertools.product(range(3), range(6)):
        others = [j for j in range(6) if j != column]
        # The row's change on the other inputs that makes up best for the pruned one.
        target = inputs[:, column] * weight[row, column]
        residual = target - inputs[:, others] @ torch.linalg.lstsq(inputs[:, others], target).solution
        assert found[row, column] == pytest.approx(float(residual.square().mean()), rel=1e-9)


def test_pruned_saliency_of_a_case_by_hand():
    values = torch.tensor([[4.0, 1.0, 3.0, 2.0, 5.0, 5.0, 0.0, 1.0]])
    assert float(pruned_saliency(values)) == (1 + 2) + (0 + 1)


@pytest.mark.parametrize("seed", range(5))
def test_two_groups_get_the_best_of_all_splits(seed):
    values = random_values(7, 8, seed)
    every = [
        float(pruned_saliency(values[:, [*half, *(i for i in range(8) if i not in half)]]))
        for half in itertools.combinations(range(8), 4)
    ]
    found = values[:, best_order(values, rounds=1)]
    assert float(pruned_saliency(found)) == pytest.approx(min(every))


def test_inputs_that_the_same_rows_need_are_spread():
    """Each of eight rows needs four inputs that lie side by side: half of them would go."""
    values = torch.eye(8).repeat_interleave(4, dim=1) + 1e-3
    assert float(pruned_saliency(values)) > 15
    assert float(pruned_saliency(values[:, best_order(values)])) < 1


def test_an_order_is_a_permutation_that_keeps_to_its_runs():
    order = best_order(random_values(9, 48), runs=3)
    assert order.view(3, 16).sort(1).values.flatten().tolist() == list(range(48))


def test_the_search_repeats_and_an_odd_number_of_groups_is_fine():
    values = random_values(5, 20)
    order = best_order(values)
    assert torch.equal(order, best_order(values))
    assert sorted(order.tolist()) == list(range(20))
    assert float(pruned_saliency(values[:, order])) < float(pruned_saliency(values))


@pytest.mark.parametrize("inputs", [24, 60])
def test_no_pair_of_groups_has_a_better_split_in_the_end(inputs):
    values = random_values(6, inputs)
    values = values[:, best_order(values, rounds=400)]
    assert best_order(values, rounds=400, seed=1).tolist() == list(range(inputs))


def test_a_single_group_has_one_order():
    assert best_order(random_values(3, 8), runs=2).tolist() == list(range(8))


def test_runs_that_cut_groups_are_refused():
    with pytest.raises(ValueError, match="12 inputs in 2 runs do not divide into groups of four"):
        best_order(random_values(3, 12), runs=2)


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "inputs", "runs"), [(7, 48, 3), (70, 20, 1), (576, 1536, 1)])
def test_a_gpu_finds_the_order_of_a_cpu(rows, inputs, runs):
    # Of whole numbers sums are exact, whatever their order.
    values = torch.randint(0, 999, (rows, inputs), generator=torch.Generator().manual_seed(0)).float()
    order = best_order(values, runs=runs, rounds=20)
    assert torch.equal(best_order(values.cuda(), runs=runs, rounds=20).cpu(), order)
