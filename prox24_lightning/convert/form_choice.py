"""Choose the form of a layer's weight: by the times of all forms, and among 8 and 16 bits by what the user names."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import nn

from prox24_lightning.convert.autotune.kernel_table import DENSE, SAME, KernelTable, TableRow
from prox24_lightning.convert.autotune.time_kernels import Shape
from prox24_lightning.convert.eligibility import Target
from prox24_lightning.convert.layers.siblings import siblings_inside
from prox24_lightning.weights.names import matching
from prox24_lightning.weights.rounding import RoundedForm

LayerForm = Literal["packed", "dense_fp8", "dense"]

OLDEST_CAPABILITY: dict[RoundedForm, tuple[int, int]] = {"fp8_e4m3": (8, 9), "int8": (8, 0)}
"""The compute capability from which tensor cores multiply a form."""

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of linear layers that servers such as vLLM run as one."""


@dataclass(frozen=True)
class FormChoice:
    """The form that a layer takes; ``why`` is "" where it is packed."""

    form: LayerForm
    why: str = ""


@dataclass(frozen=True)
class Joined:
    """Layers that decoding runs as one product, which take one form.

    Attributes:
        names: of the layers.
        shape: (out_features, in_features) of the product.
    """

    names: tuple[str, ...]
    shape: Shape

    @property
    def parts(self) -> tuple[str, ...]:
        """The layers without what their names share: q_proj, k_proj, v_proj."""
        return tuple(name.rpartition(".")[2] for name in self.names)

    @property
    def title(self) -> str:
        return " + ".join(self.parts)


def joined_layers(model: nn.Module, shapes: Mapping[str, Shape], alike: Mapping[str, Hashable]) -> tuple[Joined, ...]:
    """Return which layers of a language model of transformers decoding runs as one.

    Args:
        model: any model; it is called with one token if it, or a part of it, is such a language model.
        shapes: (out_features, in_features) of the layers that a form is chosen for, by name.
        alike: of each of them what must be the same in layers that are joined, such as dtype and form.
    """
    found = []
    for siblings in siblings_inside(model):
        names = siblings.names
        if siblings.repeated or any(name not in shapes for name in names):
            continue
        if len({(alike[name], shapes[name][1]) for name in names}) == 1:
            found.append(Joined(names, (sum(shapes[name][0] for name in names), shapes[names[0]][1])))
    return tuple(found)


def form_problem(form: RoundedForm | None, target: Target) -> str | None:
    """Return why a GPU cannot multiply weights of a form; None if it can."""
    if form is None or target.capability >= OLDEST_CAPABILITY[form]:
        return None
    has, needs = (".".join(map(str, version)) for version in (target.capability, OLDEST_CAPABILITY[form]))
    return f"{form} needs compute capability {needs}, {target.name} has {has}: use int8 there"


def choose_form(table: KernelTable, token_counts: Sequence[int]) -> FormChoice:
    """Return the form of a layer that is used at some numbers of tokens.

    It is packed if that is nowhere slower than the fastest dense form. Dense float8 is among these if the table is of
    fp8_e4m3, with the same values: then a layer may take that form, if it is nowhere slower than 16 bits.

    Args:
        table: of the layer's shape and form.
        token_counts: numbers of tokens that have been measured.
    """
    rows = [row for row in table.rows if row.tokens in token_counts]
    if table.form is None:
        decision = table.decision(token_counts)
        return FormChoice("packed") if decision is None else FormChoice("dense", decision)
    fp8 = table.form == "fp8_e4m3"
    slower = _slower([(row, _least((row.speedup, row.speedup_over_fp8 if fp8 else None))) for row in rows])
    if slower is None and any(row.kernel != DENSE for row in rows):
        return FormChoice("packed")
    why = f"packed is {slower or 'nowhere faster'}"
    ratios = [row.dense_us / row.dense_fp8_us for row in rows if row.dense_us is not None and row.dense_fp8_us]
    if fp8 and rows and len(ratios) == len(rows) and min(ratios) >= SAME:
        return FormChoice("dense_fp8", f"{why}: dense in float8")
    return FormChoice("dense", f"{why}: stays dense")


def choose_forms(
    shapes: Mapping[str, Shape],
    joined: Iterable[Joined],
    tables: Mapping[Shape, KernelTable],
    token_counts: Sequence[int],
) -> dict[str, FormChoice]:
    """Return the form of each layer: joined ones take that of their product, the others choose alone.

    Args:
        shapes: (out_features, in_features) of each layer.
        joined: from :func:`joined_layers`.
        tables: of all shapes, joined ones too.
        token_counts: numbers of tokens that have been measured.
    """
    chosen = {name: choose_form(tables[shape], token_counts) for name, shape in shapes.items()}
    for one in joined:
        choice = choose_form(tables[one.shape], token_counts)
        why = f"{choice.why} (measured as one: {one.title})" if choice.why else ""
        chosen.update(dict.fromkeys(one.names, replace(choice, why=why)))
    return chosen


def layers_of_16_bits(names: Iterable[str], keep_16bit: Sequence[str]) -> frozenset[str]:
    """Return the layers that are not rounded: those that a pattern matches, and what servers run as one with them.

    Args:
        names: of all layers that could be rounded.
        keep_16bit: their names, or shell patterns of them.

    Raises:
        ValueError: for a pattern that matches none.
    """
    names = list(names)
    found: set[str] = set()
    for pattern in keep_16bit:
        matched = [name for name in names if matching({name}, [pattern])]
        if not matched:
            raise ValueError(f"keep_16bit={pattern!r} matches no layer that is rounded; check it for typing errors")
        found.update(matched)
    for name in list(found):
        parent, _, last = name.rpartition(".")
        group = next((group for group in FUSED if last in group), ())
        found.update(other for part in group if (other := f"{parent}.{part}") in names)
    return frozenset(found)


def _least(values: Sequence[float | None]) -> float | None:
    return min((value for value in values if value is not None), default=None)


def _slower(speedups: Sequence[tuple[TableRow, float | None]]) -> str | None:
    """Say where the packed form is slower than a dense one; None if nowhere."""
    found = [f"{x:.2f} x at {row.tokens}" for row, x in speedups if x is not None and x < SAME]
    return f"slower than dense ({', '.join(found)} tokens)" if found else None
