"""The losses of losses equal their written-out forms, in value and gradient, in every dtype and chunk."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from prox24_lightning.finetune import distillation_loss, feature_loss, logits_of, squared_error
from prox24_lightning.finetune.distillation import losses


def logits(*shape, dtype=torch.float32, seed=0):
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def written_out(student, teacher, temperature):
    q, p = (student / temperature).log_softmax(-1), (teacher / temperature).log_softmax(-1)
    return temperature**2 * (p.exp() * (p - q)).sum(-1).mean()


def value_and_gradient(loss, student):
    student = student.detach().requires_grad_()
    value = loss(student)
    (2.5 * value).backward()
    return value.detach(), student.grad


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("shape", [(7, 5), (2, 3, 11), (13,)])
def test_kl_equals_the_written_out_loss(shape, temperature):
    student, teacher = logits(*shape, dtype=torch.float64), logits(*shape, dtype=torch.float64, seed=1)
    value, gradient = value_and_gradient(lambda s: distillation_loss(s, teacher, temperature=temperature), student)
    expected, expected_gradient = value_and_gradient(lambda s: written_out(s, teacher, temperature), student)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-12)


def test_gradcheck():
    student = logits(4, 6, dtype=torch.float64).requires_grad_()
    teacher = logits(4, 6, dtype=torch.float64, seed=1)
    assert torch.autograd.gradcheck(lambda s: distillation_loss(s, teacher, temperature=2.0), student)


def test_chunks_do_not_change_the_result(monkeypatch):
    student, teacher = logits(3, 10, 8), logits(3, 10, 8, seed=1)
    whole = value_and_gradient(lambda s: distillation_loss(s, teacher), student)
    monkeypatch.setattr(losses, "_CHUNK", 8 * 7)
    parts = value_and_gradient(lambda s: distillation_loss(s, teacher), student)
    torch.testing.assert_close(parts, whole)
    monkeypatch.setattr(losses, "_CHUNK", 1)
    torch.testing.assert_close(value_and_gradient(lambda s: distillation_loss(s, teacher), student), whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits_are_compared_in_float32(dtype):
    student, teacher = logits(64, 50, dtype=dtype), logits(64, 50, dtype=dtype, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        value, gradient = value_and_gradient(lambda s: distillation_loss(s, teacher), student)
    expected, expected_gradient = value_and_gradient(lambda s: written_out(s, teacher.float(), 1.0), student.float())
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=0)
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient, expected_gradient.to(dtype), rtol=0.02, atol=1e-6)


def test_what_is_kept_for_the_backward_pass_is_one_tensor_of_the_logits_dtype():
    student, teacher = logits(32, 100, dtype=torch.bfloat16).requires_grad_(), logits(32, 100, dtype=torch.bfloat16)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        distillation_loss(student, teacher)
    assert [(t.shape, t.dtype) for t in kept] == [(student.shape, torch.bfloat16)]


def test_the_logits_are_left_as_they_are():
    student, teacher = logits(5, 7), logits(5, 7, seed=1)
    before = student.clone(), teacher.clone()
    distillation_loss(student.requires_grad_(), teacher).backward()
    assert torch.equal(student, before[0])
    assert torch.equal(teacher, before[1])


def test_equal_logits_cost_nothing_and_pull_nowhere():
    value, gradient = value_and_gradient(lambda s: distillation_loss(s, logits(6, 9) + 4.0), logits(6, 9))
    assert abs(float(value)) < 1e-6
    assert float(gradient.abs().max()) < 1e-6


def test_the_teacher_gets_no_gradient():
    teacher = logits(4, 5, seed=1).requires_grad_()
    for loss in (distillation_loss, squared_error, feature_loss):
        loss(logits(4, 5).requires_grad_(), teacher).backward()
        assert teacher.grad is None


def test_classes_that_the_teacher_rules_out_add_nothing():
    student, teacher = logits(4, 5), logits(4, 5, seed=1)
    teacher[:, 2] = -torch.inf
    value, gradient = value_and_gradient(lambda s: distillation_loss(s, teacher), student)
    p = teacher.softmax(-1)
    expected = (torch.special.xlogy(p, p) - p * student.log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(value, expected)
    assert gradient.isfinite().all()
    assert (gradient[:, 2] > 0).all()


def test_strided_logits():
    student, teacher = logits(3, 8, 6), logits(3, 8, 6, seed=1)
    value, gradient = value_and_gradient(lambda s: distillation_loss(s[:, :-1], teacher[:, :-1]), student)
    expected, expected_gradient = value_and_gradient(lambda s: written_out(s[:, :-1], teacher[:, :-1], 1.0), student)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient, expected_gradient)


def test_a_gradient_twice():
    student, teacher = logits(4, 5).requires_grad_(), logits(4, 5, seed=1)
    loss = distillation_loss(student, teacher)
    (first,) = torch.autograd.grad(loss, student, retain_graph=True)
    (second,) = torch.autograd.grad(loss, student)
    assert torch.equal(first, second)


def test_squared_error_in_float32():
    student, teacher = logits(64, 8, dtype=torch.bfloat16), logits(64, 8, dtype=torch.bfloat16, seed=1)
    assert torch.equal(squared_error(student, teacher), F.mse_loss(student.float(), teacher.float()))


def test_feature_loss_is_relative():
    teacher = logits(4, 6, 8)
    assert float(feature_loss(teacher, teacher)) == 0
    torch.testing.assert_close(feature_loss(torch.zeros_like(teacher), teacher), torch.tensor(1.0))
    torch.testing.assert_close(feature_loss(3 * teacher * 1e3, teacher * 1e3), torch.tensor(4.0))
    assert feature_loss(teacher.bfloat16(), teacher.bfloat16()).dtype == torch.float32
    torch.testing.assert_close(feature_loss(torch.zeros_like(teacher), teacher * 1e-7), torch.tensor(1.0))


def test_feature_loss_is_not_ruled_by_tokens_of_zeros():
    x = torch.randn(1000, 1, generator=torch.Generator().manual_seed(0)) * torch.tensor([[0.5, 1.0, 2.0]])
    student = torch.relu(x - 0.29).requires_grad_()
    teacher = torch.relu(x - 0.3)
    assert (teacher == 0).all(-1).float().mean() > 0.5
    loss = feature_loss(student, teacher)
    loss.backward()
    assert float(loss.detach()) < 0.01
    assert student.grad.abs().max() < 1.0
    assert float(feature_loss(torch.ones(3, 4), torch.zeros(3, 4))) == 0


def test_feature_loss_counts_every_token_alike():
    teacher = logits(2, 4, 8)
    teacher[0, 0] *= 1000
    student = teacher.clone()
    student[1, 2] = 0
    torch.testing.assert_close(feature_loss(student, teacher), torch.tensor(1 / 8))
    image = logits(2, 8, 4, 4)
    image[0] *= 1000
    torch.testing.assert_close(feature_loss(image * torch.tensor([1.0, 0]).view(2, 1, 1, 1), image), torch.tensor(0.5))
    image[0, 0] *= 1000
    student = image.clone()
    student[0, 0] = 0  # nearly all there is of its sample, a quarter of the lines along its width
    torch.testing.assert_close(feature_loss(student, image), torch.tensor(0.5))


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match=r"logits have shape \(2, 3\), the teacher's \(2, 4\)"):
        distillation_loss(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"outputs have shape \(2, 3\), the teacher's \(3,\)"):
        squared_error(torch.zeros(2, 3), torch.zeros(3))
    with pytest.raises(ValueError, match=r"hidden states have shape \(2, 3\), the teacher's \(2, 1\)"):
        feature_loss(torch.zeros(2, 3), torch.zeros(2, 1))
    with pytest.raises(ValueError, match="temperature=0 does not soften"):
        distillation_loss(torch.zeros(2, 3), torch.zeros(2, 3), temperature=0)
    with pytest.raises(ValueError, match=r"shape \(5, 1\) hold no distribution over classes"):
        distillation_loss(torch.zeros(5, 1), torch.zeros(5, 1))


def test_logits_of_every_kind_of_output():
    found = torch.randn(2, 3)
    loss, ids = torch.tensor(1.0), torch.arange(3)
    outputs = [
        found,
        SimpleNamespace(logits=found, loss=loss),
        {"loss": loss, "logits": found},
        (found, ids),
        (loss, ids, found),
        [found],
    ]
    assert all(logits_of(output) is found for output in outputs)


@pytest.mark.parametrize(
    "output, words",
    [
        ({"prediction": 1, "x": 2}, "no logits in an output of type dict with prediction, x"),
        ((torch.tensor(1.0),), "of type tuple:"),
        (None, "of type NoneType:"),
    ],
)
def test_an_output_without_logits_is_refused(output, words):
    with pytest.raises(ValueError, match=words):
        logits_of(output)
