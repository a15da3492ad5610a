"""Cut a model into the blocks that become 2:4 one after the other, in the order in which it runs them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from prox24_lightning.calibration.blocks import find_blocks
from prox24_lightning.calibration.calls.inner_calls import order_of_first_calls
from prox24_lightning.calibration.hooked_module import HookedModule
from prox24_lightning.utils.distributed import gathered_objects
from prox24_lightning.weights.layer_matrix import matrix_rows
from prox24_lightning.weights.selection import GroupedWeight


@dataclass(frozen=True)
class Block:
    """Weights that become 2:4 together: those of a block of the model, of a layer, or of layers that share an input.

    Attributes:
        name: of the module, in the model.
        module: the block, or the first of the layers.
        weights: those to prune.
        hooked: the hooked module that holds the block; None where nothing is called again.
    """

    name: str
    module: nn.Module
    weights: tuple[GroupedWeight, ...]
    hooked: HookedModule | None = None

    def feature_dim(self, output: Tensor) -> int:
        """Return the dimension of its output along which features lie: the last, or the second of images and the like,
        as the output sizes of its layers show.
        """
        convolutions = all(isinstance(weight.module, (nn.Conv1d, nn.Conv2d)) for weight in self.weights)
        widths = {
            weight.parameter.shape[3 - weight.input_dim]
            if weight.is_experts
            else matrix_rows(weight.module, weight.parameter)
            for weight in self.weights
        }
        second = output.dim() > 2 and output.shape[1] in widths
        return 1 if second and (convolutions or output.shape[-1] not in widths) else -1


def cut_into_blocks(model: nn.Module, weights: Sequence[GroupedWeight], hooked: Sequence[HookedModule]) -> list[Block]:
    """Return blocks where the model has a list of like ones that are called as such, single layers elsewhere."""
    repeated = find_blocks(model, holding=[weight.module for weight in weights])
    owner = {module: one for one in hooked for module in one.module.modules()}
    found: dict[str, tuple[nn.Module, list[GroupedWeight]]] = {}
    for weight in weights:
        name, module = weight.module_name, weight.module
        for index in range(0 if repeated.whole else len(repeated)):
            if repeated.owns(index, name) and repeated.modules[index] in owner:
                name, module = repeated.names[index], repeated.modules[index]
                break
        found.setdefault(name, (module, []))[1].append(weight)
    return [Block(name, module, tuple(members), owner[module]) for name, (module, members) in found.items()]


def check_same_order(blocks: Sequence[Block]) -> None:
    """Refuse ranks that would solve different blocks at one time: they would wait for each other for ever.

    Raises:
        RuntimeError: on every rank.
    """
    orders = gathered_objects([block.name for block in blocks])
    if any(order != orders[0] for order in orders):
        raise RuntimeError(
            f"the ranks run the model's parts in different orders (rank 0: {orders[0][:4]}...), and cannot prune one "
            "after the other together; use strategy='post_step', or the same control flow on every rank"
        )


def order_of_blocks(hooked: HookedModule, blocks: Sequence[Block]) -> list[str]:
    """Return the names of the blocks inside ``hooked`` in the order in which the recorded calls reach them.

    One rerun of a call; of further calls only while there are blocks that none has reached. Those are left out.
    """
    inside = {block.module: block.name for block in blocks}
    order: list[str] = []
    with hooked.rerunning():
        for call in hooked.calls:
            reached = [inside[module] for module in order_of_first_calls(call, hooked.module, inside)]
            order += [name for name in reached if name not in order]
            if len(order) == len(inside):
                break
    return order
