"""A teacher is a frozen copy; its checksum knows every weight; it is asked for outputs, not for losses."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from prox24_lightning.finetune import frozen_copy, memory_bytes, same_weights, weights_checksum
from prox24_lightning.finetune.distillation.teacher import teacher_kwargs


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 4), nn.BatchNorm1d(4))


def test_the_copy_is_frozen_and_apart():
    student = net()
    student[0].register_forward_hook(lambda *_: pytest.fail("the hook came along"))
    teacher = frozen_copy(student)
    x = torch.randn(3, 8)
    before = teacher(x)
    with torch.no_grad():
        for value in (*student.parameters(), *student.buffers()):
            value.add_(1)
    assert torch.equal(teacher(x), before)
    assert not any(value.requires_grad for value in teacher.parameters())
    assert not any(module.training for module in teacher.modules())
    assert student.training
    assert all(value.requires_grad for value in student.parameters())


def test_a_compiled_student_gives_an_eager_copy_of_what_is_inside():
    student = net()
    whole = torch.compile(student, backend="eager")
    student[0].compile(backend="eager")
    teacher = frozen_copy(whole)
    assert type(teacher) is nn.Sequential
    assert teacher[0]._compiled_call_impl is None
    assert weights_checksum(teacher) == weights_checksum(whole) == weights_checksum(student)


@pytest.mark.parametrize("compiled", [True, False])
def test_a_forward_set_on_the_instance_does_not_lead_back_to_the_student(compiled):
    student = net()
    original = student[0].forward
    student[0].forward = torch.compile(original, backend="eager") if compiled else lambda x: original(x)
    teacher, x = frozen_copy(student), torch.randn(2, 8)
    before = teacher(x)
    with torch.no_grad():
        student[0].weight.zero_()
    assert torch.equal(teacher(x), before)


def test_caches_of_the_copy_are_off():
    student = net()
    student.config = SimpleNamespace(use_cache=True)
    assert frozen_copy(student).config.use_cache is False
    assert student.config.use_cache is True


@pytest.mark.parametrize("layer", [lambda: nn.LazyLinear(4), lambda: nn.Linear(8, 4, device="meta")])
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_weights_without_values_are_refused(layer):
    with pytest.raises(ValueError, match=r"1\.weight has no values yet"):
        frozen_copy(nn.Sequential(nn.ReLU(), layer()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_checksum_sees_every_bit(dtype):
    first, second = net().to(dtype), net().to(dtype)
    assert weights_checksum(first) == weights_checksum(second)
    assert same_weights(first, second)
    with torch.no_grad():
        second[2].bias[3] = torch.nextafter(second[2].bias[3], torch.tensor(torch.inf, dtype=dtype))
    assert weights_checksum(first) != weights_checksum(second)
    assert not same_weights(first, second)


def test_the_checksum_sees_buffers_dtypes_and_names():
    first = net()
    sums = {weights_checksum(first)}
    first[3].running_mean[0] = 1
    sums.add(weights_checksum(first))
    sums.add(weights_checksum(nn.Sequential(first)))
    sums.add(weights_checksum(first.double()))
    assert len(sums) == 4


def test_memory_counts_tied_weights_once():
    tied = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8, affine=False))
    tied[1].weight = tied[0].weight
    assert memory_bytes(tied) == 8 * 8 * 4 + 2 * 8 * 4 + 8


class Optional(nn.Module):
    def forward(self, x, labels=None):
        return x


class Anything(nn.Module):
    def forward(self, **inputs):
        return inputs


class Required(nn.Module):
    def forward(self, x, labels):
        return x


@pytest.mark.parametrize("teacher, kept", [(Optional(), {"x"}), (Anything(), {"x"}), (Required(), {"x", "labels"})])
def test_labels_are_left_out_where_the_teacher_works_without(teacher, kept):
    assert set(teacher_kwargs(teacher, {"x": 1, "labels": 2})) == kept
