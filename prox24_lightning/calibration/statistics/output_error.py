"""What an error in a block's output counts: relative to the norm of each token, and by the gradients of training."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from prox24_lightning.calibration.blocks import hidden_state
from prox24_lightning.calibration.calls.hooks import after_call, remove_all
from prox24_lightning.utils.distributed import mean_over_ranks

_SMALLEST = 1e-30


def relative_error(output: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the squared error of each token relative to the token's squared norm, averaged over tokens, in float32.

    What reads a block's output normalises each token first, so that the few tokens of huge norm which language models
    have (arXiv 2402.17762) do not count for more than the others.

    Args:
        output, target: (..., features).
        weights: :func:`token_weights` of ``target``, where they are known already.
    """
    weights = token_weights(target) if weights is None else weights
    return ((_wide(output) - _wide(target)).square().sum(-1) * weights).sum()


def token_weights(target: Tensor) -> Tensor:
    """Return the weight of each token in the error, (...), one over its squared norm; ``target`` is (..., features).

    Norms have a floor, by the median of the tokens that are not zero. A token of zeros (padding, a dead ReLU) has no
    norm to be relative to and counts as that median does; where all are zero, none counts.
    """
    squared_norm = _wide(target).square().sum(-1)
    median = squared_norm.masked_fill(squared_norm == 0, torch.nan).nanmedian().nan_to_num()
    floor = (1e-3 * median).clamp_min(torch.finfo(squared_norm.dtype).tiny)
    weights = 1 / (torch.where(squared_norm == 0, median, squared_norm).clamp_min(floor) * squared_norm.numel())
    return torch.where(median > 0, weights, 0.0)


