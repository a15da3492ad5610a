"""Choose the weights of a model that are stored packed, and load a packed file into a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from prox24_lightning.convert.autotune.tune import stored_table
from prox24_lightning.convert.convert import insert_layers, target_of
from prox24_lightning.convert.eligibility import DTYPES, check_model, named_layers
from prox24_lightning.convert.form_choice import FUSED, form_problem
from prox24_lightning.convert.format.packed_weight import PACKED_DTYPES
from prox24_lightning.convert.format.reader import PackedFile
from prox24_lightning.convert.format.shards import PackedModel
from prox24_lightning.convert.kernels.buffers import to_buffer
from prox24_lightning.convert.layers.semi_structured_linear import SemiStructuredLinear
from prox24_lightning.mask import Violations, violations_24
from prox24_lightning.weights.eligibility import fit_groups
from prox24_lightning.weights.layer_matrix import is_transposed_linear, transposed_kind
from prox24_lightning.weights.names import clean_name, matching


@dataclass(frozen=True)
class Packable:
    """Result of :func:`find_packable`: weight name -> dimension of its groups, and name -> why it stays dense."""

    dims: dict[str, int]
    dense: dict[str, str]


def find_packable(
    model: nn.Module, *, targets: Sequence[str] | None = None, skip: Sequence[str] | None = None
) -> Packable:
    """Find every linear or convolution weight that is strictly 2:4 along its inputs, or else along its outputs.

    Args:
        model: on any device; unchanged.
        targets: shell patterns of weight or module names that must be packed; None takes every weight that can be.
        skip: patterns of weights or modules that are stored dense.

    Raises:
        ValueError: for a target that is not 2:4 or cannot be packed, and for a weight of which most groups are 2:4 but
            not all, which is damaged: with its name and the first violations. For a pattern that matches nothing.
    """
    dims: dict[str, int] = {}
    dense: dict[str, str] = {}
    unused = {*(targets or ()), *(skip or ())}
    seen: set[int] = set()
    for module_name, module in named_layers(model):
        for parameter_name, parameter in module.named_parameters(recurse=False):
            name = f"{module_name}.{parameter_name}" if module_name else parameter_name
            if parameter.dim() < 2 or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            wanted, skipped = (matching({name, module_name}, patterns or ()) for patterns in (targets, skip))
            unused -= {*wanted, *skipped}
            if skipped or (targets is not None and not wanted):
                dense[name] = f"skip={skipped[0]!r}" if skipped else "not among the targets"
                continue
            reason, dim = fit_groups(module, parameter_name, parameter, "row")
            if reason is None and parameter.dtype not in PACKED_DTYPES:
                reason = f"{parameter.dtype} is not packed"
            if reason is None:
                found = _groups_dim(parameter, dim, fit_groups(module, parameter_name, parameter, "column")[1])
                if isinstance(found, int):
                    dims[name] = found
                    continue
                if found.count <= found.groups // 2:
                    raise ValueError(
                        f"{name} is not 2:4, though most of it is: {found}; prune it again, or store it dense: "
                        f"skip={name!r}"
                    )
                reason = f"not 2:4: {found.in_short()}"
            if wanted:
                raise ValueError(f"{name} of shape {tuple(parameter.shape)} cannot be packed: {reason}")
            dense[name] = reason
    if unused:
        raise ValueError(f"{sorted(unused)[0]!r} matches no weight of the model; check it for typing errors")
    if targets is None:
        _keep_fused_together(dims, dense)
    return Packable(dims, dense)


def _keep_fused_together(dims: dict[str, int], dense: dict[str, str]) -> None:
    """Store the weights that servers run as one layer packed as a whole or dense as a whole."""
    own = dict(dense)
    for name in list(dims):
        parent, _, last = name.removesuffix(".weight").rpartition(".")
        group = next((group for group in FUSED if last in group), ())
        if stored := [other for other in group if f"{parent}.{other}.weight" in own]:
            dense[name] = f"servers run it as one layer with {stored[0]}, which is stored dense"
            del dims[name]


def _groups_dim(weight: Tensor, dim: Any, other: Any) -> int | Violations:
    """Return the dimension along which the weight is 2:4, or the violations along its inputs.

    Args:
        weight: a matrix, or more dimensions.
        dim: dimension of its inputs.
        other: dimension of its outputs.
    """
    found = violations_24(weight, dim=dim, limit=3)
    if not found:
        return dim
    if weight.shape[other] % 4 == 0 and not violations_24(weight, dim=other, limit=0):
        return other
    return found


class EmptyOnMeta(TorchFunctionMode):
    """Let ``torch.empty`` make meta tensors, so that a model is built without the memory of its weights.

    Layers allocate weights with ``torch.empty``, and compute buffers (rotary frequencies, position numbers) with other
    functions: those buffers get their values.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


