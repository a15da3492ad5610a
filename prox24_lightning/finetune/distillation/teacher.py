"""The teacher: its weights from a checkpoint, their checksum and memory, and the arguments it is called with."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prox24_lightning.mask import is_24
from prox24_lightning.utils.checksum import checksum
from prox24_lightning.utils.files import load_state_dict
from prox24_lightning.weights.names import clean_name
from prox24_lightning.weights.sharded import gathered, is_fsdp, is_sharded, local_part


def load_weights(teacher: nn.Module, path: str | Path, name: str) -> None:
    """Load into ``teacher`` the weights that a Lightning checkpoint holds of the submodule ``name``, and no others.

    Names are compared without ``torch.compile``. Of the file, only these weights come into memory.

    Args:
        teacher: without ``torch.compile``; a :func:`~prox24_lightning.finetune.frozen_copy` of the submodule, say.
        path: a checkpoint of the same LightningModule, as ``Trainer.save_checkpoint`` writes it.
        name: of the submodule in the LightningModule.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is a folder, as sharded checkpoints are, or holds no state dict or more than plain data; for
            names that are missing or too many, and shapes that differ. ``teacher`` may hold some of the weights then.
    """
    path = Path(path)
    if (path / ".metadata").is_file():
        raise ValueError(
            f"{path} is a sharded checkpoint: run python -m lightning.pytorch.utilities.consolidate_checkpoint {path}, "
            f"and name {path}.consolidated"
        )
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name the checkpoint in it")
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path.absolute()}: train the teacher first, or correct the path")
    prefix = f"{clean_name(name)}."
    state = {clean_name(key): value for key, value in load_state_dict(path, mapped=True).items()}
    weights = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    if not weights:
        raise ValueError(
            f"{path} holds no weight of {prefix[:-1]!r} but {_in_short(list(state))}: name a checkpoint of the same "
            "LightningModule"
        )
    problems = []
    try:
        found = teacher.load_state_dict(weights, strict=False)
        problems += [f"it lacks {_in_short(found.missing_keys)}"] if found.missing_keys else []
        problems += [f"it holds {_in_short(found.unexpected_keys)} besides"] if found.unexpected_keys else []
    except RuntimeError as error:  # a headline, then a line for each shape
        problems += [str(error).strip().split("\n")[-1].strip().rstrip(".")]
    if problems:
        raise ValueError(
            f"{path} does not fit {prefix[:-1]!r}, {'; '.join(problems)}: name a checkpoint of the same "
            "LightningModule with the same arguments, or pass a module as teacher="
        )


def names_24(module: nn.Module) -> list[str]:
    """Return the names of the weights that are 2:4 along their inputs, and not zero."""
    return [
        name
        for name, value in module.named_parameters()
        if value.dim() > 1 and value.shape[1] % 4 == 0 and is_24(value, dim=1) and bool(value.any())
    ]


def weights_checksum(module: nn.Module) -> str:
    """Return the SHA-256 of every tensor in ``module.state_dict()``: name, dtype, shape and bytes.

    Names are those without ``torch.compile``. One tensor at a time is copied to the CPU.
    """
    tensors = {name: value for name, value in module.state_dict().items() if isinstance(value, Tensor)}
    return checksum(part for name, value in tensors.items() for part in (f"{clean_name(name)} ", value))


def memory_bytes(module: nn.Module) -> int:
    """Return the bytes of parameters and buffers, of sharded ones this rank's part; tied ones count once."""
    tensors = [local_part(tensor) for tensor in (*module.parameters(), *module.buffers())]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def teacher_kwargs(teacher: nn.Module, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``kwargs`` without ``labels``, from which a model would compute a loss that nobody reads.

    ``num_items_in_batch``, the divisor of that loss in transformers' models, is left out too. A ``forward`` that
    requires ``labels`` keeps them.
    """
    labels = inspect.signature(teacher.forward).parameters.get("labels")
    needed = labels is not None and labels.default is inspect.Parameter.empty
    left_out = ("num_items_in_batch",) if needed else ("labels", "num_items_in_batch")
    return {key: value for key, value in kwargs.items() if key not in left_out}


@torch.no_grad()
def same_weights(module: nn.Module, other: nn.Module) -> bool:
    """Return whether the parameters of both are equal bit for bit, in order; all ranks call it if any is sharded."""
    pairs = [(gathered(one), gathered(two)) for one, two in zip(module.parameters(), other.parameters(), strict=False)]
    return all(a.shape == b.shape and torch.equal(a, b.to(a)) for a, b in pairs)


def shard_like(teacher: nn.Module, student: nn.Module) -> None:
    """Shard the modules of ``teacher`` by FSDP2 as those of the same names in ``student`` are; others stay whole.

    Each rank keeps its part, and gathers a module while it is called.
    """
    counterparts = {clean_name(name): module for name, module in teacher.named_modules()}
    for name, module in reversed(list(student.named_modules())):  # those inside first
        counterpart = counterparts.get(clean_name(name))
        mesh = _mesh_of(module)
        if mesh is None or counterpart is None or is_fsdp(counterpart):
            continue
        from torch.distributed.fsdp import fully_shard

        fully_shard(counterpart, mesh=mesh, mp_policy=module._get_fsdp_state()._mp_policy, reshard_after_forward=True)


def _in_short(names: Sequence[str]) -> str:
    """Return how many tensors these names are of, and the first two."""
    return f"{len(names)} tensor{'s' * (len(names) > 1)} ({', '.join(names[:2])}{', ...' * (len(names) > 2)})"


def _mesh_of(module: nn.Module) -> Any:
    """Return the mesh over which FSDP2 alone shards the parameters of ``module``; None without one."""
    if not is_fsdp(module):
        return None
    meshes = [parameter.device_mesh for parameter in module.parameters() if is_sharded(parameter)]  # type: ignore[attr-defined]
    return meshes[0] if meshes and all(mesh.ndim == 1 for mesh in meshes) else None
