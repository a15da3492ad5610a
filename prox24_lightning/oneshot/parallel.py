"""Checks that several processes prune the same layers in the same order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from prox24_lightning.calibration.input_groups import InputGroup
from prox24_lightning.utils.distributed import gathered_objects


def check_same_input_groups(groups: Sequence[InputGroup], names: Mapping[nn.Module, str]) -> None:
    """Raise where the ranks' batches run the layers of a block in different orders, which would block all ranks.

    Raises:
        ValueError: on every rank.
    """
    orders = gathered_objects([[names[layer] for layer in group.layers] for group in groups])
    if any(order != orders[0] for order in orders):
        raise ValueError(
            f"the ranks' first batches run the layers of a block in different orders (rank 0: {orders[0][:4]}...); "
            "prune in one process, or leave these layers dense with skip="
        )
