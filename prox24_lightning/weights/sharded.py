"""Sharded weights: ``DTensor``, of which each rank holds a part, as FSDP2 and tensor parallelism make them.

Prox, masks and masked gradients work on the local part as on a plain tensor, without communication: a part holds whole
groups of four, or the weight is refused (:func:`cut_groups`). :func:`whole` gathers what concerns the weight as a
whole. On plain tensors every function here is the identity.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from prox24_lightning.utils.distributed import world_size
from prox24_lightning.weights.groups import Dim, group_dims, group_shape


def is_sharded(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a ``DTensor``."""
    # Recognised by its methods: importing the class takes a second.
    return hasattr(tensor, "to_local") and hasattr(tensor, "placements")


def local_part(tensor: Tensor) -> Tensor:
    """Return this rank's part of a ``DTensor``, sharing its memory, and any other tensor as it is; detached."""
    tensor = tensor.detach()
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def whole(part: Tensor, like: Tensor, *, groups_along: Dim | None = None) -> Tensor:
    """Return the whole tensor of which each rank passes its part; a collective call if ``like`` is sharded.

    Args:
        part: this rank's part, sharded as ``like`` is.
        like: the weight.
        groups_along: for a tensor with one value per group, the dimension of the groups.
    """
    if not is_sharded(like):
        return part
    from torch.distributed.tensor import DTensor

    shape = like.shape if groups_along is None else torch.Size(group_shape(like.shape, groups_along))
    parts = DTensor.from_local(
        part.contiguous(),
        like.device_mesh,  # type: ignore[attr-defined]
        like.placements,  # type: ignore[attr-defined]
        run_check=False,
        shape=shape,
        stride=tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape))),
    )
    return parts.full_tensor()


def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """Return this rank's part of ``tensor``, sharded as ``like`` is; no communication.

    Args:
        tensor: the same on every rank; of ``like``'s shape, or broadcasting against it: dimensions of size 1 stay.
        like: the weight.
    """
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    broadcast = {axis for axis, size in enumerate(tensor.shape) if size != like.shape[axis]}
    wanted = [Replicate() if getattr(placement, "dim", None) in broadcast else placement for placement in placements]
    everywhere = DTensor.from_local(tensor.contiguous(), mesh, [Replicate()] * mesh.ndim, run_check=False)
    return everywhere.redistribute(placements=wanted).to_local()


def gathered(tensor: Tensor) -> Tensor:
    """Return the whole of a ``DTensor`` on every rank of its mesh, and any other tensor as it is; detached."""
    tensor = tensor.detach()
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def sharded_places(module: nn.Module) -> list[tuple[dict[str, Any], str, Tensor]]:
    """Return where sharded parameters and buffers stand: dictionary, key and tensor."""
    return [
        (held, name, tensor)
        for each in module.modules()
        for held in (each._parameters, each._buffers)
        for name, tensor in held.items()
        if tensor is not None and is_sharded(tensor)
    ]


@contextmanager
def runnable(model: nn.Module, part: nn.Module) -> Iterator[None]:
    """Let ``part`` of a ``model`` be called by itself although FSDP2 modules around it shard its parameters.

    The calls see what was written into the shards before. Afterwards every FSDP2 module of the model holds only its
    shards, so that the next call sees what is written into them. A model without FSDP2 modules is left as it is.
    """
    managed = [module for module in model.modules() if is_fsdp(module)]
    _wait_for_writes(managed)
    inside = set(part.modules())
    around = [module for module in managed if module not in inside and part in set(module.modules())]
    # The nearest FSDP2 module around a parameter manages it; those inside the part gather theirs when called.
    if around and any(True for _ in _outside(part)):
        around[-1].unshard()  # type: ignore[operator]
    try:
        yield
    finally:
        for module in managed:
            _end_forward(module)
            module.reshard()  # type: ignore[operator]


