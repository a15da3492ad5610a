"""Time ``model.generate(...)`` of transformers, dense and converted in turns, with and without the captured loop."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prox24_lightning.convert.benchmark.generation_report import Form, Generation, Host
from prox24_lightning.convert.convert import convert_model
from prox24_lightning.convert.measurement import host_seconds, release_memory
from prox24_lightning.integrations.transformers.generation import accelerate_generation
from prox24_lightning.utils.errors import describe
from prox24_lightning.utils.long_work import between_pieces
from prox24_lightning.utils.module_copy import bare_copy
from prox24_lightning.weights.rounding import WeightForm

HOSTS: dict[Host, str] = {
    "accelerate_generation": "transformers, accelerate_generation",
    "transformers": "transformers, static cache",
}
"""The loops of transformers, as rows of a table name them."""


def dense_and_converted(
    model: nn.Module,
    names: Sequence[str],
    dtype: torch.dtype,
    device: torch.device,
    *,
    keep_dense: bool = False,
    weights: WeightForm | None = None,
    dense_fp8: Collection[str] = (),
) -> dict[Form, nn.Module]:
    """Return two copies of a model on a GPU, which share all tensors but the weights of the layers in ``names``.

    ``keep_dense``, ``weights`` and ``dense_fp8`` are those of :func:`~prox24_lightning.convert.convert.convert_model`.
    """
    dense = bare_copy(model, device=device, dtype=dtype)
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*dense.parameters(), *dense.buffers())}
    converted = copy.deepcopy(dense, shared)
    convert_model(converted, names, keep_dense=keep_dense, weights=weights, dense_fp8=dense_fp8)
    return {"dense": dense, "converted": converted}


def time_generation(
    models: Mapping[Form, Any],
    batches: Sequence[int],
    prompt: int,
    new: int,
    *,
    rounds: int = 5,
    hosts: Sequence[Host] = ("accelerate_generation", "transformers"),
    keep: Callable[[Generation], None] = lambda row: None,
) -> tuple[Generation, ...]:
    """Time greedy generation with a static cache: the loop of ``accelerate_generation``, then transformers' own.

    A way that fails (out of memory, a model that cannot be captured) becomes a row with the reason. On a GPU
    transformers compiles the whole model for its own loop, once for each form and batch size, which can take minutes.

    Args:
        models: "dense" and "converted", on one device.
        batches: sequences at a time.
        prompt: tokens of the prompts, which are random.
        new: tokens to generate.
        rounds: calls of each model, in turns; the median counts.
        hosts: which of the two loops.
        keep: called with every row as soon as it is there.
    """
    rows = []
    for host in [host for host in hosts if host in HOSTS]:
        handles: list[Any] = []
        try:
            problem = ""
            if host == "accelerate_generation":
                try:
                    handles = [accelerate_generation(model) for model in models.values()]
                except ValueError as error:
                    problem = str(error)
            for batch in batches:
                row = Generation(HOSTS[host], batch, prompt, new, problem=problem)
                rows.append(row if problem else _timed(row, models, rounds))
                keep(rows[-1])
        finally:
            for handle in handles:
                handle.remove()
            release_memory()
    return tuple(rows)


def generation_options(new: int) -> dict[str, Any]:
    """Return the arguments of ``generate`` for exactly ``new`` tokens, greedy, with a static cache."""
    return {
        "max_new_tokens": new,
        "min_new_tokens": new,
        "do_sample": False,
        "cache_implementation": "static",
        "pad_token_id": 0,
    }


def generation_call(model: Any, batch: int, prompt: int, new: int) -> Callable[[], Tensor]:
    """Return a call that generates ``new`` tokens after ``batch`` random prompts of ``prompt`` tokens."""
    generator = torch.Generator(device=model.device).manual_seed(batch)
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(3, vocabulary, (batch, prompt), generator=generator, device=model.device)
    return partial(model.generate, ids, attention_mask=torch.ones_like(ids), **generation_options(new))


def _timed(row: Generation, models: Mapping[Form, Any], rounds: int) -> Generation:
    compiles = "; transformers compiles the whole model for it, which may take minutes"
    about = compiles if row.host == HOSTS["transformers"] and torch.cuda.is_available() else ""
    between_pieces(f"generate() of {row.host}, batch {row.batch}, {row.prompt} + {row.new} tokens{about}")
    try:
        calls: dict[str, Callable[[], Tensor]] = {
            name: generation_call(model, row.batch, row.prompt, row.new) for name, model in models.items()
        }
        seconds = host_seconds(calls, rounds)
    except Exception as error:  # of the compiler, or of what a model does on the host
        return replace(row, problem=describe(error))
    finally:
        torch._dynamo.reset()  # or the next batch size runs code that was compiled for any
    for form in models:
        row = row.timed(form, row.batch * row.new / seconds[form])
    return row
