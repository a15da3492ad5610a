"""Save masks to a file, and apply them to any model with the same weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from prox24_lightning.finetune.masked_parameters import MaskedParameters
from prox24_lightning.finetune.optimizers import masters_of
from prox24_lightning.mask.file import StoredMask, hash_weight, read_masks, write_masks
from prox24_lightning.utils.distributed import on_first, rank
from prox24_lightning.weights.names import clean_name
from prox24_lightning.weights.selection import GroupedWeight
from prox24_lightning.weights.sharded import cut_groups, local_part, part_of, whole

Expect = Literal["pruned", "same", "any"]


def save_masks(
    path: str | Path,
    weights: Iterable[GroupedWeight],
    masks: Mapping[str, Tensor],
    info: Mapping[str, Any] | None = None,
) -> Path:
    """Write the masks of ``weights``, with their shapes, dimensions and hashes of the present weights.

    Sharded weights are gathered: every rank calls this, and the first one writes.

    Args:
        path: a ``.safetensors`` file; its folder is made.
        weights: as :func:`~prox24_lightning.weights.selection.select_weights` or a callback returns them.
        masks: by weight name, bool, True stays; of a sharded weight this rank's part.
        info: JSON values for readers of the file.

    Raises:
        ValueError: if a weight has no mask or is empty by now, or a mask is not 2:4.
        OSError: if the file cannot be written; on every rank.
    """
    path = Path(path)
    stored: dict[str, StoredMask] = {}
    for weight in weights:
        if weight.name not in masks:
            raise ValueError(f"{weight.name} has no mask yet; save masks once they are frozen")
        if weight.parameter.shape.numel() == 0:
            raise ValueError(
                f"{weight.name} is empty: its layer was converted in place, and its hash cannot be taken; save masks "
                "before the conversion, for instance in on_train_end"
            )
        values, mask = (whole(part, weight.parameter) for part in (local_part(weight.parameter), masks[weight.name]))
        if rank() == 0:
            stored[weight.name] = StoredMask(mask.cpu(), weight.dim, hash_weight(values))

    def write() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_masks(path, stored, info)

    on_first(write)
    return path


def load_masks(
    model: nn.Module,
    path: str | Path,
    *,
    optimizers: Iterable[Optimizer] | Optimizer = (),
    expect: Expect = "pruned",
    prefix: str = "",
) -> MaskedParameters:
    """Apply the masks of a file to ``model`` and enforce them while it trains on.

    Gradients are masked from now on, in any training loop. Give ``optimizers`` that exist already: their state is
    masked now, and the weights after each of their steps; **one that has momentum and is not given makes the model
    dense again**, and a warning after its first step says so. An optimizer made later needs no masking if it is
    elementwise and starts without state, as SGD and Adam do.

    Args:
        model: has every weight that the file names; other weights stay dense. Sharded weights take their part.
        path: of a file that :func:`save_masks`, ``Prox24`` or ``prox24 prune`` wrote.
        optimizers: one optimizer of those weights, or several.
        expect: condition on the model's weights. ``"pruned"``: zero wherever the masks prune; ``"same"``: equal to the
            saved weights, by their hash; ``"any"``: none, and the masks prune them now.
        prefix: what the names in the file have before the model's names (``"model."`` if they were saved from a
            LightningModule with the attribute ``model``).

    Returns:
        the masked parameters; ``release_all()`` stops masking.

    Raises:
        FileNotFoundError, ValueError: see :func:`~prox24_lightning.mask.file.read_masks`; ValueError also for masks
            that do not fit the model, with the name, before anything is changed.
    """
    if expect not in get_args(Expect):
        raise ValueError(f"expect={expect!r} is unknown; use one of {', '.join(get_args(Expect))}")
    file = read_masks(path)
    parameters = {clean_name(name): parameter for name, parameter in model.named_parameters(remove_duplicate=False)}
    found = {name: _match(name, stored, parameters, prefix, path) for name, stored in file.masks.items()}
    for name, parameter in found.items():
        _check_values(name, file.masks[name], parameter, expect, path)
    optimizers = [optimizers] if isinstance(optimizers, Optimizer) else list(optimizers)
    masked = MaskedParameters()
    masked.masters = masters_of(optimizers, found.values())
    for name, parameter in found.items():
        device = local_part(parameter).device
        masked.apply(name.removeprefix(prefix), parameter, part_of(file.masks[name].mask.to(device), parameter))
    masked.enforce(optimizers)
    masked.watch()
    return masked


def _match(
    name: str, stored: StoredMask, parameters: Mapping[str, nn.Parameter], prefix: str, path: str | Path
) -> nn.Parameter:
    parameter = parameters.get(name.removeprefix(prefix)) if name.startswith(prefix) else None
    if parameter is None:
        ending = next((known for known in parameters if name.endswith(f".{known}")), None)
        inner = next((known.removesuffix(f".{name}") for known in parameters if known.endswith(f".{name}")), None)
        remedy = "load them onto the model they are of"
        if ending:
            remedy = f"prefix={name.removesuffix(ending)!r} would fit"
        elif inner:
            remedy = f"its submodule {inner!r} does: load them onto model.get_submodule({inner!r})"
        elif prefix and name in parameters:
            remedy = f"leave prefix={prefix!r} out"
        given = f" after prefix={prefix!r}" if prefix else ""
        raise ValueError(f"{path} has a mask for {name!r}, which the model does not have{given}; {remedy}")
    if parameter.shape != stored.mask.shape:
        raise ValueError(
            f"{path}: the mask of {name!r} has shape {tuple(stored.mask.shape)}, the model's weight "
            f"{tuple(parameter.shape)}; load it onto the model that it was saved from"
        )
    if parameter.is_meta:
        raise ValueError(f"{name} is on the meta device and has no values: load the weights before their masks")
    if cut := cut_groups(parameter, stored.dim):
        raise ValueError(f"{name}: {cut}; shard another dimension of it")
    return parameter


@torch.no_grad()
def _check_values(name: str, stored: StoredMask, parameter: nn.Parameter, expect: Expect, path: str | Path) -> None:
    if expect == "same" and stored.weight_hash != hash_weight(whole(local_part(parameter), parameter)):
        raise ValueError(
            f"{name} is not the weight that {path} was saved with (another value, or another dtype than then); load "
            "that checkpoint, or take expect='pruned'"
        )
    if expect == "pruned":
        mask = part_of(stored.mask.to(local_part(parameter).device), parameter)
        alive = int((local_part(parameter)[~mask] != 0).sum())
        if alive:
            raise ValueError(
                f"{name} has {alive} non-zero weights where its mask in {path} prunes: the masks are of another "
                "checkpoint; load the one they were saved with, or prune the model by them with expect='any'"
            )
