"""``model.generate(...)`` of transformers, dense and converted, with and without ``accelerate_generation``.

    python -m benchmarks.generate --model 8B

LLaMA's shapes, random 2:4 weights, bfloat16. All four ways are called in turns in one process, so that a drifting host
slows all alike; times are medians over the rounds.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli
from torch import nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.convert_models import build
from benchmarks.result_files import RESULTS, write_result
from prox24_lightning.convert import convert_model
from prox24_lightning.convert.measurement import host_seconds
from prox24_lightning.integrations.transformers.generation import accelerate_generation
from prox24_lightning.integrations.transformers.time_generation import generation_call


def main(
    model: str = "8B",
    prompt: int = 512,
    new: int = 128,
    long_prompt: int = 4096,
    batches: list[int] = [1, 8],  # noqa: B006
    rounds: int = 5,
    transformers_too: bool = True,
    output: Path = RESULTS,
    device: str = "cuda",
) -> None:
    """Time generation and write the table.

    Args:
        model: "tiny", "1B" or "8B".
        prompt: tokens of the prompt.
        new: tokens to generate.
        long_prompt: tokens of the prompt whose time to the first token is measured.
        batches: sequences at a time.
        rounds: of calls in turns.
        transformers_too: time transformers' own loop with a static cache as well.
        output: folder for the result.
        device: where the model runs; on a CPU nothing is converted, which tries the script out.
    """
    torch.manual_seed(0)
    dense = build(model, torch.device(device))
    converted = copy.deepcopy(dense)
    if device == "cuda":
        convert_model(converted, token_counts=(*batches, prompt, long_prompt))
    models = {"dense": dense, "converted": converted}
    rows = []
    for batch in batches:
        rows += _tokens_per_second(models, batch, prompt, new, rounds, transformers_too)
    rows += _first_token(models, long_prompt, rounds)
    note = (
        f"LLaMA-shaped {model}, random 2:4 weights, bfloat16, greedy, {prompt} + {new} tokens; dense and converted in "
        f"turns in one process, medians of {rounds} rounds. Device: all GPU work of a token, by torch's profiler."
    )
    write_result(output, f"generate/{model}", "generate() of transformers, dense and converted", rows, note=note)


def _tokens_per_second(
    models: dict[str, nn.Module], batch: int, prompt: int, new: int, rounds: int, transformers_too: bool
) -> list[dict[str, Any]]:
    rows = []
    for way in ("transformers", "accelerated")[0 if transformers_too else 1 :]:
        handles = [accelerate_generation(one) for one in models.values()] if way == "accelerated" else []
        calls = {
            f"{name} {count}": generation_call(one, batch, prompt, count)
            for name, one in models.items()
            for count in (1, new)
        }
        seconds = host_seconds(calls, rounds)
        device = {name: _device_seconds(calls[f"{name} {new}"], calls[f"{name} 1"], new) for name in models}
        wall = {name: (seconds[f"{name} {new}"] - seconds[f"{name} 1"]) / (new - 1) for name in models}
        rate = {name: batch * new / seconds[f"{name} {new}"] for name in models}
        rows.append(
            {
                "loop": way,
                "what": f"{prompt} + {new} tokens, batch {batch}",
                "dense tokens/s": rate["dense"],
                "converted tokens/s": rate["converted"],
                "x": rate["converted"] / rate["dense"],
                "ms a token, dense": 1000 * wall["dense"],
                "ms a token, converted": 1000 * wall["converted"],
                "wall / device, converted": wall["converted"] / device["converted"] if device["converted"] else "",
            }
        )
        for handle in handles:
            handle.remove()
        torch._dynamo.reset()
    return rows


def _first_token(models: dict[str, nn.Module], prompt: int, rounds: int) -> list[dict[str, Any]]:
    handles = [accelerate_generation(one) for one in models.values()]
    calls = {name: generation_call(one, 1, prompt, 1) for name, one in models.items()}
    seconds = host_seconds(calls, rounds)
    for handle in handles:
        handle.remove()
    return [
        {
            "loop": "accelerated",
            "what": f"first token of {prompt}",
            "dense tokens/s": 1 / seconds["dense"],
            "converted tokens/s": 1 / seconds["converted"],
            "x": seconds["dense"] / seconds["converted"],
            "ms a token, dense": 1000 * seconds["dense"],
            "ms a token, converted": 1000 * seconds["converted"],
            "wall / device, converted": "",
        }
    ]


def _device_seconds(call: Callable[[], Any], first: Callable[[], Any], new: int) -> float:
    """GPU seconds of one generated token: those of ``call`` without those of ``first``, by the profiler."""
    if not torch.cuda.is_available():
        return 0.0
    spent = []
    for one in (call, first):
        with profile(activities=[ProfilerActivity.CUDA]) as found:
            one()
            torch.cuda.synchronize()
        spent.append(sum(event.self_device_time_total for event in found.key_averages()) / 1e6)
    return (spent[0] - spent[1]) / (new - 1)


if __name__ == "__main__":
    auto_cli(main)
