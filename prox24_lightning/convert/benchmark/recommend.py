"""Name the fastest form of a model's weights within an error that the user accepts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from prox24_lightning.convert.benchmark.report import ShapeResult, TokenResult
from prox24_lightning.weights.rounding import RoundedForm

DENSE, DENSE_FP8, PACKED = "dense, 16 bits", "dense, float8", "2:4, 16 bits"


@dataclass(frozen=True)
class FormResult:
    """A form of the weights of all measured layers.

    Attributes:
        name: of the form.
        speedup: over dense layers of 16 bits, the geometric mean over layers and numbers of tokens; None if it was not
            measured at all of them.
        error: the largest relative error of a layer's output.
    """

    name: str
    speedup: float | None
    error: float


def form_us(result: TokenResult, rounded: RoundedForm | None) -> dict[str, float | None]:
    """Return microseconds of each form at one number of tokens, from a CUDA graph where it could be captured."""
    fp8 = result.fp8_eager if result.graph is None else result.fp8_graph
    packed = result.best.sparse.median_us
    found = {
        DENSE: result.best.dense.median_us,
        DENSE_FP8: None if fp8 is None else fp8.median_us,
        PACKED: packed if rounded is None else result.packed_16_us,
    }
    return found if rounded is None else {**found, packed_name(rounded): packed}


def packed_name(form: RoundedForm) -> str:
    """Return the name of the packed form of 8 bits."""
    return f"2:4, {form}"


def compare_forms(shapes: Sequence[ShapeResult], rounded: RoundedForm | None) -> tuple[FormResult, ...]:
    """Return each form's speed-up and error over all layers, dense first; empty if nothing was timed."""
    points = [(shape.products, result) for shape in shapes for result in shape.tokens]
    if not points:
        return ()
    times = [form_us(result, rounded) for _, result in points]
    layers = sum(count for count, _ in points)
    packed_error = max(result.output_error for _, result in points)
    errors = {
        DENSE: 0.0,
        DENSE_FP8: max((result.fp8_error or 0.0) for _, result in points),
        PACKED: packed_error if rounded is None else 0.0,
    }
    found = []
    for name in times[0]:
        logs = [
            count * math.log(dense / us)
            for (count, _), each in zip(points, times, strict=True)
            if (us := each[name]) is not None and (dense := each[DENSE]) is not None
        ]
        speedup = math.exp(sum(logs) / layers) if len(logs) == len(points) else None
        found.append(FormResult(name, speedup, errors.get(name, packed_error)))
    return tuple(found)


def recommendation(forms: Sequence[FormResult], max_error: float) -> str | None:
    """Say which form is the fastest within ``max_error``, and what the others give; None without a form."""
    if not forms:
        return None
    allowed = [form for form in forms if form.speedup is not None and form.error <= max_error]
    best = max(allowed, key=lambda form: form.speedup or 0.0)
    others = ", ".join(_in_words(form, max_error) for form in forms if form not in (best, forms[0]))
    text = (
        f"Fastest within an output error of {max_error:g}: {best.name} ({best.speedup:.2f} x dense, error "
        f"{best.error:.1e})."
    )
    if best.name == DENSE:
        text += " No other form is faster: leave the model as it is."
    elif best.name == DENSE_FP8:
        text += " 2:4 is not needed for that speed: plain float8 of the dense model gives it."
    return f"{text} Others: {others}." if others else text


def _in_words(form: FormResult, max_error: float) -> str:
    if form.speedup is None:
        return f"{form.name} not measured"
    beyond = f", error {form.error:.1e}" if form.error > max_error else ""
    return f"{form.name} {form.speedup:.2f} x{beyond}"
