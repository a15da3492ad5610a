from __future__ import annotations

import numpy as np
import pytest
import torch
from brute import hard_groups

from prox24_lightning.prox import (
    critical_strength_24,
    penalty_24,
    prox_24,
    prox_24_reference,
    prox_path,
    settle_24,
    why_batched,
)


def weight(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    count = torch.Size(shape).numel()
    return hard_groups(count // 4, seed=count).clamp(-30, 30).to(dtype).reshape(shape)


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
def test_every_dimension_gives_the_same_as_moving_it_last(dim):
    w = weight(8, 12, 4)
    assert torch.equal(prox_24(w, 0.6, dim=dim), prox_24(w.movedim(dim, -1).contiguous(), 0.6).movedim(-1, dim))


@pytest.mark.parametrize("dim", [0, 1])
def test_non_contiguous_input(dim):
    w = weight(16, 48)[:, ::3].T
    assert torch.equal(prox_24(w, 0.6, dim=dim), prox_24(w.contiguous(), 0.6, dim=dim))


def test_a_strength_a_row():
    w = weight(6, 40)
    strength = torch.tensor([0.0, 0.1, 0.5, 1.0, 5.0, torch.inf])[:, None]
    rows = torch.stack([prox_24(row, float(s)) for row, s in zip(w, strength, strict=True)])
    assert torch.equal(prox_24(w, strength), rows)


def test_a_strength_a_group_along_dim_0():
    w = weight(8, 5)
    strength = torch.linspace(0, 2, 10).reshape(2, 5)
    want = prox_24(w.T.contiguous(), strength.T.contiguous()).T
    assert torch.equal(prox_24(w, strength, dim=0), want)


def test_strength_as_float_and_as_zero_dim_tensor():
    w = weight(16, 40)
    assert torch.equal(prox_24(w, 0.5), prox_24(w, torch.tensor(0.5, dtype=torch.float64)))


@pytest.mark.parametrize("dim", [0, 1])
def test_scale_is_the_prox_in_scaled_coordinates(dim):
    w = weight(16, 40, dtype=torch.float64)
    scale = torch.linspace(0.2, 3, w.shape[1], dtype=torch.float64)
    torch.testing.assert_close(
        prox_24(w, 0.5, dim=dim, scale=scale), prox_24_reference(w * scale, 0.5, dim=dim) / scale
    )


def test_scale_leaves_kept_entries_bit_for_bit():
    w, scale = weight(16, 40), torch.linspace(0.2, 3, 40)
    out = prox_24(w, torch.inf, scale=scale)
    assert torch.equal(out[out != 0], w[out != 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [0, 1])
def test_in_place_through_strides(dim, dtype):
    store = weight(16, 80, dtype=dtype)
    view, before = store[:, ::2], store.clone()
    want = prox_24(view.clone(), 0.7, dim=dim)
    assert prox_24(view, 0.7, dim=dim, out=view) is view
    assert torch.equal(view, want)
    assert torch.equal(store[:, 1::2], before[:, 1::2])


@pytest.mark.parametrize("operator", [prox_24, settle_24])
@pytest.mark.parametrize("shape", [(8, 0), (0, 8), (3, 0, 4)])
def test_an_empty_weight_gives_an_empty_one(operator, shape):
    weight = torch.empty(shape)
    assert operator(weight, 0.5).shape == shape
    assert operator(weight, 0.5, out=weight) is weight


def test_out_is_written_everywhere():
    w = weight(16, 40)
    out = torch.full_like(w, torch.nan)
    prox_24(w, 0.7, out=out)
    assert torch.equal(out, prox_24(w, 0.7))


def test_input_is_left_alone_and_no_graph_is_built():
    w = weight(16, 40).requires_grad_()
    before = w.detach().clone()
    result = prox_24(w, 0.7)
    assert not result.requires_grad
    assert torch.equal(w.detach(), before)


def test_a_parameter_in_place():
    w = torch.nn.Parameter(weight(16, 40))
    want = prox_24(w, 0.7)
    prox_24(w, 0.7, out=w)
    assert torch.equal(w.detach(), want)
    assert w.requires_grad
    assert w.is_leaf


@pytest.mark.parametrize("strength", [0.05, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [0, 1])
def test_extra_memory_is_at_most_four_times_the_weight(dim, dtype, strength):
    w = torch.randn(512, 4096, generator=torch.Generator().manual_seed(0)).to(dtype)[:, ::2]
    prox_24(w[:64], strength, dim=dim)
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True, acc_events=True) as profile:
        result = prox_24(w, strength, dim=dim)
    changes = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    size = w.numel() * w.element_size()
    assert result.shape == w.shape
    assert size < peak <= 4 * size


@pytest.mark.parametrize("strength", [-1.0, float("nan"), torch.tensor(-0.5), torch.tensor([[1.0], [float("nan")]])])
def test_negative_or_nan_strength_is_refused(strength):
    with pytest.raises(ValueError, match=r"strength.*must be >= 0"):
        prox_24(torch.ones(2, 4), strength)


def test_strength_of_a_wrong_shape_is_refused():
    with pytest.raises(ValueError, match="does not broadcast against the groups' shape"):
        prox_24(torch.ones(2, 8), torch.ones(3))


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(ValueError, match="prox_24 needs a float16"):
        prox_24(torch.ones(2, 4).to(dtype), 1.0)


def test_a_size_that_does_not_divide_by_four_is_refused():
    with pytest.raises(ValueError, match="does not divide by 4"):
        prox_24(torch.ones(2, 6), 1.0)


def test_a_dim_out_of_range_is_refused():
    with pytest.raises(ValueError, match="dim=2 is out of range"):
        prox_24(torch.ones(2, 8), 1.0, dim=2)


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_that_is_not_positive_is_refused(bad):
    scale = torch.ones(8)
    scale[3] = bad
    with pytest.raises(ValueError, match="scale must be positive and finite"):
        prox_24(torch.ones(2, 8), 1.0, scale=scale)


def test_a_scale_of_a_wrong_shape_is_refused():
    with pytest.raises(ValueError, match="does not broadcast to the weight's shape"):
        prox_24(torch.ones(2, 8), 1.0, scale=torch.ones(4))


@pytest.mark.parametrize("out", [torch.ones(8, 2), torch.ones(2, 8, dtype=torch.float64)])
def test_an_out_that_does_not_match_is_refused(out):
    with pytest.raises(ValueError, match="pass a tensor like the weight"):
        prox_24(torch.ones(2, 8), 1.0, out=out)


def test_the_path_is_told():
    assert prox_path(torch.ones(4)) == "batched"


def test_penalty_is_the_sum_over_triples():
    w = torch.tensor([[1.0, -2.0, 3.0, 4.0], [0.0, 5.0, 0.0, 1.0]])
    assert torch.equal(penalty_24(w, reduce="none"), torch.tensor([[50.0], [0.0]]))
    assert penalty_24(w, scale=torch.full((4,), 2.0)).item() == 400.0


def test_penalty_gradient():
    w = torch.tensor([1.0, -2.0, 3.0, 4.0], requires_grad=True)
    penalty_24(w).backward()
    assert torch.equal(w.grad, torch.tensor([26.0, -19.0, 14.0, 11.0]))


def test_penalty_refuses_an_unknown_reduce():
    with pytest.raises(ValueError, match="reduce='mean' is unknown"):
        penalty_24(torch.ones(4), reduce="mean")


def test_penalty_refuses_integers():
    with pytest.raises(ValueError, match="penalty_24 needs a real floating-point"):
        penalty_24(torch.ones(4, dtype=torch.int64))


@pytest.mark.parametrize("dim", [0, 1])
def test_settling_is_the_prox_where_it_ends_with_two_entries(dim):
    w, scale = weight(16, 40), torch.linspace(0.3, 3, 40)
    critical = critical_strength_24(w, dim=dim, scale=scale)
    strength = critical.median()
    want = prox_24(w, torch.where(critical <= strength, strength, 0.0), dim=dim, scale=scale)
    got = settle_24(w, strength, dim=dim, scale=scale)
    assert torch.equal(got, want)
    assert torch.equal(settle_24(w, 0.0, dim=dim), w)
    assert 0.3 < (got == 0).float().mean() * 2 < 0.7
    with pytest.raises(ValueError, match="strength=-1 must be >= 0"):
        settle_24(w, -1, dim=dim)


def test_compiled_is_the_same_and_one_operation():
    w = weight(16, 40)
    compiled = torch.compile(lambda w, s: prox_24(w, s, dim=0) * 2, fullgraph=True, backend="eager")
    assert torch.equal(compiled(w, torch.tensor(0.5)), prox_24(w, 0.5, dim=0) * 2)


def test_why_the_batched_path_runs():
    assert why_batched(weight(8, 8)) == "the weight is on cpu, and the fused kernel runs on CUDA GPUs"


@pytest.mark.parametrize("dim", [0, 1, (0, 1)])
@pytest.mark.parametrize("scaled", [False, True])
def test_whole_graphs_hold_the_prox_of_every_geometry(dim, scaled):
    weight = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    scale = torch.linspace(0.5, 2, 8) if scaled else None
    compiled = torch.compile(lambda w: prox_24(w, 0.6, dim=dim, scale=scale) * 2, fullgraph=True, backend="eager")
    assert torch.equal(compiled(weight), prox_24(weight, 0.6, dim=dim, scale=scale) * 2)


def test_whole_graphs_hold_settling():
    weight = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(lambda w: settle_24(w, 0.6) * 2, fullgraph=True, backend="eager")
    assert torch.equal(compiled(weight), settle_24(weight, 0.6) * 2)


TENSOR_FUNCTIONS = [
    lambda w: prox_24(w, 0.5),
    lambda w: prox_24(w, 0.5, dim=(0, 1)),
    lambda w: settle_24(w, 0.5),
    critical_strength_24,
]


@pytest.mark.parametrize("function", [*TENSOR_FUNCTIONS, penalty_24])
def test_numpy_arrays_are_refused_with_the_remedy(function):
    with pytest.raises(TypeError, match=r"takes a torch.Tensor, got numpy.ndarray; use torch.as_tensor"):
        function(np.zeros((8, 8), np.float32))


@pytest.mark.parametrize("argument", ["strength", "scale"])
def test_numpy_strengths_and_scales_are_refused_too(argument):
    arguments = {"strength": 0.1, argument: np.ones(8)}
    with pytest.raises(TypeError, match=rf"{argument} takes (a number or )?a torch.Tensor, got numpy.ndarray"):
        prox_24(torch.randn(4, 8), **arguments)
    prox_24(torch.randn(4, 8), np.float32(0.1))


@pytest.mark.parametrize("function", TENSOR_FUNCTIONS)
def test_vmap_is_refused_with_the_remedy(function):
    with pytest.raises(TypeError, match="does not run under torch.vmap; call it on the stacked weights"):
        torch.vmap(function)(torch.randn(2, 8, 8))


def test_the_penalty_runs_under_vmap():
    weights = torch.randn(3, 8, 8)
    assert torch.equal(torch.vmap(penalty_24)(weights), torch.stack([penalty_24(weight) for weight in weights]))
