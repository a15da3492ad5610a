"""What goes 2:4 together, and in which order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from prox24_lightning.calibration.blocks import find_blocks
from prox24_lightning.calibration.hooked_module import CallSite
from prox24_lightning.calibration.module_inputs import order_of_first_calls
from prox24_lightning.utils.distributed import gathered_objects
from prox24_lightning.weights.layer_matrix import matrix_rows
from prox24_lightning.weights.selection import GroupedWeight


@dataclass(frozen=True)
class Unit:
    """What goes 2:4 together: a block of the model, or a layer outside the repeated blocks."""

    name: str
    module: nn.Module
    weights: tuple[GroupedWeight, ...]
    site: CallSite

    def feature_dim(self, output: Tensor) -> int:
        """The dimension of its output along which features lie: the last, or the second of images and the like.

        Told by the sizes that its layers put out.
        """
        convolutions = all(isinstance(weight.module, (nn.Conv1d, nn.Conv2d)) for weight in self.weights)
        widths = {matrix_rows(weight.module, weight.parameter) for weight in self.weights}
        second = output.dim() > 2 and output.shape[1] in widths
        return 1 if second and (convolutions or output.shape[-1] not in widths) else -1


def cut_into_units(model: nn.Module, weights: Sequence[GroupedWeight], sites: Sequence[CallSite]) -> list[Unit]:
    """Blocks where the model has a list of like ones that are called as such, single layers elsewhere."""
    blocks = find_blocks(model, holding=[weight.module for weight in weights])
    site_of = {module: site for site in sites for module in site.module.modules()}
    units: dict[str, tuple[nn.Module, list[GroupedWeight]]] = {}
    for weight in weights:
        name, module = weight.module_name, weight.module
        for index in range(0 if blocks.whole else len(blocks)):
            if blocks.owns(index, name) and blocks.modules[index] in site_of:
                name, module = blocks.names[index], blocks.modules[index]
                break
        units.setdefault(name, (module, []))[1].append(weight)
    return [Unit(name, module, tuple(members), site_of[module]) for name, (module, members) in units.items()]


def check_orders(units: Sequence[Unit]) -> None:
    """Refuse ranks that would solve different units at one time: they would wait for each other for ever.

    Raises:
        RuntimeError: on every rank.
    """
    orders = gathered_objects([unit.name for unit in units])
    if any(order != orders[0] for order in orders):
        raise RuntimeError(
            f"the ranks run the model's parts in different orders (rank 0: {orders[0][:4]}...), and cannot prune one "
            "after the other together; use strategy='post_step', or the same control flow on every rank"
        )


def order_of_units(units: Sequence[Unit]) -> list[str]:
    """Names of the units in the order in which the model runs them, by the first call that their sites remember.

    Units that were not seen running are left out.
    """
    order: list[str] = []
    sites = {unit.site for unit in units if unit.site.calls}
    for site in sorted(sites, key=lambda site: site.calls[0].number):
        inside = {unit.module: unit.name for unit in units if unit.site is site}
        with site.replaying():
            order += [inside[module] for module in order_of_first_calls(site.calls[0], site.module, inside)]
    return order
