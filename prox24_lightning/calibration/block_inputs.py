"""Record what a model calls its blocks with, without computing the blocks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from prox24_lightning.calibration.blocks import Blocks, call_model, hidden_state
from prox24_lightning.calibration.calls.module_call import ModuleCall
from prox24_lightning.utils.tensors import tensors_in


class NotAChainError(ValueError):
    """The hidden state does not go from each block straight to the next."""


class _PassOn:
    """Stands in for the blocks of a model. Each returns a copy of its hidden state, which the next one must receive.

    The outputs have the form (tensor or tuple) that the first block's true output has. Further tensors in it (T5's
    position bias) are handed on too: the true ones of the first block.
    """

    def __init__(self, blocks: Blocks) -> None:
        self.calls: list[ModuleCall] = []
        self.hidden: Tensor | None = None
        self._names = blocks.names
        self._blocks = blocks.modules
        self._forwards = [block.forward for block in blocks.modules]
        self._form: type | None = None
        self._rest: tuple[Tensor | None, ...] = ()
        self._handed: tuple[Tensor, int] | None = None
        self._first_batch = True

    def next_batch(self) -> None:
        self._first_batch = self._form is None
        self.calls, self._handed = [], None

    def __call__(self, index: int, args: tuple, kwargs: dict[str, Any]) -> Any:
        name = self._names[index]
        if index < len(self.calls):
            raise ValueError(
                f"block {name} is called twice in one forward pass; pruning block by block needs one call each"
            )
        if index > len(self.calls):
            raise NotAChainError(f"block {name} is called before {self._names[len(self.calls)]}")
        call = ModuleCall.record(self._blocks[index], args, kwargs)
        place = call.hidden_place(name)
        hidden = call.argument(place)
        if self._handed is not None and not _unchanged(hidden, *self._handed):
            raise NotAChainError(f"block {name} is not called with what {self._names[index - 1]} returned")
        self.calls.append(call.without_hidden(place))
        # Blocks, and the model between them, may work in place: they get copies.
        call = call.with_argument(place, hidden.clone())
        if index == 0:
            self.hidden = hidden.clone()
            if self._form is None or any(item is not None for item in self._rest):
                self._run_first(call)
        elif self._first_batch:
            self._check_rest(index, call)
        hidden = hidden.clone()
        self._handed = hidden, hidden._version
        return hidden if self._form is Tensor else (hidden, *self._rest)

    def _run_first(self, call: ModuleCall) -> None:
        output = self._forwards[0](*call.args, **call.kwargs)
        hidden_state(output, self._names[0])
        self._form = type(output) if isinstance(output, (tuple, list)) else Tensor
        rest = () if self._form is Tensor else output[1:]
        self._rest = tuple(item if isinstance(item, Tensor) else None for item in rest)

    def _check_rest(self, index: int, call: ModuleCall) -> None:
        """Whether block ``index`` hands on as it is what it takes from the first one besides the hidden state."""
        taken = {id(tensor) for tensor in tensors_in((call.args, call.kwargs))}
        places = [place for place, item in enumerate(self._rest, start=1) if item is not None and id(item) in taken]
        if not places:
            return
        output = self._forwards[index](*call.args, **call.kwargs)
        if any(output[place] is not self._rest[place - 1] for place in places):
            raise NotAChainError(
                f"block {self._names[index]} takes more than the hidden state from the block before it, and changes it"
            )


def _unchanged(tensor: Tensor, known: Tensor, version: int) -> bool:
    same = tensor.data_ptr() == known.data_ptr() and tensor.shape == known.shape and tensor.stride() == known.stride()
    return same and tensor._version == version


@torch.no_grad()
def record_block_inputs(
    model: nn.Module, blocks: Blocks, batches: Iterable[Any]
) -> Iterator[tuple[list[ModuleCall], Tensor]]:
    """Yield, for every batch, the calls of all blocks and the hidden state that enters the first of them.

    Blocks are not computed: each hands its hidden state on. Only the first is, once for the form of its output, and for
    every batch if there are further tensors in it. So the cost is that of the model's embeddings, and a model of any
    size fits on a CPU.

    Args:
        batches: what :func:`call_model` takes, on the model's device.

    Raises:
        NotAChainError: if a block does not receive what the block before it returned.
        ValueError: if a batch does not reach every block once.
    """
    own = [vars(block).get("forward") for block in blocks.modules]
    pass_on = _PassOn(blocks)
    try:
        for index, block in enumerate(blocks.modules):
            block.forward = lambda *args, _index=index, **kwargs: pass_on(_index, args, kwargs)
        for number, batch in enumerate(batches):
            pass_on.next_batch()
            try:
                call_model(model, batch)
            except NotAChainError as error:
                if number == 0:
                    raise
                raise NotAChainError(
                    f"{error} in calibration batch {number}, unlike before; leave out batches that take another way"
                ) from None
            if (reached := len(pass_on.calls)) != len(blocks) or pass_on.hidden is None:
                raise ValueError(
                    f"calibration batch {number} never reached {blocks.names[reached]} ({len(blocks) - reached} blocks "
                    "in all)"
                )
            yield pass_on.calls, pass_on.hidden
    finally:
        for block, forward in zip(blocks.modules, own, strict=True):
            # The instance attribute hides the class's method, or another one that was there before (compiled, say).
            if forward is None:
                del block.forward
            else:
                block.forward = forward