@torch.inference_mode(False)  # the model gets ordinary parameters, which can be trained
@torch.no_grad()
def load_packed(
    model: nn.Module, file: PackedFile | PackedModel, *, device: torch.device | str | None = None, sparse: bool = False
) -> tuple[str, ...]:
    """Load the tensors of a packed file into ``model``, one after the other: each replaces the model's own.

    Args:
        model: with the structure of the file; its weights may be on the meta device. Dtypes become the file's.
        file: the open file.
        device: where the tensors go; None leaves each where the model has it (from meta: CPU).
        sparse: packed weights are not expanded where the layer can run sparse on ``device``, a GPU: it becomes a
            :class:`~prox24_lightning.convert.layers.semi_structured_linear.SemiStructuredLinear`, whose kernels were
            measured before on this machine, or are chosen by rule. The dense model is never in memory.

    Returns:
        Names of the layers that are sparse now.

    Raises:
        ValueError: if names or shapes differ, or a trainable parameter is stored as integers, before anything is
            changed; if the file is damaged; for ``sparse`` without a GPU that can run it.
    """
    _check_fit(model, file)
    layers = _sparse_layers(model, file, torch.device(device or "cpu")) if sparse else {}
    _load_dense(model, file, layers, device)
    insert_layers(model, _converted(model, file, layers, device))
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise ValueError(f"{name} is a meta tensor and no part of the state dict: build the model with its values")
    if device is not None:
        model.to(device)
    return tuple(layers)


def _check_fit(model: nn.Module, file: PackedFile | PackedModel) -> None:
    slots = {name: (owner, attribute) for name, owner, attribute in _state_slots(model)}
    missing, unknown = sorted(set(slots) - set(file.names)), sorted(set(file.names) - set(slots))
    if missing and (start := _start_of_names(slots, file.names)):
        inner = start.rstrip(".")
        raise ValueError(
            f"{file.path} is of a module, a LightningModule perhaps, that holds this model as {inner!r}: every name in "
            f"it begins with {start!r}; load it into that module, or into torch.nn.ModuleDict({{{inner!r}: model}})"
        )
    if missing or unknown:
        raise ValueError(f"{file.path} is of another model: it lacks {missing[:3]}, and the model lacks {unknown[:3]}")
    for name, (owner, attribute) in slots.items():
        if file.shape(name) != tuple(owner[attribute].shape):
            raise ValueError(f"{name} has shape {tuple(owner[attribute].shape)}, and {file.shape(name)} in {file.path}")
        if owner[attribute].requires_grad and not file.dtype(name).is_floating_point:
            raise ValueError(
                f"{name} is trainable in the model and stored as {file.dtype(name)} in {file.path}, which has no "
                "gradient: call requires_grad_(False) on it first"
            )


def _start_of_names(known: Iterable[str], stored: Iterable[str]) -> str:
    """Return what every stored name has before a known one, where that is the name of one submodule; else ""."""
    known, stored = set(known), set(stored)
    start = next(iter(stored), "").partition(".")[0] + "."
    return start if stored == {start + name for name in known} else ""


def _load_dense(
    model: nn.Module, file: PackedFile | PackedModel, layers: Mapping[str, str], device: torch.device | str | None
) -> None:
    """Read everything except the weights of ``layers``, whose modules are replaced."""
    replaced = {id(module._parameters) for name, module in named_layers(model) if name in layers}
    done: dict[str, Tensor] = {}
    for name, owner, attribute in list(_state_slots(model)):
        if id(owner) in replaced and attribute == "weight":
            continue
        stored, old = file.owner(name), owner[attribute]
        if stored not in done:
            new = file.read(stored, device or ("cpu" if old.is_meta else old.device))
            done[stored] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
        owner[attribute] = done[stored]


def _sparse_layers(model: nn.Module, file: PackedFile | PackedModel, device: torch.device) -> dict[str, str]:
    """Return module name -> weight name of the layers that can run sparse on ``device``."""
    target = target_of(device)
    if target is None or target.problem is not None:
        raise ValueError(f"sparse=True needs a GPU with sparse tensor cores, device={device} is none")
    modules = dict(named_layers(model))
    found = {}
    for verdict in check_model(model, target=target, values=False):
        weight = f"{verdict.name}.weight"
        entry = file.packed.get(file.owner(weight))
        along_inputs = (
            entry is not None
            and entry.dim == (0 if is_transposed_linear(modules[verdict.name]) else 1)
            and form_problem(entry.form, target) is None
        )
        if verdict.name and verdict.runs and along_inputs and file.dtype(weight) in DTYPES:
            found[verdict.name] = weight
    return found


def _converted(
    model: nn.Module, file: PackedFile | PackedModel, layers: Mapping[str, str], device: torch.device | str | None
) -> Iterator[tuple[str, SemiStructuredLinear]]:
    modules = dict(named_layers(model))
    for name, weight in layers.items():
        packed = file.read_packed(weight, device or "cpu")
        table = stored_table(packed.shape, packed.dtype, device=packed.values.get_device(), form=packed.form)
        dense = modules.pop(name)
        bias, kind = getattr(dense, "bias", None), transposed_kind(dense)
        del dense  # no reference keeps the dense layer alive when it is replaced
        buffer, shape, dtype = to_buffer(packed), packed.shape, packed.dtype
        yield name, SemiStructuredLinear(buffer, shape, dtype, bias, table.text, None, kind, packed.form).eval()


def _state_slots(model: nn.Module) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Yield name, owning dictionary and key of each tensor of the state dict; shared ones under each of their names."""
    known = {clean_name(name) for name in model.state_dict()}
    for module_name, module in model.named_modules(remove_duplicate=False):
        if hasattr(module, "_orig_mod"):
            continue
        for owner in (module._parameters, module._buffers):
            for attribute, tensor in owner.items():
                name = clean_name(f"{module_name}.{attribute}" if module_name else attribute)
                if tensor is not None and name in known:
                    yield name, owner, attribute
