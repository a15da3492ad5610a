"""Which of cuSPARSELt's algorithms is fastest, found in a process of its own: an algorithm can end the process's CUDA.

(cuSPARSELt 0.8.0 has answered a search for a float16 layer of 512 x 1024 with an illegal instruction on an H200.)
The child is started as ``python -m prox24_lightning.convert.algorithm_search``, reads jobs from its input, a JSON
list, and writes one JSON line an answer, so that a death costs the job at hand alone.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import torch

from prox24_lightning.convert import cusparselt
from prox24_lightning.convert.gpu_layout import random_buffer
from prox24_lightning.convert.timing import capture, describe, measure

SECONDS = 120.0
"""After which a child without an answer counts as dead."""

_KEEP = 2  # the fastest so many are handed back: the caller measures them again beside the other kernels
_ROUNDS = 5
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Job:
    """``shape`` is the padded one; ``copies`` weights in turn, so that none stays in the cache."""

    dtype: str
    shape: tuple[int, int]
    tokens: int
    copies: int
    device: int


@dataclass(frozen=True)
class Answer:
    """The fastest algorithms, best first; none if ``problem`` says why."""

    algorithms: tuple[int, ...]
    problem: str = ""


def search(jobs: Sequence[Job], *, command: Sequence[str] | None = None, seconds: float = SECONDS) -> list[Answer]:
    """Answer every job, in as many processes as die underway plus one.

    Args:
        jobs: may be empty.
        command: starts the child; for tests.
        seconds: for one child, all its jobs.
    """
    answers: list[Answer] = []
    while len(answers) < len(jobs):
        rest = jobs[len(answers) :]
        lines, end = _child(rest, command or (sys.executable, "-m", __name__), seconds)
        for line in lines[: len(rest)]:
            said = json.loads(line)
            answers.append(Answer(tuple(said["algorithms"]), said["problem"]))
        if len(lines) < len(rest):
            answers.append(Answer((), f"the search for algorithms {end}: cuSPARSELt is not used here"))
    return answers


def _child(jobs: Sequence[Job], command: Sequence[str], seconds: float) -> tuple[list[str], str]:
    given = json.dumps([asdict(job) for job in jobs])
    try:
        done = subprocess.run(command, input=given, capture_output=True, text=True, timeout=seconds, check=False)
        output, end = done.stdout, f"ended with status {done.returncode}"
        said = [line for line in done.stderr.splitlines() if line.strip()]
        if said:
            end = f"{end} ({said[-1].strip()})"
    except subprocess.TimeoutExpired as error:
        output = error.stdout.decode() if isinstance(error.stdout, bytes) else error.stdout or ""
        end = f"took more than {seconds:.0f} seconds"
    return [line for line in output.splitlines() if line.startswith("{")], end


def _answers(jobs: Sequence[Job]) -> Iterator[Answer]:
    for job in jobs:
        try:
            yield Answer(_fastest(job))
        except (cusparselt.CusparseltError, torch.OutOfMemoryError) as error:
            yield Answer((), describe(error))


def _fastest(job: Job) -> tuple[int, ...]:
    dtype = _DTYPES[job.dtype]
    torch.cuda.set_device(job.device)
    device = torch.device("cuda", job.device)
    library = cusparselt.load()
    rows, columns = job.shape
    tokens = -(-job.tokens // cusparselt.TOKEN_MULTIPLE) * cusparselt.TOKEN_MULTIPLE
    weights = [random_buffer(job.shape, dtype, device, seed) for seed in range(job.copies)]
    inputs = torch.randn(tokens, columns, device=device, dtype=dtype)
    out = torch.empty(tokens, rows, device=device, dtype=dtype)
    times: dict[int, float] = {}
    for algorithm in range(cusparselt.Plan(library, job.device, dtype, job.shape, tokens).algorithms):
        try:
            plan = cusparselt.Plan(library, job.device, dtype, job.shape, tokens, 0, algorithm)
            space = torch.empty(max(1, plan.workspace_bytes), dtype=torch.uint8, device=device)

            def run(plan: cusparselt.Plan = plan, space: torch.Tensor = space) -> None:
                stream = torch.cuda.current_stream().cuda_stream
                for weight in weights:
                    plan.run(weight.data_ptr(), inputs.data_ptr(), out.data_ptr(), space.data_ptr(), stream)

            graph = capture(run)
            times[algorithm] = measure({"": graph.replay}, rounds=_ROUNDS)[""].median_us
        except cusparselt.CusparseltError:
            continue  # not every algorithm takes every shape
    return tuple(sorted(times, key=lambda algorithm: times[algorithm]))[:_KEEP]


def main() -> None:
    jobs = [Job(**{**entry, "shape": tuple(entry["shape"])}) for entry in json.load(sys.stdin)]
    for answer in _answers(jobs):
        print(json.dumps(asdict(answer)), flush=True)


if __name__ == "__main__":
    main()
