"""What the products with a weight of 8 bits launch, without a GPU: every launch is recorded in place of made."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from prox24_lightning.convert.kernels import rounded_buffer
from prox24_lightning.convert.kernels.many_tokens import kernel as many_tokens
from prox24_lightning.convert.kernels.many_tokens.tiling import TILINGS
from prox24_lightning.convert.kernels.registry import Kernel, prepare
from prox24_lightning.convert.kernels.round_tokens import kernel as round_tokens
from prox24_lightning.convert.kernels.warpgroup import kernel as warpgroup
from prox24_lightning.convert.kernels.warpgroup.tiling import ROUNDED_TILINGS

SHAPE = (192, 384)
BESIDE = next(tiling for tiling in TILINGS if tiling.beside)
ONE_TOKEN = next(tiling for tiling in ROUNDED_TILINGS if tiling.within)


class Launch:
    """A kernel, its grid, and its arguments by name; the compiler's options beside them."""

    def __init__(self, parameters: type, options: tuple, grid: tuple, arguments: tuple) -> None:
        names = [name for name, *_ in parameters._fields_]
        self.grid, self.options = grid, options
        self.arguments = dict(zip(names, arguments, strict=True))


class Recorder:
    """Stands for a kernel on a GPU of 132 multiprocessors."""

    def __init__(self, made: list[Launch], parameters: type, options: tuple) -> None:
        self._made, self._parameters, self._options = made, parameters, options

    def __call__(self, grid: tuple, stream: int, *arguments: object) -> None:
        self._made.append(Launch(self._parameters, self._options, grid, arguments))


@pytest.fixture
def launches(monkeypatch) -> list[Launch]:
    made: list[Launch] = []

    def recorder(parameters: type) -> Callable[..., Recorder]:
        return lambda *options: Recorder(made, parameters, options)

    shim = SimpleNamespace(
        device=lambda *_: "cpu",
        empty=torch.empty,
        int8=torch.int8,
        Tensor=torch.Tensor,
        _C=SimpleNamespace(_cuda_getCurrentRawStream=lambda _: 0),
        cuda=SimpleNamespace(get_device_properties=lambda _: SimpleNamespace(multi_processor_count=132)),
    )
    for module in (many_tokens, warpgroup, round_tokens):
        monkeypatch.setattr(module, "torch", shim)
    monkeypatch.setattr(round_tokens, "_round_function", recorder(round_tokens._RoundParameters))
    monkeypatch.setattr(many_tokens, "_function", recorder(many_tokens._Parameters))
    monkeypatch.setattr(warpgroup, "_function", recorder(warpgroup._Parameters))
    monkeypatch.setattr(many_tokens, "_map", lambda address, *_: address)
    for name in ("_weight_map", "_input_map", "_metadata_map"):
        monkeypatch.setattr(warpgroup, name, lambda address, *_: address)
    return made


def run(kernel: Kernel, tokens: int, shape: tuple[int, int] = SHAPE) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = torch.zeros(tokens, shape[1], dtype=torch.bfloat16)
    buffer = rounded_buffer.random_buffer(shape, "fp8_e4m3", torch.device("cpu"), 0)
    product = prepare(kernel, torch.bfloat16, shape, tokens, 0, "fp8_e4m3")
    assert product(inputs, buffer, None, None).shape == (tokens, shape[0])
    return inputs, buffer


@pytest.mark.parametrize("tokens", [100, 1024, 6000])
def test_the_later_tokens_are_left_to_the_product(launches, tokens):
    shape = (16384, 128)
    inputs, buffer = run(Kernel.many(BESIDE), tokens, shape)
    first, product = launches
    ready = min(tokens, 256 * BESIDE.panel)
    assert first.grid == (ready, 1, 1)
    assert first.arguments["cleared"] == 1 + -(-tokens // 256)
    assert product.grid == (min(66, 64 * -(-tokens // 256)) * 2, 1, 1)
    found = product.arguments
    assert (found["ready"], found["tokens"], found["width"], found["columns"]) == (ready, tokens, 128, 128)
    assert found["x"] == first.arguments["x"] == inputs.data_ptr()
    assert found["given"] == first.arguments["given"] == buffer.data_ptr() + rounded_buffer.places(shape).input_scale
    assert found["rounded"] == found["inputs"] == first.arguments["values"]
    assert found["token_scales"] == first.arguments["scales"] == found["rounded"] + tokens * 128
    assert found["counters"] == first.arguments["counters"] == found["token_scales"] + 4 * tokens


@pytest.mark.parametrize("shape", [(192, 384), (192, 385)])
def test_all_tokens_are_rounded_before(launches, shape):
    """Without warps that round, and where a token does not begin at 16 bytes."""
    kernel = Kernel.many(BESIDE if shape[1] % 8 else TILINGS[-1])
    run(kernel, 6000, shape)
    first, product = launches
    assert first.grid == (6000, 1, 1)
    assert first.arguments["cleared"] == 0
    assert product.arguments["ready"] == 6000


@pytest.mark.parametrize("kernel", [Kernel.many(BESIDE), Kernel.warpgroup(ONE_TOKEN)])
def test_tokens_that_come_rounded_are_not_rounded_again(launches, kernel):
    tokens = 1 if kernel.name == "warpgroup" else 6000
    buffer = rounded_buffer.random_buffer(SHAPE, "fp8_e4m3", torch.device("cpu"), 0)
    rounded = torch.zeros(tokens * (SHAPE[1] + 4), dtype=torch.int8)
    prepare(kernel, torch.bfloat16, SHAPE, tokens, 0, "fp8_e4m3")(rounded, buffer, None, None)
    (product,) = launches
    found = product.arguments
    assert found["inputs"] == rounded.data_ptr()
    assert found["token_scales"] == rounded.data_ptr() + tokens * SHAPE[1]
    assert found.get("ready", tokens) == tokens, "none is left to the product"


def test_a_block_rounds_a_token_itself(launches):
    inputs, buffer = run(Kernel.warpgroup(ONE_TOKEN), 1)
    (product,) = launches
    assert product.options[-1] == ONE_TOKEN.token_bytes(384 // 2)
    found = product.arguments
    assert (found["x"], found["width"], found["tokens"]) == (inputs.data_ptr(), 384, 1)
    assert found["row_scales"] == buffer.data_ptr() + rounded_buffer.places(SHAPE).row_scales
    launches.clear()
    run(Kernel.warpgroup(ONE_TOKEN), 2)
    assert len(launches) == 2, "two tokens are rounded before"
