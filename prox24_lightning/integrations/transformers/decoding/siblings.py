"""Projections that read the same input (query, key and value; gate and up) as one product, of prompts and of tokens.

For few tokens a small product costs its latency, and in 8 bits each of them rounds the same tokens again. Which layers
belong together is seen in one call of the model. Dense weights are moved into one tensor that the parameters then view;
packed ones are joined in a copy. The modules, their names and what is saved stay as they are.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, TypeVar
from weakref import WeakSet

import torch
from torch import Tensor, nn

from prox24_lightning.convert.layers.semi_structured_linear import SemiStructuredLinear
from prox24_lightning.convert.layers.siblings import find_siblings
from prox24_lightning.integrations.transformers.decoding.join_layers import (
    KINDS,
    join,
    separate,
    tensors_of,
    why_not_joined,
)

log = logging.getLogger(__name__)

T = TypeVar("T")


class SiblingProjections:
    """The groups of a model's linear layers that :meth:`run` lets answer from one product each.

    Args:
        enabled: False joins nothing.
    """

    def __init__(self, *, enabled: bool) -> None:
        self._enabled = enabled
        self._groups: list[SiblingGroup] = []
        self._seen: int | None = None
        self._moved: WeakSet[nn.Module] = WeakSet()  # also of copies that a model's ``generate`` went to

    def refresh(self, model: Any) -> int:
        """Join what belongs together, again if weights have been exchanged; returns what changes when they are."""
        if self._seen is None or self._seen != self._state(model):
            self._groups = []
            if self._enabled:
                self._groups = _joined_groups(model)
                self._moved.update(member for group in self._groups for member in group.members)
            self._seen = self._state(model)
        return self._seen

    def run(self, call: Callable[[], T]) -> T:
        """Return ``call()`` with joined projections; without them, and from then on, if only that works."""
        problem = None
        try:
            with self._answering():
                return call()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a model may need its projections' outputs as a layout that parts do not have
            if not self._groups:
                raise
            problem = error
        found = call()
        log.warning("projections that share an input run one by one: %s", problem)
        self._enabled, self._groups = False, []
        return found

    def release(self) -> None:
        """Give every parameter a tensor of its own again, and free what was joined."""
        separate(self._moved)
        self._moved.clear()
        self._groups, self._seen = [], None

    def group_of(self, member: nn.Module) -> SiblingGroup | None:
        """Return the group that a layer belongs to; None if it runs alone."""
        return next((group for group in self._groups if any(one is member for one in group.members)), None)

    @property
    def names(self) -> list[tuple[str, ...]]:
        """The names of the layers that are joined."""
        return [group.names for group in self._groups]

    def _state(self, model: nn.Module) -> int:
        tensors = (*model.parameters(), *model.buffers())
        # Where tensors lie says whether dense weights were exchanged; copies grow old by writing in place as well.
        copied = [
            tensor._version
            for group in self._groups
            for member in group.members
            if isinstance(member, SemiStructuredLinear)
            for tensor in (member.packed, member.bias)
            if tensor is not None
        ]
        places = tuple((tensor.data_ptr(), tensor.dtype) for tensor in tensors)
        return hash((model.training, places, tuple(copied)))

    @contextmanager
    def _answering(self) -> Iterator[None]:
        try:
            for group in self._groups:
                group.attach()
            yield
        finally:
            for group in self._groups:
                group.detach()


class SiblingGroup:
    """Layers of one parent that read one input, in the order in which they are called, and their common product."""

    def __init__(self, names: tuple[str, ...], members: Sequence[nn.Module], whole: nn.Module) -> None:
        self.names = names
        self.members = tuple(members)
        self.whole = whole
        self.input: Tensor | None = None
        self.output: Tensor | None = None
        self.rounded: tuple[Tensor, Tensor] | None = None

    def offer(self, input: Tensor, rounded: Tensor) -> None:
        """Take an input, which the first of the layers will meet, in 8 bits as well."""
        self.rounded = input, rounded

    def product(self, input: Tensor) -> Tensor:
        """Return the outputs of all layers, one after another: (..., out_features of all)."""
        offered, self.rounded = self.rounded, None
        if offered is None or offered[0] is not input:
            found: Tensor = self.whole(input)
            return found
        tokens = input.numel() // input.shape[-1]
        whole: Any = self.whole
        product: Tensor = whole.multiply_rounded(offered[1], tokens)
        return product.view(*input.shape[:-1], -1)

    def attach(self) -> None:
        sizes = [int(member.out_features) for member in self.members]  # type: ignore[arg-type]
        for member, start, size in zip(self.members, accumulate(sizes, initial=0), sizes, strict=False):
            # A class, not a function on each layer: code that is compiled for one block then fits all.
            vars(member).update(_siblings=self, _start=start, _size=size, _last=member is self.members[-1])
            member.__class__ = _CLASSES[type(member)]

    def detach(self) -> None:
        self.input = self.output = self.rounded = None
        for member in self.members:
            member.__class__ = _KINDS.get(type(member), type(member))
            for name in ("_siblings", "_start", "_size", "_last"):
                vars(member).pop(name, None)


def _answer(self: Any, input: Tensor) -> Tensor:
    """The forward of a joined layer: its part of the product, which the first one that meets an input makes."""
    group = self._siblings
    if group.input is not input:
        group.input, group.output = input, group.product(input)
    part: Tensor = group.output.narrow(-1, self._start, self._size)
    if self._last:
        group.input = group.output = None
    return part


_CLASSES: dict[type[nn.Module], Any] = {
    kind: type(f"Sibling{kind.__name__}", (kind,), {"forward": _answer}) for kind in KINDS
}
_KINDS = {sibling: kind for kind, sibling in _CLASSES.items()}


def _joined_groups(model: Any) -> list[SiblingGroup]:
    """Record a call of the model, and join the layers that share an input and allow it; the others are logged."""
    if model.training:
        log.info("projections are not joined: the model is in training mode")
        return []
    uses = Counter(id(tensor) for module in model.modules() for tensor in tensors_of(module))
    groups: list[SiblingGroup] = []
    refused: dict[str, list[str]] = {}
    for found in find_siblings(model):
        names, members = found.names, found.members
        reason = "called more than once" if found.repeated else None
        reason = reason or why_not_joined(members, uses)
        if reason is None:
            try:
                groups.append(SiblingGroup(names, members, join(members)))
                continue
            except Exception as error:  # no memory, no kernel, or no cache of measured times: generation goes on
                reason = f"they could not be joined: {error}"
        refused.setdefault(reason, []).append(", ".join(names))
    for reason, alike in refused.items():
        log.info("%s run one by one (and %d groups like them): %s", alike[0], len(alike) - 1, reason)
    return groups
