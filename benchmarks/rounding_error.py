"""Relative error of a layer's output in each form of the weights, Gaussian weights and inputs: what the guide quotes.

python -m benchmarks.rounding_error
"""

from __future__ import annotations

from pathlib import Path

import torch
from jsonargparse import auto_cli
from torch import Tensor

from benchmarks.result_files import write_result
from prox24_lightning.convert.kernels.round_tokens.reference import round_tokens
from prox24_lightning.mask import mask_24
from prox24_lightning.weights.rounding import RoundedForm, expand_rows, round_weight

FORMS: tuple[RoundedForm, ...] = ("fp8_e4m3", "int8")


def relative_errors(
    out_features: int, in_features: int, tokens: int, outlier: float = 1.0, seed: int = 0
) -> dict[str, float]:
    """Return the norm of each form's error over the norm of the exact output.

    Args:
        out_features: rows of the 2:4 weight.
        in_features: its columns.
        tokens: rows of the inputs.
        outlier: one input of a hundred is this many times larger.
        seed: of weight and inputs.
    """
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, in_features, generator=generator)
    weight *= mask_24(weight)
    inputs = torch.randn(tokens, in_features, generator=generator)
    inputs[:, ::100] *= outlier
    exact = inputs.double() @ weight.double().t()

    def error(rounded_inputs: Tensor, rounded_weight: Tensor) -> float:
        output = (rounded_inputs.double() @ rounded_weight.double().t()).bfloat16()
        return float((output.double() - exact).norm() / exact.norm())

    found = {"bf16": error(inputs.bfloat16(), weight.bfloat16())}
    for form in FORMS:
        rounded = round_tokens(inputs, form)
        found[form] = error(expand_rows(rounded.values, rounded.scales, torch.float32), round_weight(weight, form))
    return found


def main(
    output: Path = Path("benchmarks/results"), out_features: int = 1024, in_features: int = 2048, tokens: int = 256
) -> None:
    """Measure and write the table.

    Args:
        output: folder for the Markdown and JSON result.
        out_features: rows of the weight.
        in_features: its columns.
        tokens: rows of the inputs.
    """
    rows = [
        {"inputs": name, **relative_errors(out_features, in_features, tokens, outlier)}
        for name, outlier in (("Gaussian", 1.0), ("one in a hundred ten times larger", 10.0))
    ]
    note = f"2:4 weight {out_features} x {in_features}, {tokens} tokens; scales a row and a token, output in bfloat16."
    title = "Relative error of a layer's output by the form of its weights"
    write_result(output, "rounding/layer", title, rows, note=note)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
