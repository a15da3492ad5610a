"""The input second moment of layers, the diagonal of the Hessian, as a running mean over training batches.

The prox and the masks can work in coordinates scaled by the root mean square of the inputs. There a weight
counts by what it contributes to the layer's output (the diagonal of H = X^T X / tokens) rather than by its
bare magnitude.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from prox24_lightning.calibration.calls.eager_code import EagerCode, inside_compiled, inside_whole_graphs
from prox24_lightning.calibration.calls.hooks import before_call
from prox24_lightning.calibration.expert_inputs import expert_inputs
from prox24_lightning.utils.distributed import world_size
from prox24_lightning.weights.layer_matrix import is_transposed_linear
from prox24_lightning.weights.selection import GroupedWeight
from prox24_lightning.weights.sharded import gathered, local_part, part_of

log = logging.getLogger(__name__)

SCALE_FLOOR = 1e-3
"""Smallest scale relative to the layer's rms input; an input that never fires must not divide by zero."""


class InputSecondMoments:
    """Running mean square of every input channel of the layers that hold ``weights``.

    Forward pre-hooks sum x^2 over all tokens (or pixels) of the batches that pass while :attr:`collecting` is
    True and gradients are enabled, so validation is not counted. :meth:`fold` averages the sums over the ranks of
    a distributed run and mixes them into the running mean. Memory: two float32 vectors of a layer's input size.

    Args:
        weights: where to look.
        decay: share of the old mean that stays at each fold, in [0, 1).
        model: what holds the weights, if parts of it may be compiled.
    """

    def __init__(self, weights: Sequence[GroupedWeight], *, decay: float = 0.9, model: nn.Module | None = None) -> None:
        self.weights = {weight.name: weight for weight in weights}
        self.decay = decay
        self._model = model
        self._compiled: set[nn.Module] = set()
        self._in_whole_graphs = False
        self._eager = EagerCode()
        self._attached = self._collecting = False
        self._mean: dict[str, Tensor] = {}
        self._scale: dict[str, Tensor] = {}
        self._sum: dict[str, Tensor] = {}
        self._count: dict[str, Tensor] = {}
        self._handles: dict[nn.Module, RemovableHandle] = {}
        self._unobservable: set[nn.Module] = set()

    @property
    def collecting(self) -> bool:
        """Whether the inputs of the batch that now passes are summed up; set when it begins and ends."""
        return self._collecting

    @collecting.setter
    def collecting(self, collecting: bool) -> None:
        self._collecting = collecting
        if not self._attached:
            return
        if collecting:
            self._hook(weight.module for weight in self.weights.values())
            if self._in_whole_graphs:
                self._eager.begin()
        else:
            self._eager.end()
            self._unhook(module for module in self._handles if module not in self._compiled)

    def attach(self) -> None:
        """Register the hooks that compiled code has to find; those of other modules are there while it collects."""
        if not self._attached:
            self._scale.clear()
        self._attached = True
        if self._model is not None:
            whole = inside_whole_graphs(self._model)
            self._in_whole_graphs = any(weight.module in whole for weight in self.weights.values())
            self._compiled = inside_compiled(self._model) - whole
        self._hook(weight.module for weight in self.weights.values() if weight.module in self._compiled)

    def _hook(self, modules: Iterable[nn.Module]) -> None:
        for module in modules:
            if module in self._handles:
                continue
            weights = [weight for weight in self.weights.values() if weight.module is module]
            experts = [weight for weight in weights if weight.is_experts]
            listener = self._expert_hook(experts) if experts else partial(self._listen, [w.name for w in weights])
            self._handles[module] = before_call(module, listener)

    def _unhook(self, modules: Iterable[nn.Module]) -> None:
        for module in list(modules):
            self._handles.pop(module).remove()

    def _listen(self, names: Sequence[str], module: nn.Module, args: tuple, kwargs: dict) -> None:
        if not self.collecting or not torch.is_grad_enabled() or module in self._unobservable:
            return
        try:
            for name in names:
                self._collect(name, module, args, kwargs)
        except Exception as error:  # an input of another kind must not end the training
            self._unobservable.add(module)
            log.warning("the inputs of %s are not counted: %s", names[0], error)

    def _expert_hook(self, weights: Sequence[GroupedWeight]) -> Callable[[nn.Module, tuple, dict], None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            if module in self._unobservable or not (self.collecting and torch.is_grad_enabled()):
                return
            try:
                found = expert_inputs(module, args, kwargs)
            except Exception as error:  # a user's forward, which may not bear to run twice, must not end the training
                self._unobservable.add(module)
                log.warning(
                    "%s cannot be run once more: its experts are pruned by magnitude (%s)", weights[0].name, error
                )
                return
            for weight in weights:
                if weight.parameter_name in found:
                    self._add(weight.name, *_expert_squares(weight, found[weight.parameter_name]))

        return hook

    def detach(self) -> None:
        """Remove the hooks and drop the sums that were not folded in."""
        self._collecting = self._attached = False
        self._eager.end()
        self._unhook(self._handles)
        self._sum.clear()
        self._count.clear()

    @torch.no_grad()
    def _collect(self, name: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        inputs = _layer_input(module, args, kwargs)
        if inputs is None:
            return
        flat = gathered(inputs)
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            spatial = len(module.kernel_size)
            flat = flat.movedim(-spatial - 1, -1)
        flat = flat.reshape(-1, flat.shape[-1])
        squares = torch.linalg.vector_norm(flat, dim=0, dtype=_wide(flat)).square_().float()
        self._add(name, squares, squares.new_full((), flat.shape[0]))  # filled there: a copy would wait for the device

    def _add(self, name: str, squares: Tensor, count: Tensor) -> None:
        """Add sums of squares, (in_features,) or of experts (experts, in_features), of ``count`` tokens."""
        # A batch of NaN, whose step the user or a gradient scaler skips, would stay in the running mean for ever.
        finite = torch.isfinite(squares).all()
        squares, count = squares.where(finite, 0.0), finite * count
        if name in self._sum:
            self._sum[name] += squares
            self._count[name] += count
        else:
            self._sum[name] = squares
            self._count[name] = count

    @torch.no_grad()
    def fold(self) -> None:
        """Mix what was summed since the last fold into the running mean, the same on every rank."""
        if world_size() > 1:
            means = self._means_over_ranks()
        else:
            means = {name: self._mean_of(name, total, self._count[name]) for name, total in self._sum.items()}
        known = [name for name in means if name in self._mean]
        if known:  # all layers in one launch
            olds = [self._mean[name].to(means[name].device) for name in known]
            torch._foreach_lerp_([means[name] for name in known], olds, self.decay)
        self._mean.update(means)
        self._sum.clear()
        self._count.clear()
        self._scale.clear()

    def _means_over_ranks(self) -> dict[str, Tensor]:
        """Mean squares over all ranks, from one call; a rank that saw no input of a layer adds zeros."""
        parts: list[Tensor] = []
        for name, weight in self.weights.items():
            device = local_part(weight.parameter).device
            if name in self._sum:
                parts += [self._sum[name], self._count[name]]
                continue
            rows = [len(weight.parameter)] if weight.is_experts else []
            parts.append(torch.zeros(*rows, _input_size(weight), device=device))
            parts.append(torch.zeros([*rows, 1] if rows else [], device=device))
        flat = torch.cat([part.flatten() for part in parts])
        dist.all_reduce(flat)
        reduced = flat.split([part.numel() for part in parts])
        totals = _pairs([part.view_as(like) for part, like in zip(reduced, parts, strict=True)])
        return {name: self._mean_of(name, *found) for name, found in zip(self.weights, totals, strict=True)}

    def _mean_of(self, name: str, total: Tensor, count: Tensor) -> Tensor:
        """Return the mean squares; an expert that saw no token keeps what was known of it."""
        mean = total / count.clamp_min(1.0)
        old = self._mean.get(name)
        return mean if old is None or not count.dim() else mean.where(count > 0, old.to(mean))

    def scale(self, name: str) -> Tensor | None:
        """Root mean square of each input, relative to the layer's (the expert's) own, to broadcast against the weight.

        Returns:
            float32 tensor, positive, mean square one; of a sharded weight what belongs to this rank's part. None when
            no usable input of that layer has been seen.
        """
        if name not in self._scale and (mean := self._mean.get(name)) is not None:
            whole = mean.mean(-1, keepdim=True)
            relative = (mean / whole.clamp_min(torch.finfo(mean.dtype).tiny)).sqrt().clamp_min(SCALE_FLOOR)
            relative = relative.where(whole > 0, 1.0) if mean.dim() > 1 else relative
            parameter = self.weights[name].parameter
            self._scale[name] = part_of(_broadcast(self.weights[name], relative), parameter)
        return self._scale.get(name)

    def missing(self) -> list[str]:
        """Names of the weights whose layer's inputs have never been seen."""
        return [name for name in self.weights if name not in self._mean]

    def state_dict(self) -> dict[str, Any]:
        return {"mean": dict(self._mean)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._mean = {
            name: mean.to(local_part(self.weights[name].parameter).device)
            for name, mean in state["mean"].items()
            if name in self.weights
        }
        self._scale.clear()


def _layer_input(module: nn.Module, args: tuple, kwargs: dict) -> Tensor | None:
    """The tensor that the layer's weight multiplies, or None if there is no single one."""
    if isinstance(module, nn.MultiheadAttention):
        query, key, value = (args + tuple(kwargs[k] for k in ("query", "key", "value") if k in kwargs))[:3]
        return query if query is key and key is value else None
    inputs = args[0] if args else next(iter(kwargs.values()), None)
    return inputs if isinstance(inputs, Tensor) else None


def _input_size(weight: GroupedWeight) -> int:
    shape = weight.parameter.shape
    if weight.is_experts:
        return shape[weight.input_dim]
    if isinstance(weight.module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return weight.module.in_channels
    return shape[0] if is_transposed_linear(weight.module) else shape[1]


def _expert_squares(weight: GroupedWeight, inputs: Mapping[int, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the sum of squares of each expert's inputs, (experts, in_features), and its tokens, (experts, 1)."""
    squares = torch.zeros(len(weight.parameter), _input_size(weight), device=weight.parameter.device)
    tokens = torch.zeros(len(squares), 1)
    for expert, rows in inputs.items():
        squares[expert] = torch.linalg.vector_norm(rows, dim=0, dtype=_wide(rows)).square_().float()
        tokens[expert] = len(rows)
    return squares, tokens.to(squares.device, non_blocking=True)


def _broadcast(weight: GroupedWeight, scale: Tensor) -> Tensor:
    module, parameter = weight.module, weight.parameter
    if weight.is_experts:
        return scale.unsqueeze(3 - weight.input_dim)
    if is_transposed_linear(module):
        return scale.unsqueeze(-1)
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        # The filters of a grouped convolution see one slice of the channels each.
        rows = scale.view(module.groups, -1).repeat_interleave(module.out_channels // module.groups, dim=0)
        rows = rows if module.groups > 1 else rows[:1]
        return rows.view(*rows.shape, *[1] * (parameter.dim() - 2))
    return scale.unsqueeze(0)


def _pairs(parts: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    return [(parts[i], parts[i + 1]) for i in range(0, len(parts), 2)]


def _wide(tensor: Tensor) -> torch.dtype:
    """The dtype to sum in: float32, or float64 for tensors of that."""
    return torch.promote_types(tensor.dtype, torch.float32)
