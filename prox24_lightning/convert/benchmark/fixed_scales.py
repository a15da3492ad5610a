"""Fixed scales of the inputs of a model's layers, measured on the inputs that the model is timed with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from prox24_lightning.convert.benchmark.settings import ExampleInputs, Settings
from prox24_lightning.convert.eligibility import named_layers
from prox24_lightning.convert.input_scales import measure_input_scales
from prox24_lightning.utils.module_copy import bare_copy, move_inputs
from prox24_lightning.weights.layer_matrix import is_transposed_linear


def fixed_input_scales(
    model: nn.Module,
    inputs: ExampleInputs | None,
    settings: Settings,
    device: torch.device,
    shared: Sequence[object] = (),
) -> dict[str, float]:
    """Return a scale for each linear layer that is called, by its name; none where the settings ask for none.

    Args:
        model: unchanged; a copy of it runs, in the dtype of the settings.
        inputs: of the model or of a module in it.
        settings: their ``form`` and ``input_quantile``.
        device: where the copy runs.
        shared: see :func:`~prox24_lightning.utils.module_copy.bare_copy`.

    Raises:
        ValueError: without inputs.
    """
    if settings.form is None or settings.input_quantile is None:
        return {}
    if inputs is None:
        raise ValueError("no call of the model was recorded, and the module has no example_input_array")
    module = bare_copy(
        dict(named_layers(model))[inputs.module_name], device=device, dtype=settings.dtype, shared=shared
    )
    args, kwargs = move_inputs((inputs.args, dict(inputs.kwargs)), device=device, dtype=settings.dtype)
    scope = f"{inputs.module_name}." if inputs.module_name else ""
    layers = {
        f"{scope}{name}": layer
        for name, layer in named_layers(module)
        if isinstance(layer, nn.Linear) or is_transposed_linear(layer)
    }
    runs = [lambda: module(*args, **kwargs)]
    return measure_input_scales(layers, runs, settings.form, quantile=settings.input_quantile)
