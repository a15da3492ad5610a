"""From the calls of a module to the calls of the modules inside it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from prox24_lightning.calibration.calls.module_call import ModuleCall
from prox24_lightning.utils.long_work import between_pieces
from prox24_lightning.utils.tensors import first_tensor, tensors_in


@dataclass(frozen=True)
class InnerCalls:
    """What one inner module is called with.

    Attributes:
        calls: one for each call of the outer module, if the inner one is called once in each.
        chained: the hidden state that the module before it in the list returns is left out of ``calls``.
    """

    calls: list[ModuleCall]
    chained: bool = False


def inner_calls(
    outer: nn.Module, inners: Sequence[nn.Module], calls: Sequence[ModuleCall]
) -> dict[nn.Module, InnerCalls]:
    """Return the calls of ``inners`` that ``calls`` of ``outer`` lead to, from one rerun of each.

    Args:
        inners: modules inside ``outer``, or ``outer`` itself alone, in the order in which they run.

    Returns:
        by module: the first one, and those that take the hidden state from the one before them, as it was returned,
        and nothing else that has come into being since the first one was called.
    """
    if list(inners) == [outer]:
        return {outer: InnerCalls(list(calls))}
    found: dict[nn.Module, list[ModuleCall]] = {inner: [] for inner in inners}
    before = dict(zip(inners[1:], inners, strict=False))
    last: tuple[nn.Module | None, Tensor | None, int] = None, None, 0
    known: dict[int, tuple[Tensor, int]] = {}
    order: list[nn.Module] = []
    once, draws = False, False

    def enter(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        nonlocal known
        call = ModuleCall.record(module, args, kwargs, random=draws)
        before_it, hidden, version = last
        linked = before_it is before.get(module) and hidden is not None and hidden._version == version
        place = call.place_of(hidden) if linked else None
        given = [tensor for tensor in tensors_in((call.args, call.kwargs)) if tensor is not hidden]
        if module is inners[0]:
            known = {id(tensor): (tensor, tensor._version) for tensor in given}
        elif any(id(tensor) not in known or known[id(tensor)][1] != tensor._version for tensor in given):
            place = None
        order.append(module)
        if module is inners[0]:
            found[module].append(call)
        elif place is None:
            found.pop(module, None)  # not kept: it takes a rerun of its own
        elif module in found:
            found[module].append(call.without_hidden(place))
        if once and module is inners[-1]:
            raise _LastReached

    def leave(module: nn.Module, args: tuple, output: Any) -> None:
        nonlocal last
        hidden = first_tensor(output)
        last = module, hidden, 0 if hidden is None else hidden._version

    handles = [inner.register_forward_pre_hook(enter, with_kwargs=True) for inner in inners]
    handles += [inner.register_forward_hook(leave) for inner in inners[:-1]]
    try:
        for number, call in enumerate(calls):
            last, draws = (None, None, 0), call.random is not None
            between_pieces()
            with suppress(_LastReached):
                call(outer)
            # The first rerun goes to its end and shows whether later ones may stop early.
            once = once or (number == 0 and order == list(inners))
    finally:
        for handle in handles:
            handle.remove()
    chain = {}
    for inner in inners[1:] if once else ():
        linked = found.get(inner, [])
        as_often = len(linked) == len(found[inners[0]])  # not so where a model skips blocks in some batches
        if len({call.place for call in linked}) == 1 and as_often:
            chain[inner] = InnerCalls(linked, chained=True)
    return {inners[0]: InnerCalls(found[inners[0]]), **chain}


def order_of_first_calls(call: ModuleCall, outer: nn.Module, modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Return those of ``modules`` that ``call`` of ``outer`` reaches, in the order in which it does."""
    found: list[nn.Module] = []

    def note(module: nn.Module, args: tuple) -> None:
        if module not in found:
            found.append(module)

    handles = [module.register_forward_pre_hook(note) for module in modules]
    try:
        call(outer)
    finally:
        for handle in handles:
            handle.remove()
    return found


class _LastReached(Exception):  # noqa: N818 (it ends a rerun early, and is no error)
    pass
