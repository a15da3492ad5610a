"""Time ``LLM(folder).generate(...)``; run as a process of its own (``python -m``) it prints a line of rates."""

from __future__ import annotations

import json
import random
import sys
from dataclasses import dataclass
from statistics import median
from time import perf_counter

MARK = "PROX24 "
"""Begins the line of rates, among what vLLM prints."""


@dataclass(frozen=True)
class Serving:
    """What is timed.

    Attributes:
        dtype: of the weights, as vLLM names it.
        batches: sequences at a time.
        prompt: tokens of the prompts, which are random.
        new: tokens to generate.
        rounds: calls; the median counts.
        vocabulary: tokens of the prompts are below it.
        memory: share of the GPU's memory that vLLM may take; None is its own choice.
        eager: without compiling and CUDA graphs, which starts sooner and runs slower.
    """

    dtype: str
    batches: tuple[int, ...]
    prompt: int
    new: int
    rounds: int
    vocabulary: int
    memory: float | None = None
    eager: bool = False


def served_rates(folder: str, serving: Serving) -> list[float]:
    """Return generated tokens a second of each batch size, prompts included in the time."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        folder,
        dtype=serving.dtype,
        max_model_len=serving.prompt + serving.new,
        enforce_eager=serving.eager,
        enable_prefix_caching=False,  # rounds repeat the prompts
        skip_tokenizer_init=True,
        seed=0,
        **({} if serving.memory is None else {"gpu_memory_utilization": serving.memory}),
    )
    settings = SamplingParams(temperature=0, max_tokens=serving.new, ignore_eos=True, detokenize=False)
    draw = random.Random(0)
    rates = []
    for batch in serving.batches:
        prompts = [
            {"prompt_token_ids": [draw.randrange(3, serving.vocabulary) for _ in range(serving.prompt)]}
            for _ in range(batch)
        ]
        seconds = []
        for number in range(serving.rounds + 1):
            start = perf_counter()
            llm.generate(prompts, settings, use_tqdm=False)
            if number:  # the first call warms up
                seconds.append(perf_counter() - start)
        rates.append(batch * serving.new / median(seconds))
    return rates


if __name__ == "__main__":
    given = json.loads(sys.argv[2])
    print(MARK + json.dumps(served_rates(sys.argv[1], Serving(**{**given, "batches": tuple(given["batches"])}))))
