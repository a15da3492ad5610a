"""Catch the inputs of a model's calls, so that the whole model can be timed on them later."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from prox24_lightning.convert.benchmark.settings import ExampleInputs
from prox24_lightning.utils.tensors import map_tensors
from prox24_lightning.weights.names import clean_name


def own_example(module: nn.Module) -> ExampleInputs | None:
    """Return the ``example_input_array`` of a LightningModule; None where there is none."""
    example: Any = getattr(module, "example_input_array", None)
    if example is None:
        return None
    if isinstance(example, Mapping):
        return ExampleInputs("", (), example)
    return ExampleInputs("", example if isinstance(example, tuple) else (example,), {})


def model_inputs(model: Any, *, batch: int = 8, length: int = 128) -> ExampleInputs | None:
    """Return random inputs of a transformers model that reads tokens or images; None for others.

    Args:
        model: its config names the sizes.
        batch: sequences or images.
        length: tokens a sequence, at most those that the model has positions for.
    """
    config = model.config
    generator = torch.Generator().manual_seed(0)
    if model.main_input_name == "input_ids" and not getattr(config, "is_encoder_decoder", False):
        tokens = min(length, getattr(config, "max_position_embeddings", length))
        ids = torch.randint(3, config.vocab_size, (batch, tokens), generator=generator)
        return ExampleInputs("", (), {"input_ids": ids})
    if model.main_input_name == "pixel_values":
        size = getattr(config, "image_size", 224)
        height, width = (size, size) if isinstance(size, int) else size
        images = torch.randn(batch, getattr(config, "num_channels", 3), height, width, generator=generator)
        return ExampleInputs("", (), {"pixel_values": images})
    return None


class InputCatcher:
    """Hook the modules that contain all of ``layers``; ``inputs`` are those of the best call so far.

    Best is the outermost submodule that contains all of the layers (``model`` in a LightningModule that wraps a model,
    its head included), then the ones further in, then the root: a root refers to its trainer and loggers, which a copy
    cannot have. Nothing is hooked inside compiled code, where a hook would force a recompilation.

    Args:
        model: the root.
        layers: names of modules, without ``torch.compile``'s prefix.
    """

    def __init__(self, model: nn.Module, layers: Sequence[str]) -> None:
        self.inputs: ExampleInputs | None = None
        self._rank = float("inf")
        self._handles: list[RemovableHandle] = []
        modules: dict[str, nn.Module] = {}
        for name, module in model.named_modules():
            modules.setdefault(clean_name(name), module)  # of a compiled module and its original: the compiled one
        for depth, name in enumerate(_reachable(modules, _ancestors(layers))):
            hook = self._hook(name, float("inf") if depth == 0 else float(depth))
            self._handles.append(modules[name].register_forward_pre_hook(hook, with_kwargs=True))

    def remove(self) -> None:
        """Remove the hooks; the inputs stay."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _hook(self, name: str, rank: float) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def catch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self.inputs is not None and rank >= self._rank:
                return
            try:
                args, kwargs = map_tensors(_to_host, (args, kwargs))
            except Exception:  # an input that cannot be copied must not end a run; the report has no whole model then
                return
            self._rank = rank
            self.inputs = ExampleInputs(name, args, kwargs)

        return catch


def _to_host(tensor: Tensor) -> Tensor:
    # A copy, because a model may write into its inputs; on the CPU, where it takes no memory from the training.
    return tensor.detach().to("cpu", copy=True)


def _ancestors(layers: Sequence[str]) -> list[str]:
    """Return the names of the modules that contain all layers, the root ("") first."""
    if not layers:
        return []
    paths = [layer.split(".")[:-1] for layer in layers]
    shared = 0
    while all(len(path) > shared and path[shared] == paths[0][shared] for path in paths):
        shared += 1
    return [".".join(paths[0][:depth]) for depth in range(shared + 1)]


def _reachable(modules: dict[str, nn.Module], names: Sequence[str]) -> Iterator[str]:
    """Yield the names, from the outside inwards, of modules whose calls still reach Python."""
    for name in names:
        module = modules[name]
        if getattr(module, "_compiler_ctx", None) or getattr(module, "_compiled_call_impl", None) is not None:
            return
        yield name
        if hasattr(module, "_orig_mod"):  # the module that torch.compile returns: calls inside it do not reach Python
            return
