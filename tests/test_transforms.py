"""Every public function of prox and mask in a whole graph of torch.compile and under vmap works or says why not."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from prox24_lightning import mask, prox
from prox24_lightning.mask import file

WORKS = ""
STACK = "call it on the stacked weights, whose groups lie along the same dimension"
MATRICES = "call it on the stacked weights, with the dimensions of the matrices"
ONE_BY_ONE = "call it on one tensor at a time"
TORCH_SAYS_IT = "must only return Tensors, got type"
"""Of functions that decide for the host: torch's own sentence names function and type."""


@dataclass(frozen=True)
class Case:
    """A call on a weight of (8, 8).

    Attributes:
        call: the function on the weight.
        whole_graph: what the error says under ``fullgraph=True``; empty where it works.
        vmap: the same under ``torch.vmap``.
    """

    call: Callable[[Tensor], Any]
    whole_graph: str = WORKS
    vmap: str = STACK


def bits(weight: Tensor) -> Tensor:
    """Packed bits of (7, 10)."""
    return (weight.flatten()[:9] > 0).to(torch.uint8) * 5


CASES = {
    "block_convergence": Case(
        lambda w: prox.block_convergence(w.reshape(4, 4, 4), 0.5, steps=2),
        "block_convergence gives Python values, which no graph holds; call it outside of the compiled function",
        ONE_BY_ONE,
    ),
    "critical_strength_24": Case(prox.critical_strength_24),
    "penalty_24": Case(prox.penalty_24, vmap=WORKS),
    "prox_24": Case(lambda w: prox.prox_24(w, 0.5)),
    "prox_24 of blocks": Case(lambda w: prox.prox_24(w, 0.5, dim=(0, 1)), vmap="does not run under torch.vmap"),
    "prox_24_reference": Case(
        lambda w: prox.prox_24_reference(w, 0.5),
        "prox_24_reference gives Python values, which no graph holds; use prox_24 there",
    ),
    "prox_block": Case(lambda w: prox.prox_block(w, 0.5), vmap=MATRICES),
    "prox_path": Case(prox.prox_path, vmap=TORCH_SAYS_IT),
    "settle_24": Case(lambda w: prox.settle_24(w, 0.5)),
    "why_batched": Case(prox.why_batched, vmap=TORCH_SAYS_IT),
    "is_24": Case(mask.is_24),
    "is_24 of blocks": Case(lambda w: mask.is_24(w, dim=(0, 1))),
    "mask_24": Case(mask.mask_24),
    "mask_24 of blocks": Case(lambda w: mask.mask_24(w, dim=(0, 1)), vmap="does not run under torch.vmap"),
    "pack_mask": Case(lambda w: mask.pack_mask(w > 0), vmap=ONE_BY_ONE),
    "transposable_mask": Case(mask.transposable_mask, vmap=MATRICES),
    "unpack_mask": Case(lambda w: mask.unpack_mask(bits(w), (7, 10)), vmap=ONE_BY_ONE),
    "violations_24": Case(
        mask.violations_24,
        "violations_24 gives Python values, which no graph holds; count there with zeros_per_group(weight) < 2",
    ),
    "zeros_per_group": Case(mask.zeros_per_group, vmap=WORKS),
    "hash_weight": Case(
        file.hash_weight,
        "hash_weight gives Python values, which no graph holds; call it outside of the compiled function",
        ONE_BY_ONE,
    ),
}
NO_FUNCTIONS = {"BlockMethod", "BlockTrace", "Violations", "MASKS_FILE", "MaskFile", "StoredMask", "MultiTensorProx"}
FILES = {"read_masks", "write_masks"}

each_case = pytest.mark.parametrize("name", CASES)


def sparse_weight() -> Tensor:
    weight = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    return weight * mask.transposable_mask(weight)


def test_every_public_function_is_here():
    named = {name.partition(" ")[0] for name in CASES}
    assert {*prox.__all__, *mask.__all__} - NO_FUNCTIONS - FILES == named


