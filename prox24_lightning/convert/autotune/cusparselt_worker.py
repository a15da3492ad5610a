"""Time cuSPARSELt's algorithms in a process of its own, started with ``python -m``: an algorithm can crash CUDA.

It reads jobs from its input, a JSON list of :class:`AlgorithmJob`, and writes a JSON line before and after each
algorithm, so that a crash names the algorithm to leave out:
``{"job": 0, "algorithm": 3}``, ``{"job": 0, "algorithm": 3, "us": 7.5}``, ``{"job": 0, "done": true, "problem": ""}``.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

from prox24_lightning.convert.autotune.cusparselt_algorithms import AlgorithmJob
from prox24_lightning.convert.kernels import rounded_buffer
from prox24_lightning.convert.kernels.cusparselt.bindings import TOKEN_MULTIPLE, CusparseltError, Library, load
from prox24_lightning.convert.kernels.cusparselt.kernel import ROUNDED_TOKEN_MULTIPLE, rounded_factor
from prox24_lightning.convert.kernels.cusparselt.plan import Plan
from prox24_lightning.convert.kernels.packed_buffer import random_buffer
from prox24_lightning.convert.kernels.round_tokens.reference import round_tokens
from prox24_lightning.convert.measurement import time_calls
from prox24_lightning.utils.devices.cuda_graphs import capture
from prox24_lightning.utils.errors import describe
from prox24_lightning.weights.rounding import VALUE_DTYPES

_ROUNDS = 5
_HOPELESS = 1.5  # an algorithm whose first run takes so many times that of the fastest is not measured further
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def time_algorithms(job: AlgorithmJob) -> Iterator[dict[str, float]]:
    """Yield a line before each algorithm, and one with its time in microseconds after it."""
    dtype = _DTYPES[job.dtype]
    torch.cuda.set_device(job.device)
    device = torch.device("cuda", job.device)
    library = load()
    rows, columns = job.shape
    multiple = TOKEN_MULTIPLE if job.form is None else ROUNDED_TOKEN_MULTIPLE
    tokens = -(-job.tokens // multiple) * multiple
    inputs = torch.randn(tokens, columns, device=device, dtype=dtype)
    if job.form is None:
        weights = [random_buffer(job.shape, dtype, device, seed) for seed in range(job.copies)]
    else:
        weights = [rounded_buffer.random_buffer(job.shape, job.form, device, seed) for seed in range(job.copies)]
        inputs = round_tokens(inputs, job.form).values
    out = torch.empty(tokens, rows, device=device, dtype=dtype)
    least = math.inf
    for algorithm, plan in _plans(job, library, dtype, tokens):
        workspace = torch.empty(max(1, plan.workspace_bytes), dtype=torch.uint8, device=device)

        def run(plan: Plan = plan, workspace: torch.Tensor = workspace) -> None:
            stream = torch.cuda.current_stream().cuda_stream
            for weight in weights:
                plan.run(weight.data_ptr(), inputs.data_ptr(), out.data_ptr(), workspace.data_ptr(), stream)

        yield {"algorithm": algorithm}
        run()
        once = _once_us(run)
        if once > _HOPELESS * least:
            yield {"algorithm": algorithm, "us": once}
            continue
        least = min(least, once)
        graph = capture(run)
        yield {"algorithm": algorithm, "us": time_calls({"": graph.replay}, rounds=_ROUNDS)[""].median_us}


def _plans(job: AlgorithmJob, library: Library, dtype: torch.dtype, tokens: int) -> Iterator[tuple[int, Plan]]:
    """Yield the job's algorithms that take its shape, each with a plan.

    For float16 the library compiles a kernel with every plan, for a quarter of a second: so several are made at once.
    """

    def plan(algorithm: int) -> Plan | None:
        try:
            return Plan(library, job.device, dtype, job.shape, tokens, 0, algorithm, *kind)
        except CusparseltError:
            return None

    kind = (None, 1.0) if job.form is None else (VALUE_DTYPES[job.form], rounded_factor(dtype))
    known = Plan(library, job.device, dtype, job.shape, tokens, 0, None, *kind).algorithms
    wanted = [n for n in range(known if job.end is None else min(known, job.end)) if n not in job.skip]
    with ThreadPoolExecutor(os.cpu_count(), initializer=torch.cuda.set_device, initargs=(job.device,)) as pool:
        for algorithm, made in zip(wanted, pool.map(plan, wanted), strict=True):
            if made is not None:
                yield algorithm, made


def _once_us(run: Callable[[], None]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1000


def main() -> None:
    for index, entry in enumerate(json.load(sys.stdin)):
        job = AlgorithmJob(**{**entry, "shape": tuple(entry["shape"]), "skip": tuple(entry["skip"])})
        problem = ""
        try:
            for line in time_algorithms(job):
                print(json.dumps({"job": index, **line}), flush=True)
        except (CusparseltError, torch.OutOfMemoryError) as error:
            problem = describe(error)
        print(json.dumps({"job": index, "done": True, "problem": problem}), flush=True)


if __name__ == "__main__":
    main()