def _wait_for_writes(managed: Iterable[nn.Module]) -> None:
    """Wait until what was written into shards is there: FSDP2 gathers them on streams of its own."""
    shards = (local_part(parameter) for module in managed for parameter in module.parameters(recurse=False))
    for device in {shard.device for shard in shards if shard.is_cuda}:
        torch.cuda.current_stream(device).synchronize()


def _end_forward(module: nn.Module) -> None:
    """Let the next call begin a forward pass, also where an error has ended the last one.

    FSDP2's streams wait for the optimizer's writes where a forward pass begins, and no pass begins in one that has not
    ended: the next training step would gather shards that are still being written. Nor does the outermost module drop
    its gathered parameters within a pass.
    """
    state: Any = getattr(module, "_get_fsdp_state", lambda: None)()  # no public way
    context: Any = getattr(state, "_state_ctx", None)
    if hasattr(context, "iter_forward_root"):
        context.iter_forward_root = None
    # Older releases have one group a module.
    groups: Any = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
    for group in groups:
        if getattr(getattr(group, "_training_state", None), "name", "") == "FORWARD":
            group._training_state = type(group._training_state).IDLE


def reshard(model: nn.Module) -> None:
    """Make every FSDP2 module of ``model`` drop its gathered parameters, so that the next call sees the shards."""
    for module in model.modules():
        if is_fsdp(module):
            module.reshard()  # type: ignore[operator]


def is_fsdp(module: nn.Module) -> bool:
    """Whether FSDP2 shards parameters of ``module`` itself."""
    return hasattr(module, "reshard") and hasattr(module, "unshard")


def _outside(part: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the parameters of ``part`` that no FSDP2 module inside it manages."""
    if not is_fsdp(part):
        yield from part.parameters(recurse=False)
        for child in part.children():
            yield from _outside(child)


def batch_ranks(model: nn.Module, parameters: Iterable[Tensor]) -> int:
    """Return over how many ranks training divides its batches: all, but for ranks of tensor parallelism."""
    meshes = [parameter.device_mesh for parameter in parameters if is_sharded(parameter)]  # type: ignore[attr-defined]
    if not meshes:
        return world_size()
    by_fsdp = any(map(is_fsdp, model.modules())) and all(mesh.ndim == 1 for mesh in meshes)
    return int(meshes[0].size()) if by_fsdp else 1


def copies_of(tensor: Tensor) -> int:
    """Return how many ranks hold each part of ``tensor``: all of them hold the whole of a plain one."""
    if not is_sharded(tensor):
        return world_size()
    mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
    parts = math.prod(mesh.size(axis) for axis, placement in enumerate(placements) if placement.is_shard())
    return world_size() // parts


def cut_groups(weight: Tensor, dim: Dim) -> str | None:
    """Return why sharding cuts groups of four along ``dim`` (of a pair: 4 x 4 blocks) apart, None if it does not.

    Every rank returns the same, whatever its own part.
    """
    if not is_sharded(weight):
        return None
    return next((why for one in group_dims(weight.shape, dim) if (why := _cut_along(weight, one))), None)


def _cut_along(weight: Tensor, dim: int) -> str | None:
    sizes = {weight.shape[dim]}
    mesh = weight.device_mesh  # type: ignore[attr-defined]
    for axis, placement in enumerate(weight.placements):  # type: ignore[attr-defined]
        if placement.is_partial():
            return f"it is a sum not yet reduced over {mesh.size(axis)} ranks"
        if getattr(placement, "dim", None) == dim:
            # torch.chunk's rule: equal parts, rounded up, and the last one takes what is left.
            parts = mesh.size(axis)
            sizes = {min(-(-size // parts), size - start) for size in sizes for start in _starts(size, parts)}
    cut = sorted(size for size in sizes if size % 4)
    if not cut:
        return None
    return (
        f"its {weight.shape[dim]} entries along dimension {dim} are sharded into parts of {cut[0]}, "
        "which cuts groups of four apart"
    )


def _starts(size: int, parts: int) -> list[int]:
    step = -(-size // parts)
    return [index * step for index in range(parts) if index * step < size]
