"""One checksum for tensors, text and settings: what counts changes it, what does not leaves it."""

from __future__ import annotations

import hashlib

import pytest
import torch

from prox24_lightning.utils.checksum import checksum

TENSOR = torch.arange(12, dtype=torch.float32).view(3, 4)


def test_it_is_a_sha256():
    assert checksum(["text"]) == hashlib.sha256(b"text").hexdigest()
    assert checksum([b"te", memoryview(b"xt")]) == checksum(["text"])


def test_the_memory_layout_does_not_count():
    assert checksum([TENSOR]) == checksum([TENSOR.T.contiguous().T]) == checksum([TENSOR.clone().requires_grad_()])


def test_values_order_dtype_and_shape_count():
    others = [TENSOR + 1e-6, TENSOR.view(4, 3), TENSOR.double(), TENSOR.half(), TENSOR.bfloat16(), TENSOR[:0]]
    assert len({checksum([other]) for other in [TENSOR, *others]}) == 7
    assert checksum([TENSOR, TENSOR + 1]) != checksum([TENSOR + 1, TENSOR])


def test_the_order_of_keys_does_not_count():
    assert checksum([{"a": 1, "b": [2.5, None]}]) == checksum([{"b": [2.5, None], "a": 1}]) != checksum([{"a": 1}])


def test_parts_are_taken_one_at_a_time():
    alive = []

    def parts():
        for number in range(3):
            alive.append(number)
            yield torch.full((2,), number)
            alive.pop()

    assert checksum(parts()) == checksum([torch.full((2,), number) for number in range(3)])
    assert alive == []


def test_what_has_no_checksum_is_refused():
    with pytest.raises(TypeError, match="not JSON serializable"):
        checksum([object()])
