"""Classify the tensors that optimizers keep for a weight: elementwise moments, copies of the weight, and others.

Masks reach moments and copies, and the values that a prox or a solver writes into a weight reach its copies: otherwise
fp32 masters, Lookahead's slow weights or schedule-free's ``z`` bring the old values back, whether they lie in the
state, in an attribute or in the place of the weights. Preconditioners, factored and projected statistics are left
alone: a zero there has another meaning, and the mask of the weight after each step is enough. Names decide where they
are known, else shapes and values do.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from prox24_lightning.finetune.optimizers import copies_in_attributes, wrapped_optimizers
from prox24_lightning.weights.sharded import local_part

Kind = Literal["moment", "copy", "other"]

# fmt: off
MOMENTS = frozenset({
    "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_avg_var", "max_exp_avg_var", "exp_avg_diff", "exp_avg_slow",
    "exp_avg_fast", "exp_inf", "momentum", "momentum_buffer", "slow_momentum", "square_avg", "grad_avg", "acc_delta",
    "sum", "prev", "previous_grad", "hessian", "state1", "state2", "kahan_comp",
})
"""Elementwise statistics of gradients: zero where the weight is pruned."""

COPIES = frozenset({
    "z", "x0", "p0", "x_k", "ax", "ema", "shadow", "param_exp_avg", "param_buffer", "prev_param", "old_p",
    "slow_param", "slow_params", "slow_buffer", "slow_weights", "cached_params", "lookahead_params", "backup_params",
    "trac", "master", "master_param", "master_params", "master_weight", "fp32_param", "fp32_master",
})
"""Points in the space of the weight: masters, averages, slow, earlier and initial weights."""
# fmt: on

_NEAR = 0.5
"""A tensor of unknown name at less than this relative distance from its weight is a copy of it."""
_VERY_NEAR = 0.1
"""The same for names that mean moments elsewhere (AccSGD's momentum_buffer is an average of weights)."""


class OptimizerState:
    """The state of an optimizer and of those that it wraps, by what it means for each weight.

    Kinds are determined again whenever the state has grown, since most optimizers fill it in their first step.

    Args:
        optimizer: the outermost one.
        masters: parameter -> the tensor that is trained in its place, as :func:`masters_of` returns them.
    """

    def __init__(self, optimizer: Optimizer, masters: Mapping[Tensor, Tensor] | None = None) -> None:
        self._parts = wrapped_optimizers(optimizer)
        self._parameters = {master: parameter for parameter, master in (masters or {}).items()}
        self._outside = [(parameter, master) for master, parameter in self._parameters.items()]
        self._outside += copies_in_attributes(self._parts, self._parameters)
        self._kinds: dict[str, Kind] = {}
        self._size: list[tuple[int, int]] = []

    @property
    def kinds(self) -> Mapping[str, Kind]:
        """What each entry of the state means, by its key."""
        size = [_size(state) for state in self._states()]
        if size != self._size:
            self._kinds, self._size = _kinds(self._entries()), size
        return self._kinds

    @property
    def has_copies(self) -> bool:
        """Whether copies of weights are in the state."""
        return "copy" in self.kinds.values()

    def mask(self, parameters: Mapping[Tensor, Tensor], *, copies_alone: bool = False) -> None:
        """Zero the pruned entries of moments and copies.

        Args:
            parameters: parameter -> mask of this rank's part, bool, True stays.
            copies_alone: leave moments as they are.
        """
        kinds = self.kinds
        for parameter, key, value, state in self._entries():
            mask = parameters.get(parameter)
            if mask is None or kinds.get(key) not in (("copy",) if copies_alone else ("copy", "moment")):
                continue
            part = _plain_part(value, parameter)
            if part is not None and (zero := _zero(key, part, state)) is not None:
                part.masked_fill_(~mask.to(part.device), zero)

    @contextmanager
    def carry_writes(self) -> Iterator[None]:
        """Move the copies of weights by as much as the code inside of the context changes the weights."""
        copies: dict[Tensor, list[Tensor]] = defaultdict(list)
        if self.has_copies:
            for parameter, key, value, _ in self._entries():
                part = _plain_part(value, parameter) if self._kinds.get(key) == "copy" else None
                # Some optimizers put a copy in the place of the weight's storage.
                known = {local_part(parameter).data_ptr(), *(copy.data_ptr() for copy in copies.get(parameter, ()))}
                if part is not None and part.data_ptr() not in known:
                    copies[parameter].append(part)
        before = {parameter: local_part(parameter).detach().clone() for parameter in copies}
        yield
        with torch.no_grad():
            for parameter, parts in copies.items():
                old, new = before[parameter], local_part(parameter).detach()
                if not torch.equal(old, new):
                    for part in parts:
                        _move(part, old, new)

    def of_one_shape(self, parameters: Collection[Tensor]) -> dict[Tensor, list[Tensor]]:
        """Return what is kept elementwise for each of ``parameters``: moments and copies.

        Raises:
            ValueError: if something else is kept for one of them, with its name: a factor, a basis, codes.
        """
        kinds, found = self.kinds, defaultdict[Tensor, list[Tensor]](list)
        for parameter, key, value, _ in self._entries():
            if parameter not in parameters or (isinstance(value, Tensor) and value.numel() == 1):
                continue
            part = _plain_part(value, parameter) if isinstance(value, Tensor) else None
            if part is not None and part.is_floating_point() and kinds.get(key, "copy") != "other":
                found[parameter].append(part)
            elif isinstance(value, (Tensor, Mapping)) or _is_sequence(value):
                raise ValueError(f"the optimizer keeps {key!r}, which is not elementwise, for these weights")
        return dict(found)

    def _entries(self) -> Iterator[tuple[Tensor, str, Any, Mapping[str, Any]]]:
        """Parameter, key, value and the whole state of the parameter."""
        for parameter, copy in self._outside:
            yield parameter, "master", copy, {}
        for mapping in self._states():
            for owner, state in mapping.items():
                if not isinstance(state, Mapping):
                    continue
                for key, value in state.items():
                    if isinstance(owner, Tensor):
                        yield self._parameters.get(owner, owner), str(key), value, state
                    elif isinstance(key, Tensor):  # a state by purpose and then by parameter
                        yield key, str(owner), value, {}

    def _states(self) -> list[Mapping[Any, Any]]:
        states = [part.state for part in self._parts]
        return list({id(state): state for state in states if isinstance(state, Mapping)}.values())  # some share theirs


def _size(state: Mapping[Any, Any]) -> tuple[int, int]:
    first = next(iter(state.values()), None)
    return len(state), len(first) if isinstance(first, Mapping) else 0


def _kinds(entries: Iterable[tuple[Tensor, str, Any, Mapping[str, Any]]]) -> dict[str, Kind]:
    by_key: dict[str, list[tuple[Tensor, Any]]] = defaultdict(list)
    for parameter, key, value, _ in entries:
        by_key[key].append((parameter, value))
    # Beside a basis or a projection, moments of the weight's shape may belong to rotated coordinates.
    rotated = any(_is_matrix_or_container(parameter, value) for pairs in by_key.values() for parameter, value in pairs)
    return {key: _kind(key, pairs, rotated) for key, pairs in by_key.items()}


def _kind(key: str, pairs: list[tuple[Tensor, Any]], rotated: bool) -> Kind:
    if any(not isinstance(value, Tensor) or value.shape != parameter.shape for parameter, value in pairs):
        return "other"
    parameter, value = max(pairs, key=lambda pair: pair[0].numel())
    if key in COPIES or _is_near(parameter, value, _VERY_NEAR if key in MOMENTS else _NEAR):
        return "copy"
    if rotated:
        return "other"
    # Of square weights a preconditioner has the same shape: an unknown key needs the witness of another weight.
    return "moment" if key in MOMENTS or any(_is_oblong(parameter) for parameter, _ in pairs) else "other"


def _is_oblong(parameter: Tensor) -> bool:
    return parameter.ndim > 2 or (parameter.ndim == 2 and parameter.shape[0] != parameter.shape[1])


def _is_matrix_or_container(parameter: Tensor, value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.shape != parameter.shape and sum(size > 1 for size in value.shape) > 1
    if isinstance(value, Mapping) or _is_sequence(value):
        return bool(value)
    return not isinstance(value, (int, float, str, type(None), torch.dtype, torch.device, torch.Generator))


def _is_near(parameter: Tensor, value: Tensor, limit: float) -> bool:
    part = _plain_part(value, parameter)
    if part is None or not part.is_floating_point():
        return False
    weight = local_part(parameter).detach().float()
    return bool((part.float().to(weight.device) - weight).norm() < limit * weight.norm())


def _plain_part(value: Tensor, parameter: Tensor) -> Tensor | None:
    """Return this rank's part of ``value``; None for tensor classes that only their own library can write to."""
    part = local_part(value).detach()
    fits = type(part) in (Tensor, nn.Parameter) and part.shape == local_part(parameter).shape
    return part if fits else None


def _zero(key: str, part: Tensor, state: Mapping[str, Any]) -> float | None:
    """Return what stands for zero in ``part``: of 8-bit moments (bitsandbytes) a code; None if that is not known."""
    if part.is_floating_point():
        return 0.0
    codebook = state.get(key.replace("state", "qmap")) if key.startswith("state") else None
    return int(codebook.abs().argmin()) if isinstance(codebook, Tensor) else None


def _move(copy: Tensor, old: Tensor, new: Tensor) -> None:
    compute = torch.promote_types(copy.dtype, old.dtype)
    start, before, after = (tensor.to(copy.device, compute) for tensor in (copy, old, new))
    # Where the copy was the weight itself it becomes the new one exactly; elsewhere it keeps its distance.
    copy.copy_(torch.where(start == before, after, start + (after - before)))


def _is_sequence(value: Any) -> bool:
    return not isinstance(value, (str, bytes, Tensor)) and hasattr(value, "__iter__") and hasattr(value, "__len__")
