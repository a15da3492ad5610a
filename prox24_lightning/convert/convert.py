"""Replace dense linear layers with 2:4 zeros by layers on sparse tensor cores, and back.

:func:`convert_linear` and :func:`convert_model` pack, :func:`expand_linear` and :func:`expand_model` undo it. Kernels
and plans are known to :class:`~prox24_lightning.convert.layers.semi_structured_linear.SemiStructuredLinear` alone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from prox24_lightning.convert.autotune.kernel_table import BUCKETS, KernelTable
from prox24_lightning.convert.autotune.tune import kernel_tables, stored_table
from prox24_lightning.convert.eligibility import (
    LayerVerdict,
    Target,
    check_layer,
    check_model,
    find_target,
)
from prox24_lightning.convert.form_choice import (
    FormChoice,
    Joined,
    choose_forms,
    form_problem,
    joined_layers,
    layers_of_16_bits,
)
from prox24_lightning.convert.kernels.buffers import pack_buffer
from prox24_lightning.convert.layers.dense_fp8_linear import DenseFp8Linear
from prox24_lightning.convert.layers.semi_structured_linear import SemiStructuredLinear
from prox24_lightning.convert.module_slots import exchange, module_in, slots_by_name
from prox24_lightning.weights.layer_matrix import is_transposed_linear, transposed_kind
from prox24_lightning.weights.rounding import VALUE_DTYPES, RoundedForm, WeightForm, round_rows, round_weight

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_always_called",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


@dataclass(frozen=True)
class Conversion:
    """Result of :func:`convert_model`: names of the converted layers, and the verdicts of those that stay dense.

    ``tables`` holds the kernels of each shape if they were measured; see
    :func:`~prox24_lightning.convert.kernel_report.print_kernels`. ``dense_fp8`` names those of the converted layers
    that are dense in float8, with the reason.
    """

    converted: tuple[str, ...]
    dense: tuple[LayerVerdict, ...]
    tables: tuple[KernelTable, ...] = ()
    dense_fp8: Mapping[str, str] = field(default_factory=dict)


@torch.no_grad()
def convert_linear(
    linear: nn.Module,
    *,
    name: str = "layer",
    kernels: KernelTable | None = None,
    keep_dense: bool = False,
    weights: WeightForm | None = None,
    input_scale: float | None = None,
) -> SemiStructuredLinear:
    """Return a sparse layer of a linear layer (``nn.Linear``, or Hugging Face's ``Conv1D``) in 16 bits on a GPU.

    The layer itself is not changed. The packed weight is expanded once and compared with the dense one.

    Args:
        linear: the layer.
        name: for errors.
        kernels: from :func:`~prox24_lightning.convert.autotune.tune.kernel_tables`. None: those measured for this
            shape on this machine before, the rest by rule.
        keep_dense: keep the dense weight too, for the numbers of tokens at which ``kernels`` names cuBLAS.
        weights: "fp8_e4m3" or "int8" round the weight to 8 bits with a scale a row, and the inputs token by token;
            "bf16" and "fp16" are the layer's own dtype; None keeps that.
        input_scale: what a unit of rounded inputs stands for, for all tokens; None gives each token its own.

    Raises:
        ValueError: if the layer cannot run sparse, with its name and every reason; among them a weight that is not
            strictly 2:4, with the first violations, a row that cannot be rounded, and a GPU that does not multiply the
            form.
        RuntimeError: if the packed weight differs from the dense one.
    """
    dense, bias = _convertible(linear, name, weights)
    form = _rounded(weights)
    shape = dense.shape[0], dense.shape[1]
    if kernels is None:
        kernels = stored_table(shape, dense.dtype, keep_dense=keep_dense, device=dense.get_device(), form=form)
    buffer, kind = pack_buffer(dense, form, input_scale=input_scale, name=name), transposed_kind(linear)
    kept = None
    if keep_dense:
        kept = dense.contiguous() if form is None else round_weight(dense.contiguous(), form, name=name)
    layer = SemiStructuredLinear(buffer, shape, dense.dtype, bias, kernels.text, kept, kind, form).eval()
    _share_hooks(linear, layer)
    return layer


@torch.no_grad()
def convert_dense_fp8(
    linear: nn.Module,
    *,
    name: str = "layer",
    kernels: KernelTable | None = None,
    input_scale: float | None = None,
) -> DenseFp8Linear:
    """Return a layer of a linear layer on a GPU that keeps the rounded weight dense in float8; arguments and errors as
    of :func:`convert_linear`."""
    dense, bias = _convertible(linear, name, "fp8_e4m3")
    shape = dense.shape[0], dense.shape[1]
    if kernels is None:
        kernels = stored_table(shape, dense.dtype, device=dense.get_device(), form="fp8_e4m3")
    rounded = round_rows(dense, "fp8_e4m3", name=name)
    kind = transposed_kind(linear)
    layer = DenseFp8Linear(rounded, dense.dtype, bias, kernels.dense_fp8_text, kind, input_scale).eval()
    _share_hooks(linear, layer)
    return layer


def _convertible(linear: nn.Module, name: str, weights: WeightForm | None) -> tuple[Tensor, Tensor | None]:
    """Return weight (out_features, in_features) and bias of a layer that can run sparse."""
    weight, bias = getattr(linear, "weight", None), getattr(linear, "bias", None)
    target = target_of(weight.device) if isinstance(weight, Tensor) else None
    verdict = check_layer(linear, name=name, target=target)
    if not verdict.runs or target is None or target.backend is None or not isinstance(weight, Tensor):
        where = f" (the layer is on {weight.device}: move it)" if isinstance(weight, Tensor) and target is None else ""
        raise ValueError(f"{name} of shape {verdict.shape} cannot become a sparse layer: {verdict.why}{where}")
    if (problem := _form_problem(weight.dtype, weights, target)) is not None:
        raise ValueError(f"{name} of shape {verdict.shape} cannot become a sparse layer: {problem}")
    return weight.detach().t() if is_transposed_linear(linear) else weight.detach(), bias


def _form_problem(dtype: torch.dtype, weights: WeightForm | None, target: Target) -> str | None:
    """Return why weights of a dtype do not take a form on a GPU; None if they do."""
    form = _rounded(weights)
    if form is None and weights is not None and VALUE_DTYPES[weights] != dtype:
        return f"weights={weights!r} and the model is {dtype}: cast the model first"
    return form_problem(form, target)


def _rounded(weights: WeightForm | None) -> RoundedForm | None:
    return weights if weights == "fp8_e4m3" or weights == "int8" else None


def _share_hooks(source: nn.Module, layer: nn.Module) -> None:
    for hooks in _HOOKS:  # the same dictionaries, so that handles can still remove their hooks
        setattr(layer, hooks, getattr(source, hooks))


def convert_model(
    model: nn.Module,
    names: Iterable[str] | None = None,
    *,
    token_counts: Sequence[int] | None = None,
    keep_dense: bool = False,
    empty_dense: bool = False,
    weights: WeightForm | None = None,
    dense_fp8: Collection[str] = (),
    input_scales: Mapping[str, float] | None = None,
    keep_16bit: Sequence[str] = (),
) -> Conversion:
    """Convert the linear layers of ``model`` in place, one after the other; each dense weight is freed on the way.

    Args:
        model: on a GPU, in float16 or bfloat16. For inference: the converted layers have no backward.
        names: modules to convert. None takes every layer that can run sparse.
        token_counts: measure every shape at these numbers of tokens first (once a machine: times are kept on disk),
            and leave layers dense that would be slower at any of them. None: nothing is measured, and kernels are
            chosen from earlier measurements, or by rule. Layers of a language model of transformers that decoding runs
            as one (query, key and value; gate and up) are measured as one too, and take one form; for that the model
            is called with one token.
        keep_dense: keep the dense weights as well, and let cuBLAS take the numbers of tokens at which it is faster.
        empty_dense: free the weights of the layers that were replaced even if an optimizer, or anything else outside
            the model, still refers to them; tied weights are never converted.
        weights: "fp8_e4m3" or "int8" round the weights to 8 bits with a scale a row, and each layer's inputs token by
            token. With fp8_e4m3 and ``token_counts`` a layer that is slower packed than dense in float8 takes that form
            (:class:`~prox24_lightning.convert.layers.dense_fp8_linear.DenseFp8Linear`). "bf16" and "fp16" must be the
            model's own dtype, which None keeps.
        dense_fp8: layers that become dense in float8, whatever was measured.
        input_scales: fixed scales of the inputs by layer, from
            :func:`~prox24_lightning.convert.input_scales.measure_input_scales`; of the other layers each token has the
            scale that it needs.
        keep_16bit: names of layers, or patterns, that stay packed in 16 bits where ``weights`` rounds the others, from
            :func:`~prox24_lightning.oneshot.rounding.round_model.round_model` for instance; layers that servers run as
            one have one form.

    Raises:
        ValueError: if a named layer does not exist or cannot run sparse, token_counts are not whole numbers from 1 up,
            ``weights`` is not possible here, or ``input_scales`` or ``keep_16bit`` are given without rounded weights;
            nothing is converted then. If a row cannot be rounded, by the layer's name; layers before it are converted
            then.
    """
    if weights not in (*VALUE_DTYPES, None):
        raise ValueError(f"weights={weights!r} is unknown; use one of {', '.join(VALUE_DTYPES)}, or None")
    if token_counts is not None and (not token_counts or min(token_counts) < 1):
        raise ValueError(f"token_counts={token_counts!r} must be one or more whole numbers from 1 up, or None")
    if input_scales and _rounded(weights) is None:
        raise ValueError(f"input_scales are for rounded weights, and weights={weights!r}: leave them out")
    if keep_16bit and _rounded(weights) is None:
        raise ValueError(f"keep_16bit is for rounded weights, and weights={weights!r}: leave it out")
    fixed = input_scales or {}
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    target = target_of(device)
    verdicts = {verdict.name: verdict for verdict in check_model(model, dtype=None, target=target)}
    wanted = [name for name, verdict in verdicts.items() if verdict.runs] if names is None else list(names)
    for name in wanted:
        if name not in verdicts:
            raise ValueError(f"the model has no layer {name!r} with a weight; names are those of named_modules()")
        if not verdicts[name].runs:
            raise ValueError(
                f"{name} of shape {verdicts[name].shape} cannot become a sparse layer: {verdicts[name].why}"
            )
    slots = slots_by_name(model)
    exact = layers_of_16_bits(wanted, keep_16bit)
    if both := sorted(exact.intersection(dense_fp8)):
        raise ValueError(f"{both[0]} is to be dense in float8 and to keep 16 bits: name it in one of the two")
    for name in wanted:
        dtype = module_in(slots[name]).get_parameter("weight").dtype if slots[name] else None
        if target is not None and dtype is not None and (problem := _form_problem(dtype, weights, target)) is not None:
            raise ValueError(f"{name}: {problem}")
        if not slots[name]:
            raise ValueError(f"the model is a bare {verdicts[name].kind}: pass it to convert_linear instead")
    forms = {name: None if name in exact else _rounded(weights) for name in wanted}
    measured = _Measured()
    if token_counts is not None:
        kinds = {name: (module_in(slots[name]).get_parameter("weight").dtype, forms[name]) for name in wanted}
        shapes = {name: _pair(verdicts[name].shape) for name in wanted}
        alone = wanted if keep_dense else dense_fp8  # layers with a dense weight beside are not joined
        alike = {name: (kinds[name], fixed.get(name), verdicts[name].bias) for name in wanted if name not in alone}
        joined = joined_layers(model, {name: shapes[name] for name in alike}, alike)
        measured = _measure(kinds, shapes, joined, token_counts, keep_dense=keep_dense, device=device)
    converted = []
    in_fp8 = dict.fromkeys(dense_fp8, "asked for by name")
    for name in wanted:
        layer = module_in(slots[name])
        table = measured.own.get(name)
        if table is not None and name not in in_fp8:
            choice = measured.choices[name]
            if choice.form == "dense":
                verdicts[name] = replace(verdicts[name], machine=choice.why)
                continue
            if choice.form == "dense_fp8":
                in_fp8[name] = choice.why
        if name in in_fp8:
            fp8 = convert_dense_fp8(layer, name=name, kernels=table, input_scale=fixed.get(name))
            exchange(slots[name], fp8)
        else:
            found_layer = convert_linear(
                layer,
                name=name,
                kernels=table,
                keep_dense=keep_dense,
                weights=None if name in exact else weights,
                input_scale=None if name in exact else fixed.get(name),
            )
            exchange(slots[name], found_layer)
        converted.append(name)
        if empty_dense:
            weight = layer.get_parameter("weight")
            weight.data, weight.grad = weight.new_empty(0), None
        del layer
    dense = tuple(verdict for name, verdict in verdicts.items() if name not in converted)
    return Conversion(tuple(converted), dense, tuple(measured.tables), in_fp8)


@dataclass(frozen=True)
class _Measured:
    """The kernels of each layer by itself, its form, and all tables that were measured."""

    own: dict[str, KernelTable] = field(default_factory=dict)
    choices: dict[str, FormChoice] = field(default_factory=dict)
    tables: list[KernelTable] = field(default_factory=list)


def _measure(
    kinds: Mapping[str, tuple[torch.dtype, RoundedForm | None]],
    shapes: Mapping[str, tuple[int, int]],
    joined: Sequence[Joined],
    token_counts: Sequence[int],
    *,
    keep_dense: bool,
    device: torch.device,
) -> _Measured:
    """Measure layers of each dtype and form, alone and joined, and choose their forms."""
    done = _Measured()
    counts = sorted({*token_counts, *BUCKETS})
    for kind in dict.fromkeys(kinds.values()):
        dtype, form = kind
        mine = {name: shape for name, shape in shapes.items() if kinds[name] == kind}
        together = [one for one in joined if one.names[0] in mine]
        titles = {
            shape: ", ".join(dict.fromkeys(one.title for one in together if one.shape == shape))
            for shape in dict.fromkeys(one.shape for one in together)
        }
        wanted = list(dict.fromkeys([*mine.values(), *titles]))
        found = kernel_tables(wanted, dtype, token_counts=counts, keep_dense=keep_dense, device=device, form=form)
        done.own.update({name: found[shape] for name, shape in mine.items()})
        done.choices.update(choose_forms(mine, together, found, token_counts))
        done.tables.extend(found[shape] for shape in dict.fromkeys(mine.values()))
        done.tables.extend(replace(found[shape], joined=title) for shape, title in titles.items())
    return done


@torch.no_grad()
def expand_linear(layer: SemiStructuredLinear) -> nn.Module:
    """Return a dense, trainable layer with exactly the packed values, zeros elsewhere.

    It is an ``nn.Linear``, or a ``Conv1D`` of Hugging Face where the converted layer was one.
    """
    linear: nn.Module
    weight = layer.weight
    if layer.transposed is None:
        linear = nn.Linear(layer.in_features, layer.out_features, device="meta")
    else:
        with torch.device("meta"):
            linear = layer.transposed(layer.out_features, layer.in_features)
        weight = weight.t().contiguous()
    linear.weight = nn.Parameter(weight)
    linear.register_parameter("bias", None if layer.bias is None else nn.Parameter(layer.bias.detach().clone()))
    _share_hooks(layer, linear)
    return linear


def expand_model(model: nn.Module, names: Iterable[str] | None = None) -> tuple[str, ...]:
    """Undo :func:`convert_model` in place, for every converted layer or those in ``names``; return their names.

    Raises:
        ValueError: if a named layer is not a converted one.
    """
    slots = slots_by_name(model)
    converted = [name for name, held in slots.items() if held and isinstance(module_in(held), SemiStructuredLinear)]
    wanted = converted if names is None else list(names)
    for name in wanted:
        if name not in converted:
            raise ValueError(f"{name!r} is not a converted layer of this model")
        layer = module_in(slots[name])
        if isinstance(layer, SemiStructuredLinear):
            exchange(slots[name], expand_linear(layer))
    return tuple(wanted)


def _pair(shape: tuple[int, ...]) -> tuple[int, int]:
    return shape[0], shape[1]


def insert_layers(model: nn.Module, layers: Iterable[tuple[str, nn.Module]]) -> None:
    """Replace the modules of these names by other layers, under every name that the modules have.

    Args:
        model: changed in place.
        layers: (name, layer) pairs, consumed one by one, so that a generator can make each when it is needed.
    """
    slots = slots_by_name(model)
    for name, layer in layers:
        exchange(slots[name], layer)


def target_of(device: torch.device) -> Target | None:
    """Return the GPU of a device; None for the CPU."""
    return find_target(device) if device.type == "cuda" else None
