"""Queries and keys that are rotated by one launch, and which are not."""

from __future__ import annotations

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from prox24_lightning.integrations.transformers.decoding.rotary import in_one_launch


def interleaved(query, key, cosine, sine):
    """Neighbours are rotated, as some models have it."""

    def rotated(x):
        return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)

    cosine, sine = cosine.unsqueeze(1), sine.unsqueeze(1)
    return query * cosine + rotated(query) * sine, key * cosine + rotated(key) * sine


def given(device, dtype=torch.bfloat16, tokens=1):
    torch.manual_seed(0)
    heads = [torch.randn(2, tokens, count, 64).to(device, dtype).transpose(1, 2) for count in (4, 2)]
    return *heads, *torch.randn(2, 2, tokens, 64).to(device, dtype)


def refused(*args, **kwargs):
    raise AssertionError("the kernel takes these")


def test_a_cpu_has_no_kernel():
    arguments = given("cpu")
    rotate = in_one_launch(refused, apply_rotary_pos_emb)
    for one, other in zip(rotate(*arguments), apply_rotary_pos_emb(*arguments), strict=True):
        assert torch.equal(one, other)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_launch_gives_the_same_bits(dtype):
    arguments = given("cuda", dtype)
    rotate = in_one_launch(apply_rotary_pos_emb, refused)
    for one, other in zip(rotate(*arguments), apply_rotary_pos_emb(*arguments), strict=True):
        assert torch.equal(one, other)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("function", "arguments"),
    [(interleaved, {}), (apply_rotary_pos_emb, {"dtype": torch.float32}), (apply_rotary_pos_emb, {"tokens": 3})],
)
def test_other_embeddings_run_as_they_are(function, arguments):
    asked = []
    arguments = given("cuda", **arguments)
    rotate = in_one_launch(function, lambda *inputs: (asked.append(1), function(*inputs))[1])
    found, expected = rotate(*arguments), function(*arguments)
    assert asked == [1]
    assert torch.equal(found[0], expected[0])
