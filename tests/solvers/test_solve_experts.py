"""Each expert is solved on the inputs of its own tokens, with those before it in the module already pruned."""

from __future__ import annotations

import pytest
import torch
from experts import EXPERTS, WIDTH, Mixture, MixtureModel, expert_weights

from prox24_lightning.calibration.expert_inputs import expert_inputs
from prox24_lightning.layerwise import prune_layerwise
from prox24_lightning.mask import is_24, mask_24
from prox24_lightning.solvers import experts as solve_module
from prox24_lightning.solvers.config import SolverConfig
from prox24_lightning.solvers.experts import solve_experts
from prox24_lightning.solvers.layer import solve_layer
from prox24_lightning.weights.experts import expert_matrices
from prox24_lightning.weights.selection import select_weights

FAST = {"steps": 10, "refine_steps": 20}


def calibrated(transposed=False, batches=3, index=None):
    torch.manual_seed(0)
    mixture = Mixture(transposed)
    inputs = [torch.randn(40, WIDTH) @ torch.randn(WIDTH, WIDTH) for _ in range(batches)]
    calls = [(x, *(mixture.route(x) if index is None else index)) for x in inputs]
    weights = [weight for weight in select_weights(mixture) if weight.is_experts]
    runs = [lambda call=call: mixture.experts(*call) for call in calls]
    return mixture, weights, runs, calls


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("method", ["prox", "sparsegpt"])
def test_each_expert_is_what_solve_layer_makes_of_it(transposed, method):
    mixture, weights, runs, calls = calibrated(transposed)
    dense = {weight.parameter_name: weight.parameter.detach().clone() for weight in weights}
    for solved in solve_experts(weights, runs, config=SolverConfig(method=method, **FAST)):
        name = solved.weight.parameter_name
        seen = [expert_inputs(mixture.experts, call, {})[name] for call in calls]
        lost, whole = 0.0, 0.0
        for expert, matrix in enumerate(expert_matrices(dense[name], solved.weight.input_dim)):
            rows = torch.cat([inputs[expert] for inputs in seen])
            expected = solve_layer(matrix, rows.T @ rows / len(rows), method=method, **FAST)
            mine = expert_matrices(solved.weight.parameter, solved.weight.input_dim)[expert]
            assert torch.allclose(mine, expected.weight, atol=1e-4)
            assert solved.tokens[expert] == len(rows)
            lost += float((rows @ (mine - matrix).T).square().sum())
            whole += float((rows @ matrix.T).square().sum())
        assert solved.solution.refined_loss == pytest.approx(lost / whole, rel=1e-3), "tokens count, not experts"
        assert torch.equal(solved.mask, solved.weight.parameter != 0)
        assert is_24(solved.weight.parameter, dim=solved.weight.dim)


def test_down_is_solved_on_what_pruned_experts_hand_on():
    mixture, weights, runs, _ = calibrated()
    orders = []
    for solved in solve_experts(weights, runs, config=SolverConfig(**FAST)):
        orders.append(solved.weight.parameter_name)
        assert is_24(mixture.experts.gate_up_proj, dim=2)
    assert orders == ["gate_up_proj", "down_proj"]


def test_fewer_hessians_at_a_time_give_the_same(monkeypatch):
    results = []
    for limit in (2**31, 1):
        monkeypatch.setattr(solve_module, "HESSIAN_BYTES", limit)
        mixture, weights, runs, _ = calibrated()
        list(solve_experts(weights, runs, config=SolverConfig(**FAST)))
        results.append({name: parameter.detach().clone() for name, parameter in expert_weights(mixture).items()})
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_an_expert_without_tokens_keeps_its_largest_weights():
    index = torch.arange(40).remainder(2)[:, None], torch.ones(40, 1)
    mixture, weights, runs, _ = calibrated(index=index)
    dense = mixture.experts.gate_up_proj.detach().clone()
    solved = next(iter(solve_experts(weights, runs, config=SolverConfig(**FAST))))
    assert solved.tokens == (60, 60, 0, 0)
    assert solved.note.startswith("2 of 4 experts saw no token: mask by magnitude")
    for expert in (2, 3):
        expected = dense[expert] * mask_24(dense[expert], dim=1)
        assert torch.allclose(mixture.experts.gate_up_proj[expert], expected)
    assert 0 < solved.solution.loss < 1


def test_block_geometry_goes_along_both_sides_of_each_matrix():
    torch.manual_seed(0)
    mixture = Mixture()
    weights = [weight for weight in select_weights(mixture, geometry="block") if weight.is_experts]
    x = torch.randn(40, WIDTH)
    for solved in solve_experts(weights, [lambda: mixture.experts(x, *mixture.route(x))], config=SolverConfig(**FAST)):
        assert is_24(solved.weight.parameter, dim=1)
        assert is_24(solved.weight.parameter, dim=2)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_whole_model_is_pruned_and_loses_less_than_by_magnitude(transposed):
    mix = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(7)) ** 3
    data = [torch.randn(4, 16, WIDTH, generator=torch.Generator().manual_seed(i)) @ mix for i in range(3)]
    losses = {}
    for method in ("magnitude", "prox"):
        model = MixtureModel(transposed=transposed)
        refine = None if method == "magnitude" else "masked_gradient"
        report = prune_layerwise(model, data, method=method, refine=refine, progress=False, **FAST)
        assert set(report.masks) == {f"blocks.{i}.{n}" for i in range(2) for n in ("proj.weight", *names())}
        for name, parameter in expert_weights(model).items():
            assert is_24(parameter, dim=report.dims[name])
            assert torch.equal(report.masks[name], parameter != 0)
        kept = {record.name: record.loss if refine is None else record.refined_loss for record in report.layers}
        losses[method] = kept["blocks.0.experts.gate_up_proj"]
    assert losses["prox"] < 0.7 * losses["magnitude"]


def names():
    return ("experts.gate_up_proj", "experts.down_proj")


def test_a_budget_and_finished_blocks_go_with_experts(tmp_path):
    data = [torch.randn(2, 8, WIDTH)]
    results = []
    for _ in range(2):  # the second run takes over what the first has finished
        model = MixtureModel()
        report = prune_layerwise(model, data, budget=0.2, work_dir=tmp_path, progress=False, **FAST)
        results.append({name: p.detach().clone() for name, p in model.named_parameters()})
        assert {record.name for record in report.layers} >= {f"blocks.{i}.{n}" for i in range(2) for n in names()}
        assert all(record.shape[0] == EXPERTS for record in report.layers if "experts" in record.name)
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
