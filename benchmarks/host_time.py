"""What the host does for a layer in eager mode: dense, packed, and packed with a launch whose structures are made anew.

    python -m benchmarks.host_time

One layer small enough that the GPU waits for the host, called again and again; and decoding one token in eager mode by
some layers of a LLaMA-shaped model. "Made anew" is what a launch did before its structures were prepared.
"""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from ctypes import c_void_p
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from jsonargparse import auto_cli
from torch import nn

from benchmarks.convert_models import build, decode_step
from benchmarks.result_files import RESULTS, write_result
from prox24_lightning.convert import convert_linear, convert_model
from prox24_lightning.convert.kernels import cuda_driver
from prox24_lightning.mask import mask_24

_WIDTH = 1024
_CALLS = 500

Call = Callable[[], Any]


def main(model: str = "8B", layers: int = 8, rounds: int = 15, output: Path = RESULTS, device: str = "cuda") -> None:
    """Time the host and write the table.

    Args:
        model: "tiny", "1B" or "8B", whose layers decode.
        layers: of the model.
        rounds: in which all ways take turns; medians count.
        output: folder for the result.
        device: where it runs; on a CPU nothing is converted, which tries the script out.
    """
    torch.manual_seed(0)
    place = torch.device(device)
    with torch.inference_mode():
        rows = [_row(f"one layer of {_WIDTH} x {_WIDTH}, a token", "us a call", _one_layer(place), rounds, _CALLS, 1e6)]
        rows.append(
            _row(f"decoding, {layers} layers of {model}", "ms a token", _decoding(model, layers, place), rounds)
        )
    note = f"Wall time in eager mode, bfloat16, batch 1, all ways in turns, medians of {rounds} rounds."
    write_result(output, "host_time", "The host's time in eager mode", rows, note=note)


def _one_layer(device: torch.device) -> dict[str, Call]:
    dense = nn.Linear(_WIDTH, _WIDTH, bias=False, device=device, dtype=torch.bfloat16).requires_grad_(False)
    dense.weight.mul_(mask_24(dense.weight))
    packed = convert_linear(dense, name="layer") if device.type == "cuda" else dense
    x = torch.randn(1, 1, _WIDTH, device=device, dtype=torch.bfloat16)
    return {"dense": lambda: dense(x), "packed": lambda: packed(x)}


def _decoding(name: str, layers: int, device: torch.device) -> dict[str, Call]:
    dense = build(name, device, layers)
    packed = copy.deepcopy(dense)
    if device.type == "cuda":
        convert_model(packed)
    return {"dense": decode_step(dense, 1, device), "packed": decode_step(packed, 1, device)}


def _row(
    what: str, unit: str, calls: dict[str, Call], rounds: int, repeats: int = 20, scale: float = 1000.0
) -> dict[str, Any]:
    ways = {**calls, "packed, made anew": calls["packed"]}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 2):
        for name, call in ways.items():
            with _made_anew() if name.endswith("anew") else nullcontext():
                _wait()
                start = perf_counter()
                for _ in range(repeats):
                    call()
                _wait()
                if number >= 2:  # before that kernels are compiled and prepared
                    times[name].append((perf_counter() - start) / repeats)
    return {"what": what, "unit": unit, **{name: median(found) * scale for name, found in times.items()}}


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@contextmanager
def _made_anew() -> Iterator[None]:
    """Inside, a launch makes its structures instead of filling in prepared ones."""
    prepared = cuda_driver.PreparedLaunch.__call__
    cuda_driver.PreparedLaunch.__call__ = _launch_anew
    try:
        yield
    finally:
        cuda_driver.PreparedLaunch.__call__ = prepared


def _launch_anew(
    launch: cuda_driver.PreparedLaunch, grid: tuple[int, int, int], stream: int, arguments: tuple[Any, ...]
) -> int:
    made, kind = launch._config, type(launch._values)
    values = kind(*arguments)
    start = ctypes.addressof(values)
    offsets = [getattr(kind, name).offset for name, *_ in kind._fields_]
    pointers = (c_void_p * len(offsets))(*[start + offset for offset in offsets])
    block = made.block_x, made.block_y, made.block_z, made.shared_bytes
    config = cuda_driver._LaunchConfig(*grid, *block, stream, made.attributes, made.count)
    return launch._launch(ctypes.addressof(config), launch._function, ctypes.addressof(pointers), None)


if __name__ == "__main__":
    auto_cli(main)
