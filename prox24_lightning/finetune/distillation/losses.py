"""Distillation losses: KL divergence of logits, squared error of outputs, relative error of hidden states."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from prox24_lightning.calibration.statistics.output_error import relative_error

_CHUNK = 1 << 24
"""Logits per chunk: float32 copies stay at 64 MiB each, whatever batch and vocabulary."""


def distillation_loss(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Return the mean over all positions of ``KL(teacher || student)``, in nats (Hinton et al., arXiv 1503.02531).

    The distributions are ``softmax(logits / temperature)`` over the last dimension. The result is multiplied by
    ``temperature ** 2``, so that gradients keep their size whatever the temperature.

    Computed in float32 (float64 for float64 logits), chunk after chunk, with the gradient in the same pass: the
    backward pass keeps one tensor of the student's shape and dtype, and there is never a float32 copy of all logits.
    The teacher gets no gradient.

    Args:
        student_logits: ``(..., classes)``.
        teacher_logits: of the same shape.
        temperature: above 0; softens both distributions.

    Returns:
        A scalar, float32 (float64 for float64 logits).

    Raises:
        ValueError: if the shapes differ, there are fewer than two classes, or ``temperature`` is not positive.
    """
    if temperature <= 0:
        raise ValueError(f"temperature={temperature} does not soften anything; it must be above 0 (1 changes nothing)")
    _check_shapes(student_logits, teacher_logits, "logits")
    if student_logits.ndim == 0 or student_logits.shape[-1] < 2:
        raise ValueError(
            f"logits of shape {tuple(student_logits.shape)} hold no distribution over classes in their last dimension; "
            "distil them with the mean squared error instead"
        )
    return _KLDivergence.apply(student_logits, teacher_logits.detach(), temperature)


class _KLDivergence(torch.autograd.Function):
    """KL divergence; at each position d KL / d student logits = (softmax(student / T) - softmax(teacher / T)) / T."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        classes = student.shape[-1]
        positions = max(1, student.numel() // classes)
        compute = torch.promote_types(student.dtype, torch.float32)
        # Divided by the number of positions only in backward: in float16 the small differences would vanish.
        difference = torch.empty_like(student, memory_format=torch.contiguous_format)
        total = student.new_zeros((), dtype=compute)
        rows = max(1, _CHUNK // classes)
        parts = (each.reshape(-1, classes).split(rows) for each in (student, teacher, difference))
        for student_part, teacher_part, difference_part in zip(*parts, strict=True):
            log_q = (student_part.to(compute) / temperature).log_softmax(-1)
            log_p = (teacher_part.to(compute) / temperature).log_softmax(-1)
            p = log_p.exp()
            # A class with teacher logit -inf adds nothing: the limit of p log p.
            total += log_p.sub_(log_q).mul_(p).masked_fill_(p == 0, 0.0).sum()
            difference_part.copy_(log_q.exp_().sub_(p))
        ctx.save_for_backward(difference)
        ctx.factor = temperature / positions
        return total * (temperature**2 / positions)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (difference,) = ctx.saved_tensors
        return difference * (grad * ctx.factor), None, None


def squared_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean squared error of outputs that are not logits (regression), in float32.

    Raises:
        ValueError: if the shapes differ.
    """
    _check_shapes(student, teacher, "outputs")
    compute = torch.promote_types(student.dtype, torch.float32)
    return (student.to(compute) - teacher.detach().to(compute)).square().mean()


def feature_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return ``||student - teacher||^2 / ||teacher||^2`` of hidden states, averaged over tokens: 1 for a zero student.

    A token is what lies along the last dimension; of images and the like, (samples, channels, height, width), it is a
    whole sample. What reads a hidden state normalises each token first: without a norm of its own for each, the few
    tokens of huge norm which language models have (arXiv 2402.17762) would be all that counts. In float32.

    Raises:
        ValueError: if the shapes differ.
    """
    _check_shapes(student, teacher, "hidden states")
    if student.dim() > 3:
        student, teacher = student.flatten(1), teacher.flatten(1)
    return relative_error(student, teacher.detach())


def logits_of(output: Any) -> Tensor:
    """Return the logits in a model's output.

    They are the output itself if it is a tensor, its attribute or entry ``logits``, or in a tuple or list the first
    floating-point tensor that is not a scalar (a scalar is a loss that the model has computed).

    Raises:
        ValueError: if there are none.
    """
    if isinstance(output, Tensor):
        return output
    for logits in (getattr(output, "logits", None), output.get("logits") if isinstance(output, Mapping) else None):
        if isinstance(logits, Tensor):
            return logits
    if isinstance(output, (tuple, list)):
        for entry in output:
            if isinstance(entry, Tensor) and entry.ndim and entry.is_floating_point():
                return entry
    held = f" with {', '.join(map(str, output))}" if isinstance(output, Mapping) else ""
    raise ValueError(
        f"no logits in an output of type {type(output).__name__}{held}: return a tensor, an object or mapping with "
        "'logits', or a tuple that begins with them"
    )


def _check_shapes(student: Tensor, teacher: Tensor, what: str) -> None:
    if student.shape != teacher.shape:
        raise ValueError(
            f"the student's {what} have shape {tuple(student.shape)}, the teacher's {tuple(teacher.shape)}: "
            "they must come from models of the same form"
        )