@each_case
def test_whole_graphs(name):
    case, weight = CASES[name], sparse_weight()
    torch._dynamo.reset()
    compiled = torch.compile(lambda w: (w + 1, case.call(w)), fullgraph=True, backend="eager")
    if case.whole_graph:
        with pytest.raises(torch._dynamo.exc.Unsupported, match=re.escape(case.whole_graph)):
            compiled(weight)
        return
    got, want = compiled(weight)[1], case.call(weight)
    assert type(got) is type(want)
    assert torch.equal(got, want) if isinstance(want, Tensor) else got == want


def test_a_graph_breaks_around_what_it_cannot_hold():
    weight = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    torch._dynamo.reset()
    compiled = torch.compile(lambda w: mask.violations_24(w + 0), backend="eager")
    assert compiled(weight) == mask.violations_24(weight)


@each_case
def test_vmap(name):
    case, weights = CASES[name], torch.stack([sparse_weight(), torch.randn(8, 8)])
    if case.vmap:
        with pytest.raises((TypeError, ValueError), match=re.escape(case.vmap)):
            torch.vmap(case.call)(weights)
    else:
        assert torch.equal(torch.vmap(case.call)(weights), torch.stack([case.call(weight) for weight in weights]))


@pytest.mark.parametrize("function", [prox.block_convergence, prox.prox_24_reference, mask.unpack_mask])
def test_numpy_arrays_are_refused_with_the_remedy(function):
    with pytest.raises(TypeError, match="takes a torch.Tensor, got numpy.ndarray; use torch.as_tensor"):
        function(np.zeros((4, 4)), 0.5)


WRONG = [
    (lambda w: prox.prox_24(w, None), TypeError, "strength takes a number or a torch.Tensor, got builtins.NoneType"),
    (lambda w: prox.critical_strength_24(w, dim=(0, 1)), ValueError, "takes one dimension, got dim=(0, 1): 4 x 4"),
    (
        lambda w: prox.MultiTensorProx()([w], torch.ones(1), [1], [None]),
        ValueError,
        "weight 0 cannot go with the others on cpu; use prox_24 for it",
    ),
]
SCALED = [mask.mask_24, mask.transposable_mask, prox.critical_strength_24, prox.penalty_24]


@pytest.mark.parametrize(("call", "kind", "message"), WRONG)
def test_wrong_arguments(call, kind, message):
    with pytest.raises(kind, match=re.escape(message)):
        call(sparse_weight())


@pytest.mark.parametrize("function", SCALED)
def test_a_scale_broadcasts_to_the_weight(function):
    with pytest.raises(ValueError, match=r"scale of shape \(3,\) does not broadcast to the weight's shape \(8, 8\)"):
        function(sparse_weight(), scale=torch.ones(3))
    with pytest.raises(TypeError, match="scale takes a torch.Tensor, got numpy.ndarray; use torch.as_tensor"):
        function(sparse_weight(), scale=np.ones(8))


@pytest.mark.parametrize("function", [*SCALED, mask.is_24, mask.zeros_per_group, lambda w: prox.prox_24(w, 0.5)])
def test_sparse_layouts_are_refused(function):
    with pytest.raises(ValueError, match=r"takes a tensor that holds its zeros, got torch.sparse_coo; use weight.to_d"):
        function(sparse_weight().to_sparse())


@pytest.mark.parametrize("function", [mask.mask_24, mask.transposable_mask])
def test_masks_of_weights_of_8_bits(function):
    weight = torch.randn(8, 8, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn)
    assert torch.equal(function(weight), function(weight.float()))


def test_an_export_names_what_it_cannot_hold():
    class Counted(torch.nn.Module):
        def forward(self, x):
            return x * mask.violations_24(x).count

    with pytest.raises(TypeError, match="violations_24 gives Python values, which no graph holds"):
        torch.export.export(Counted(), (sparse_weight(),))