def bounded_token_weights(outputs: Tensor) -> Tensor:
    """Return what each token's squared error in a layer's outputs counts, (tokens,), at most 1.

    A token whose squared norm is above the median counts relative to that norm. The few tokens of huge norm that
    language models have (arXiv 2402.17762) would else be almost the whole loss of single layers: a solver pays for
    them with the outputs of all others.

    Args:
        outputs: (tokens, out_features).
    """
    squared_norm = _wide(outputs).square().sum(-1)
    median = squared_norm.masked_fill(squared_norm == 0, torch.nan).nanmedian()
    return (median / squared_norm).clamp_max(1).nan_to_num(1)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class OutputGradients:
    """Mean squared gradient of the training loss by each feature of a module's output, over tokens and batches.

    To second order the loss grows by the squared errors of the output times the Fisher information, whose diagonal
    this is (arXiv 2102.05426, section 3.3); it costs no pass of its own. Each batch counts the same, whatever the scale
    of its loss. A graph that was compiled around the whole model does not see the hook: nothing is gathered then.

    Args:
        name: of the module.
        module: hooked from :meth:`begin_batch` to :meth:`end_batch`.
        feature_dim: along which dimension of an output features lie.
        total: of an earlier run.

    Attributes:
        total: (features,) float32, sum over batches; None before the first, and again when their number changes.
    """

    def __init__(
        self, name: str, module: nn.Module, feature_dim: Callable[[Tensor], int], total: Tensor | None = None
    ) -> None:
        self.name = name
        self.total = total
        self._feature_dim = feature_dim
        self._module = module
        self._handle: RemovableHandle | None = None

    def begin_batch(self) -> None:
        """A training batch begins: its gradients count."""
        if self._handle is None:
            self._handle = after_call(self._module, self._listen)

    def end_batch(self) -> None:
        """The training batch has ended."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def weights(self, features: int, device: torch.device) -> Tensor:
        """What a unit of squared error in each feature counts: (features,), mean 1; the same on every rank."""
        return mean_over_ranks(self.own_weights(features, device))

    def own_weights(self, features: int, device: torch.device) -> Tensor:
        """Return :meth:`weights` by the batches of this rank alone."""
        found = torch.ones(features, device=device)
        if self.total is not None and self.total.numel() == features:
            found = self.total.to(device)
        return found / found.mean().clamp_min(_SMALLEST)

    def _listen(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        if not torch.is_grad_enabled():
            return
        with suppress(ValueError):  # an output of another kind: such a block is not reconstructed
            if (hidden := hidden_state(output, self.name)).requires_grad:
                hidden.register_hook(self._add)

    def _add(self, gradient: Tensor) -> None:
        squares = gradient.detach().float().movedim(self._feature_dim(gradient), -1).flatten(0, -2).square().mean(0)
        # A step that a gradient scaler will skip has gradients that are not finite.
        squares = torch.nan_to_num(squares / squares.mean().clamp_min(_SMALLEST), 0.0, 0.0, 0.0)
        fits = self.total is not None and self.total.shape == squares.shape
        self.total = self.total.to(squares) + squares if fits and self.total is not None else squares


def token_importance(
    layers: Iterable[nn.Module], output_of: Callable[[], Tensor], gradients: OutputGradients | None = None
) -> dict[nn.Module, list[Tensor]]:
    """Return what an error at each token of a layer's output counts for :func:`relative_error` of the block's output.

    To second order the error grows by ``||J_t d||^2`` for an error ``d`` of the layer's output at token ``t``, with the
    Jacobian ``J_t`` from there to the block's output. A random sign at each entry of the output, sent back through the
    block, measures ``||J_t||^2`` without bias (Hutchinson's estimator): one backward pass, whatever the number of
    layers.

    Args:
        layers: linear layers and convolutions inside the block.
        output_of: calls the block under gradients and returns its output, (..., features).
        gradients: what features of the output count by; None is the same for all.

    Returns:
        for each layer one tensor a call, (tokens,) in the order of
        :func:`~prox24_lightning.weights.layer_matrix.input_rows`, with mean 1 over all calls; ones where no gradient
        reaches the layer, or one that is not finite.

    Raises:
        ValueError: if the block's output has no gradient at all.
    """
    found: dict[nn.Module, list[Tensor]] = {layer: [] for layer in layers}

    def note(layer: nn.Module, args: tuple, output: Tensor) -> Tensor:
        # A leaf where nothing before it asks for gradients; a copy goes on, which an activation may overwrite.
        found[layer].append(output if output.requires_grad else output.detach().requires_grad_())
        return found[layer][-1].clone()

    handles = [layer.register_forward_hook(note) for layer in found]
    try:
        with torch.enable_grad():
            target = output_of()
    finally:
        remove_all(handles)
    if not target.requires_grad:
        raise ValueError(
            "its output has no gradient, as under torch.no_grad or in a reentrant checkpoint (checkpoint with "
            "use_reentrant=False)"
        )
    generator = torch.Generator(target.device).manual_seed(0)
    signs = torch.randint(2, target.shape, generator=generator, device=target.device) * 2.0 - 1.0
    weights = token_weights(target.detach()).unsqueeze(-1) * target.shape[:-1].numel()
    if gradients is not None:
        weights = weights * gradients.own_weights(target.shape[-1], target.device)
    sent = (signs * weights.sqrt()).to(target.dtype)
    outputs = [output for layer_outputs in found.values() for output in layer_outputs]
    sent_back = iter(torch.autograd.grad(target, outputs, sent, materialize_grads=True))
    result = {}
    for layer, layer_outputs in found.items():
        squares = [_squares_of_tokens(layer, next(sent_back)) for _ in layer_outputs]
        mean = torch.cat(squares).mean() if squares else target.new_zeros(())
        counts = bool(mean.isfinite()) and bool(mean > 0)
        result[layer] = [square / mean if counts else torch.ones_like(square) for square in squares]
    return result


def _squares_of_tokens(layer: nn.Module, gradient: Tensor) -> Tensor:
    spatial = len(layer.kernel_size) if isinstance(layer, (nn.Conv1d, nn.Conv2d)) else 0
    return _wide(gradient).square().sum(-1 - spatial).flatten()
