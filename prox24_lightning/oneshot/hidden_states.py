"""The hidden states of all calibration batches on their way through a model's blocks."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain, islice, zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from prox24_lightning.calibration.block_inputs import NotAChainError, record_block_inputs
from prox24_lightning.calibration.blocks import Blocks, call_model, hidden_state
from prox24_lightning.calibration.module_call import ModuleCall
from prox24_lightning.oneshot.storage import HiddenStates
from prox24_lightning.utils.checksum import checksum
from prox24_lightning.utils.distributed import gathered_objects, rank, world_size
from prox24_lightning.utils.tensors import tensors_in, to_device

logger = logging.getLogger(__name__)


@dataclass
class Flow:
    """The hidden states on their way through the blocks, and how each batch calls each block."""

    blocks: Blocks
    device: torch.device
    home: torch.device
    calls: list[list[ModuleCall]]
    hidden: HiddenStates
    place: str
    batches: list[Any] = field(default_factory=list)

    @classmethod
    def begin(
        cls,
        model: nn.Module,
        blocks: Blocks,
        batches: Iterable[Any],
        home: torch.device,
        device: torch.device,
        place: str,
    ) -> Flow:
        # Of several processes each takes its share of the batches, and a folder of its own.
        if world_size() > 1:
            place = place if place in ("device", "cpu") else f"{place}/rank_{rank()}"
            batches = islice(batches, rank(), None, world_size())
        flow = cls(blocks, device, home, [], HiddenStates(place), place)
        if blocks.whole:
            flow.batches = [_moved(batch, home) for batch in batches]
        else:
            moved = (_moved(batch, home) for batch in batches)
            for calls, hidden in record_block_inputs(model, blocks, moved):
                flow.calls.append(calls)
                flow.hidden.append(hidden)
        if not all(gathered_objects(len(flow))):
            least = f"one for each of the {world_size()} processes" if world_size() > 1 else "one"
            raise ValueError(f"there are no calibration batches; give at least {least}")
        return flow

    def __len__(self) -> int:
        return len(self.batches) if self.blocks.whole else len(self.calls)

    def copy(self) -> Flow:
        """A second flow with its own hidden states, for the dense model."""
        place = self.place if self.place in ("device", "cpu") else f"{self.place}/dense"
        twin = Flow(self.blocks, self.device, self.home, self.calls, HiddenStates(place), place, self.batches)
        for number in range(len(self.hidden)):
            twin.hidden.append(self.hidden[number])
        return twin

    def identity(self) -> list[Any]:
        """What tells this run's data from another's: how many batches all ranks have, and a checksum of them."""
        shares = gathered_objects([checksum(self._tensors(number)) for number in range(len(self))])
        # The ranks took the batches in turn.
        found = [batch for turn in zip_longest(*shares) for batch in turn if batch is not None]
        return [len(found), checksum(found)]

    def _tensors(self, number: int) -> list[Tensor]:
        """All that reaches the blocks from outside in batch ``number``."""
        if self.blocks.whole:
            return tensors_in(self.batches[number])
        arguments = tensors_in([(call.args, call.kwargs) for call in self.calls[number]])
        # Most are the same for all blocks.
        return [self.hidden[number], *{id(tensor): tensor for tensor in arguments}.values()]

    def run(self, index: int, block: nn.Module, number: int) -> Any:
        """ModuleCall block ``index`` (or a copy of it) on a copy of batch ``number``."""
        if self.blocks.whole:
            return call_model(block, to_device(self.batches[number], self.device, copy=True))
        return self.calls[number][index].with_hidden(self.hidden[number]).to(self.device)(block)

    def advance(self, index: int, block: nn.Module) -> None:
        """Replace every hidden state by what the block makes of it."""
        if index + 1 == len(self.blocks):
            return
        for number in range(len(self)):
            self.hidden[number] = hidden_state(self.run(index, block, number), self.blocks.names[index])


def blocks_to_walk(
    model: nn.Module, blocks: Blocks, batches: Iterable[Any], home: torch.device, name: str | None
) -> tuple[Blocks, Iterable[Any]]:
    """``blocks``, or the whole model as one block if they are no chain; and all ``batches``, which are read once.

    Blocks are a chain if each receives what the one before it returned, as the first batch tells.

    Args:
        name: of the list of blocks that was asked for; None if they were found.

    Raises:
        ValueError: if blocks that were asked for are no chain.
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
            raise ValueError(f"blocks={name!r} cannot be walked: {error}; leave blocks= out") from None
        logger.warning("%s: the whole %s is walked as one block, which takes more time", error, type(model).__name__)
        blocks = Blocks(("",), (model,), whole=True)
    return blocks, chain(first, batches)


def _moved(batch: Any, device: torch.device) -> Any:
    # Tokenizers return their own kind of mapping.
    return to_device(dict(batch) if isinstance(batch, Mapping) else batch, device)
