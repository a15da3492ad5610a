"""The inputs of one block after the other: recorded for the first, then computed by the blocks themselves."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, islice, zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from prox24_lightning.calibration.block_inputs import NotAChainError, record_block_inputs
from prox24_lightning.calibration.blocks import Blocks, call_model, hidden_state
from prox24_lightning.calibration.calls.module_call import ModuleCall
from prox24_lightning.oneshot.offload import HiddenStates
from prox24_lightning.utils.checksum import checksum
from prox24_lightning.utils.distributed import gathered_objects, rank, world_size
from prox24_lightning.utils.tensors import tensors_in, to_device

logger = logging.getLogger(__name__)


@dataclass
class BlockInputs:
    """The inputs of the current block for all calibration batches: hidden states and other arguments.

    Attributes:
        blocks: of the model, a chain or the whole model as one block.
        device: where a block runs.
        home: where the model lies.
        hidden: for each batch, the hidden state before the current block.
        calls: for each batch, the calls of all blocks without their hidden states.
        batches: the calibration batches, where the whole model is one block.
    """

    blocks: Blocks
    device: torch.device
    home: torch.device
    hidden: HiddenStates
    calls: list[list[ModuleCall]] = field(default_factory=list)
    batches: list[Any] = field(default_factory=list)

    @classmethod
    @contextmanager
    def recorded(
        cls,
        model: nn.Module,
        blocks: Blocks,
        batches: Iterable[Any],
        *,
        home: torch.device,
        device: torch.device,
        offload: str,
    ) -> Iterator[BlockInputs]:
        """Record the inputs of the first block and keep inputs for as long as the context lasts.

        Each of several ranks records its share of the batches.

        Args:
            offload: where hidden states wait: ``"device"``, ``"cpu"`` or a folder.

        Raises:
            ValueError: on every rank, if one of them has no batch.
        """
        if world_size() > 1:
            batches = islice(batches, rank(), None, world_size())
        moved = (_moved(batch, home) for batch in batches)
        with closing(HiddenStates(offload)) as hidden:
            inputs = cls(blocks, device, home, hidden)
            if blocks.whole:
                inputs.batches.extend(moved)
            else:
                for calls, state in record_block_inputs(model, blocks, moved):
                    inputs.calls.append(calls)
                    hidden.append(state)
            if not all(gathered_objects(len(inputs))):
                least = f"one for each of the {world_size()} processes" if world_size() > 1 else "one"
                raise ValueError(f"there are no calibration batches; give at least {least}")
            yield inputs

    def __len__(self) -> int:
        return len(self.batches) if self.blocks.whole else len(self.calls)

    @contextmanager
    def copied(self) -> Iterator[BlockInputs]:
        """Keep a second set of inputs, with hidden states of its own, for as long as the context lasts."""
        with closing(HiddenStates(self.hidden.place)) as hidden:
            for number in range(len(self.hidden)):
                hidden.append(self.hidden[number])
            yield replace(self, hidden=hidden)

    def identity(self) -> list[Any]:
        """Return the number of batches on all ranks and their checksum, which differ between calibration data."""
        shares = gathered_objects([checksum(self._tensors(number)) for number in range(len(self))])
        # In the order of the batches, of which each rank takes every n-th.
        found = [batch for batches in zip_longest(*shares) for batch in batches if batch is not None]
        return [len(found), checksum(found)]

    def _tensors(self, number: int) -> list[Tensor]:
        """Return the tensors that reach the blocks from outside in batch ``number``."""
        if self.blocks.whole:
            return tensors_in(self.batches[number])
        arguments = tensors_in([(call.args, call.kwargs) for call in self.calls[number]])
        # Most are the same for all blocks.
        return [self.hidden[number], *{id(tensor): tensor for tensor in arguments}.values()]

    @contextmanager
    def on_device(self, index: int) -> Iterator[nn.Module]:
        """Yield block ``index`` on :attr:`device`; it goes home afterwards, also after an error."""
        block = self.blocks.modules[index]
        try:
            yield block.to(self.device)
        finally:
            block.to(self.home)

    def run(self, index: int, block: nn.Module, number: int) -> Any:
        """Return the output of block ``index``, or of a copy of it, on a copy of batch ``number``."""
        if self.blocks.whole:
            return call_model(block, to_device(self.batches[number], self.device, copy=True))
        return self.call(index, number)(block)

    def call(self, index: int, number: int) -> ModuleCall:
        """Return the call of block ``index`` on batch ``number``, on :attr:`device`; of a chain of blocks only."""
        return self.calls[number][index].with_hidden(self.hidden[number]).to(self.device)

    def runs(self, index: int, block: nn.Module) -> list[Callable[[], Any]]:
        """Return a function for each batch that calls :meth:`run`."""
        return [partial(self.run, index, block, number) for number in range(len(self))]

    def advance(self, index: int, block: nn.Module) -> None:
        """Replace every hidden state by the output of block ``index``."""
        if index + 1 == len(self.blocks):
            return
        for number in range(len(self)):
            self.hidden[number] = hidden_state(self.run(index, block, number), self.blocks.names[index])


def chain_of_blocks(
    model: nn.Module, blocks: Blocks, batches: Iterable[Any], home: torch.device, name: str | None
) -> tuple[Blocks, Iterable[Any]]:
    """Return ``blocks``, or the whole model as one block if they are no chain, and all ``batches``, read once.

    Blocks are a chain if each receives the output of the one before it, which the first batch shows.

    Args:
        name: of the list of blocks that the user names; None if they were found.

    Raises:
        ValueError: if named blocks are no chain.
    """
    if blocks.whole:
        return blocks, batches
    batches = iter(batches)
    first = list(islice(batches, 1))
    try:
        for _ in record_block_inputs(model, blocks, [_moved(batch, home) for batch in first]):
            pass
    except NotAChainError as error:
        if name is not None:
            raise ValueError(f"blocks={name!r} cannot be pruned one by one: {error}; leave blocks= out") from None
        logger.warning("%s: the whole %s is pruned as one block, which takes more time", error, type(model).__name__)
        blocks = Blocks(("",), (model,), whole=True)
    return blocks, chain(first, batches)


def _moved(batch: Any, device: torch.device) -> Any:
    # Tokenizers return their own kind of mapping.
    return to_device(dict(batch) if isinstance(batch, Mapping) else batch, device)
