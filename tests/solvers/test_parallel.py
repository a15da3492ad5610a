"""Two processes share out the solution of a layer, and end with what one process finds."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from new_processes import spawn

from prox24_lightning.calibration.statistics.expert_hessians import ExpertHessians
from prox24_lightning.mask import is_24
from prox24_lightning.solvers.config import SolverConfig
from prox24_lightning.solvers.experts import _solve_shared_out
from prox24_lightning.solvers.layer import solve
from prox24_lightning.solvers.linear_algebra.inverses import shifted_inverses
from prox24_lightning.solvers.parallel import solve_on_all_ranks
from prox24_lightning.weights.selection import GroupedWeight

pytestmark = pytest.mark.slow

CONFIGS = {
    "prox": SolverConfig(steps=20),
    "odd levels": SolverConfig(steps=7),
    "sparsegpt": SolverConfig(method="sparsegpt"),
    "not refined": SolverConfig(method="wanda", refine=None),
    "column": SolverConfig(steps=10),
}
RHOS = [0.01 * 1.5**level for level in range(5)]


def layer(rows=7):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(64, 16, generator=generator) @ torch.randn(16, 16, generator=generator)
    return torch.randn(rows, 16, generator=generator), inputs.T @ inputs / 64


def solved(name, solve_layer):
    weight, hessian = layer(8 if name == "column" else 7)
    return solve_layer(weight, hessian, CONFIGS[name], dim=0 if name == "column" else -1)


def experts():
    generator = torch.Generator().manual_seed(1)
    module = torch.nn.Module()
    module.stack = torch.nn.Parameter(torch.randn(3, 8, 16, generator=generator))
    weight = GroupedWeight("stack", "experts", module, "stack", -1)
    hessians = ExpertHessians(range(3))
    hessians.add({expert: torch.randn(32, 16, generator=generator) for expert in (0, 2)})
    return _solve_shared_out(weight, module.stack.detach(), hessians, SolverConfig(steps=10))


def words_of(action):
    try:
        action()
    except ValueError as error:
        return str(error)
    return "no error"


def spoilt(rows):
    """Rows of the second rank alone are not finite."""
    return rows * float("nan") if dist.get_rank() else rows


def work(rank, folder):
    dist.init_process_group("gloo")
    found = {name: vars(solved(name, solve_on_all_ranks)) for name in CONFIGS}
    _, hessian = layer()
    found["inverses"] = [inverse.clone() for inverse in shifted_inverses(hessian, RHOS, shared=True)]
    found["experts"] = vars(experts())
    weight, hessian = layer()
    config = CONFIGS["prox"]
    found["one row"] = vars(solve_on_all_ranks(weight[:1], hessian, config))
    words = {
        "target": words_of(lambda: solve_on_all_ranks(weight, hessian, config, name="w", target=spoilt)),
        "keep": words_of(lambda: solve_on_all_ranks(half_sparse(), hessian, SolverConfig(method="keep"), name="w")),
        "inverse": words_of(lambda: list(shifted_inverses(-hessian * 1e30, RHOS, name="w", shared=True))),
    }
    torch.save({"found": found, "words": words}, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


def half_sparse():
    """A weight of which only the first rank's rows are 2:4."""
    weight, _ = layer(8)
    weight[:4, ::2] = 0
    return weight


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel")
    spawn(work, folder)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


def assert_alike(found, expected):
    for name in ("weight", "mask", "zero_losses", "losses", "refined_losses"):
        one, other = found[name], getattr(expected, name)
        assert (one is None) == (other is None)
        if other is not None:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, msg=name)
    assert found["reached"] == pytest.approx(expected.reached)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_layer(ranks, name):
    expected = solved(name, solve)
    for rank in ranks:
        assert_alike(rank["found"][name], expected)
        assert is_24(rank["found"][name]["weight"], dim=0 if name == "column" else -1)
    assert torch.equal(*(rank["found"][name]["weight"] for rank in ranks))


def test_a_layer_of_fewer_rows_than_ranks(ranks):
    weight, hessian = layer()
    expected = solve(weight[:1], hessian, CONFIGS["prox"])
    for rank in ranks:
        assert_alike(rank["found"]["one row"], expected)


def test_inverses(ranks):
    _, hessian = layer()
    for rank in ranks:
        for rho, inverse in zip(RHOS, rank["found"]["inverses"], strict=True):
            torch.testing.assert_close(inverse @ (hessian + rho * torch.eye(16)), torch.eye(16), rtol=0, atol=1e-4)


def test_experts_of_which_one_saw_no_token(ranks):
    expected = experts()
    for rank in ranks:
        assert_alike(rank["found"]["experts"], expected)


@pytest.mark.parametrize(
    "case, words",
    [
        ("target", "w: the weight holds values that are not finite"),
        ("keep", "w: method='keep' keeps the zeros of a 2:4 weight"),
        ("inverse", "w: the Hessian has no Cholesky factor"),
    ],
)
def test_what_one_rank_finds_wrong_is_raised_on_both(ranks, case, words):
    for rank in ranks:
        assert words in rank["words"][case]
