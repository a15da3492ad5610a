"""What 8-bit 2:4 products would give on this machine's GPU, through torch's own operators; no layer here uses them.

    python -m benchmarks.convert_8bit
    python -m benchmarks.convert_8bit --tokens 16 4096 --shapes 4096x4096

Each number of tokens: a dense product in bfloat16 and in 8 bits, and the 2:4 product of cuSPARSELt with its searched
algorithm, replayed from a CUDA graph over several weights in turn. Operands are random and already in 8 bits: what
quantizing the inputs takes is not counted.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.report import write_report
from prox24_lightning.convert.measure.timing import capture, describe, measure, release_memory
from prox24_lightning.mask import mask_24

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336))
_KINDS = {"float8_e4m3": torch.float8_e4m3fn, "int8": torch.int8}
_COPIES = 6

Product = Callable[[Tensor], Tensor]


def _eight_bits(values: Tensor, kind: torch.dtype) -> Tensor:
    return (values * 16).round().clamp(-127, 127).to(kind) if kind == torch.int8 else values.to(kind)


def _dense(inputs: Tensor, kind: torch.dtype) -> Product:
    one = torch.ones((), device=inputs.device)
    if kind == torch.int8:
        return lambda weight: torch._int_mm(inputs, weight.t())
    return lambda weight: torch._scaled_mm(inputs, weight.t(), one, one, out_dtype=torch.bfloat16)


def _sparse(inputs: Tensor, packed: Tensor) -> Product:
    algorithm = torch._cslt_sparse_mm_search(packed, inputs.t(), out_dtype=torch.bfloat16, transpose_result=True)
    return lambda weight: torch._cslt_sparse_mm(
        weight, inputs.t(), out_dtype=torch.bfloat16, transpose_result=True, alg_id=algorithm
    )


def _over(product: Product, weights: Sequence[Tensor]) -> Callable[[], None]:
    def call() -> None:
        for weight in weights:
            product(weight)

    return call


def rows_of(shape: tuple[int, int], token_counts: Sequence[int], rounds: int) -> list[dict[str, Any]]:
    device = torch.device("cuda")
    weights = [torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(_COPIES)]
    for weight in weights:
        weight.mul_(mask_24(weight))
    rows = []
    for tokens in token_counts:
        inputs = torch.randn(tokens, shape[1], device=device, dtype=torch.bfloat16)

        def bfloat16(weight: Tensor, inputs: Tensor = inputs) -> Tensor:
            return F.linear(inputs, weight)

        calls = {"dense bfloat16": _over(bfloat16, weights)}
        problems = []
        for name, kind in _KINDS.items():
            small, eight = _eight_bits(inputs, kind), [_eight_bits(weight, kind) for weight in weights]
            try:
                calls[f"dense {name}"] = capture(_over(_dense(small, kind), eight)).replay
            except RuntimeError as error:
                problems.append(f"dense {name}: {describe(error)}")
            try:
                packed = [torch._cslt_compress(weight) for weight in eight]
                calls[f"2:4 {name}"] = capture(_over(_sparse(small, packed[0]), packed)).replay
            except RuntimeError as error:
                problems.append(f"2:4 {name}: {describe(error)}")
        calls["dense bfloat16"] = capture(calls["dense bfloat16"]).replay
        times = {name: timing.median_us for name, timing in measure(calls, calls=_COPIES, rounds=rounds).items()}
        row: dict[str, Any] = {"layer": f"{shape[0]} x {shape[1]}", "tokens": tokens}
        row |= {f"{kept} us": times.get(kept, float("nan")) for kept in ("dense bfloat16", *_names())}
        for name in _KINDS:
            row[f"x 2:4 against dense, {name}"] = row[f"dense {name} us"] / row[f"2:4 {name} us"]
            row[f"x 2:4 {name} against dense bfloat16"] = row["dense bfloat16 us"] / row[f"2:4 {name} us"]
        rows.append({**row, "problems": "; ".join(problems)})
    return rows


def _names() -> list[str]:
    return [f"{form} {name}" for name in _KINDS for form in ("dense", "2:4")]


def _shape(text: str) -> tuple[int, int]:
    rows, columns = text.split("x")
    return int(rows), int(columns)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[32, 256, 4096], help="multiples of 16")
    parser.add_argument("--shapes", type=_shape, nargs="+", default=SHAPES, help="out x in, as 4096x4096")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    note = "Microseconds a call, from a CUDA graph; x above 1: the 2:4 product is faster. Operands come in 8 bits."
    with torch.no_grad():
        for shape in arguments.shapes:
            rows += rows_of(shape, arguments.tokens, arguments.rounds)
            release_memory()
            write_report(arguments.output, "convert_8bit", "8-bit 2:4 products through torch", rows, note=note)


if __name__ == "__main__":
    main()
