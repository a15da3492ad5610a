"""Let layers see their inputs as the kernels for weights of 8 bits round them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from prox24_lightning.calibration.calls.hooks import remove_all
from prox24_lightning.calibration.straight_through import round_inputs
from prox24_lightning.weights.rounding import RoundedForm


@contextmanager
def rounded_inputs(layers: Iterable[nn.Module], form: RoundedForm | None) -> Iterator[None]:
    """Round the inputs of linear layers token by token as long as the context lasts.

    Gradients pass the rounding as if it were not there (a straight-through estimate).

    Args:
        layers: whose first argument is (..., in_features).
        form: of the rounded values; None rounds nothing.
    """

    if form is None:
        yield
        return

    def rounded(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if args:
            return (rounded_like_tokens(args[0], form), *args[1:]), kwargs
        name, x = next(iter(kwargs.items()))
        return args, {**kwargs, name: rounded_like_tokens(x, form)}

    handles = [layer.register_forward_pre_hook(rounded, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        remove_all(handles)


def rounded_like_tokens(inputs: Tensor, form: RoundedForm) -> Tensor:
    """Return (..., in_features) inputs with every token rounded to ``form``, in their dtype."""
    return round_inputs(inputs, form, inputs.dtype)
