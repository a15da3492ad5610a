"""Collective operations on Python objects and tensors. Without a process group there is one rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from prox24_lightning.utils.checksum import checksum

T = TypeVar("T")


def world_size() -> int:
    """Return the number of processes; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return this process's number, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def from_first(value: T) -> T:
    """Return the first rank's ``value`` on every rank; plain Python objects and CPU tensors."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def on_first(action: Callable[[], T]) -> T:
    """Return on every rank what ``action`` returns on the first one, which alone runs it: to read or write files.

    Raises:
        Exception: whatever ``action`` raises on the first rank, on every rank: none waits for one that has failed.
    """
    found: tuple[Any, Exception | None] = (None, None)
    if rank() == 0:
        try:
            found = action(), None
        except Exception as error:
            found = None, _portable(error)
    result, problem = from_first(found)
    if problem is not None:
        raise problem
    return result


def _portable(error: Exception) -> Exception:
    """Return ``error`` if the other ranks can make it again from plain arguments, else one of the same text."""
    plain = all(isinstance(argument, (str, int, float, type(None))) for argument in error.args)
    if world_size() == 1 or (type(error).__module__ == "builtins" and plain):
        return error
    return RuntimeError(f"{type(error).__name__}: {error}")


def gathered_objects(value: T) -> list[T]:
    """Return every rank's ``value``, on every rank; plain Python objects."""
    if world_size() == 1:
        return [value]
    found: list[T] = [value] * world_size()
    dist.all_gather_object(found, value)
    return found


def raise_on_all_ranks(problem: str | None) -> None:
    """Raise what one rank has found wrong on every rank, so that none waits for one that has failed.

    Raises:
        ValueError: with the first rank's ``problem``; None is no problem.
    """
    problems = [found for found in gathered_objects(problem) if found is not None]
    if problems:
        raise ValueError(problems[0])


def broadcast(tensor: Tensor, source: int) -> Tensor:
    """Return the tensor of rank ``source``, written into ``tensor`` on the others: one of the same shape and dtype."""
    if world_size() > 1:
        dist.broadcast(tensor, source)
    return tensor


def gathered_on_first(value: T) -> list[T]:
    """Return every rank's ``value`` on the first rank, its own alone on the others: for large values to save."""
    if world_size() == 1:
        return [value]
    found: list[T] | None = [value] * world_size() if rank() == 0 else None
    dist.gather_object(value, found, dst=0)
    return [value] if found is None else found


def stacked(tensor: Tensor) -> Tensor:
    """Return the ranks' tensors of one shape and dtype, stacked along a new first dimension, on every rank."""
    if world_size() == 1:
        return tensor.unsqueeze(0)
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.stack(parts)


def joined(part: Tensor, lengths: Sequence[int]) -> Tensor:
    """Return the ranks' tensors, concatenated along their first dimension, on every rank.

    Args:
        part: this rank's, ``lengths[rank()]`` long; alike on all ranks in everything else.
        lengths: how long each rank's tensor is; zeros are allowed.
    """
    if world_size() == 1:
        return part
    sent = part.view(torch.uint8) if part.dtype == torch.bool else part  # gloo knows no bool
    padded = sent.new_zeros(max(lengths), *part.shape[1:])
    padded[: len(part)] = sent
    found = torch.cat([one[:length] for one, length in zip(stacked(padded), lengths, strict=True)])
    return found.view(part.dtype)


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Return the sum of the ranks' tensors of one shape, written into ``tensor``."""
    if world_size() > 1:
        dist.all_reduce(tensor, dist.ReduceOp.SUM)
    return tensor


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """Return the mean of the ranks' tensors of one shape, written into ``tensor``."""
    return tensor if world_size() == 1 else sum_over_ranks(tensor).div_(world_size())


def any_rank(flag: bool, device: torch.device | str) -> bool:
    """Return whether ``flag`` is true on at least one rank; the process group communicates over ``device``."""
    if world_size() == 1:
        return flag
    found = torch.tensor(int(flag), device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return bool(found)


def check_same(tensors: Mapping[str, Tensor], what: str, device: torch.device | str) -> None:
    """Compare a hash of every tensor over the ranks; a collective call, to be made by all of them.

    Args:
        tensors: by name, the same names on every rank.
        what: their kind, for the message.
        device: one that the process group communicates over.

    Raises:
        RuntimeError: on every rank, with the first name whose tensors differ and the ranks that have them.
    """
    if world_size() == 1 or not tensors:
        return
    digests = [bytes.fromhex(checksum([value])) for value in tensors.values()]
    mine = torch.frombuffer(bytearray(b"".join(digests)), dtype=torch.uint8).view(len(digests), -1)
    differs = (everyone := stacked(mine.to(device)).cpu()).ne(everyone[:1]).any(-1)
    if not differs.any():
        return
    index = int(differs.any(0).nonzero()[0])
    ranks = differs[:, index].nonzero().flatten().tolist()
    raise RuntimeError(
        f"{what} of {list(tensors)[index]!r} differ: ranks {ranks} do not have what rank 0 has; their weights have "
        "drifted apart (by a step, a seed or a callback that runs on some of them only), so the run stops here"
    )
