"""Which of cuSPARSELt's algorithms is fastest, found in a process of its own: an algorithm can end the process's CUDA.

(cuSPARSELt 0.8.0 has answered a search for a float16 layer of 512 x 1024 with an illegal instruction on an H200.)
The child is this module started by ``python -m``; it reads jobs from its input, a JSON list, and writes a JSON line
before and after each algorithm, so that a death tells the algorithm to leave out.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace

import torch

from prox24_lightning.convert.benchmark.timing import capture, describe, measure
from prox24_lightning.convert.kernels.buffer_layout import random_buffer
from prox24_lightning.convert.kernels.cusparselt import library as cusparselt

SECONDS, SECONDS_AN_ALGORITHM = 90.0, 15.0
"""A child that says nothing for the first at its start, when it has to load torch, or for the second from then on
counts as dead: an algorithm may hang."""

_KEEP = 2  # the fastest so many are handed back: the caller measures them again beside the other kernels
_CHILDREN = 16  # one more for each algorithm that kills
_ROUNDS = 5
_HOPELESS = 1.5  # one whose first run takes so many times that of the fastest is not measured further
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Job:
    """``shape`` is the padded one; ``copies`` weights take turns, so that none stays in the cache; the algorithms of
    ``skip`` are left out, and those from ``end`` on, if it is not None."""

    dtype: str
    shape: tuple[int, int]
    tokens: int
    copies: int
    device: int
    skip: tuple[int, ...] = ()
    end: int | None = None


@dataclass(frozen=True)
class Answer:
    """The fastest algorithms, best first; ``problem``: what went wrong with the others, or with all."""

    algorithms: tuple[int, ...]
    problem: str = ""


@dataclass
class _State:
    job: Job
    times: dict[int, float]
    problems: list[str]
    done: bool = False

    def answer(self) -> Answer:
        best = sorted(self.times, key=lambda algorithm: self.times[algorithm])[:_KEEP]
        return Answer(tuple(best), "; ".join(self.problems))


def search(
    jobs: Sequence[Job],
    *,
    command: Sequence[str] | None = None,
    seconds: float | None = None,
    on_done: Callable[[], None] = lambda: None,
) -> list[Answer]:
    """Answer every job. A child that dies costs the algorithm at hand, for every job of that dtype: it would go on
    killing, and each death costs a process. After two in a row all further ones are left out: on an H200 cuSPARSELt
    0.8.0 has 36 algorithms for float16 that work, and behind them only such that kill.

    Args:
        jobs: may be empty.
        command: starts the child; for tests.
        seconds: of silence after which a child counts as dead; None is :data:`SECONDS` at its start and
            :data:`SECONDS_AN_ALGORITHM` from then on.
        on_done: called after each job.
    """
    states = [_State(job, {}, []) for job in jobs]
    for _ in range(_CHILDREN):
        left = [state for state in states if not state.done]
        if not left:
            break
        given = [replace(state.job, skip=(*state.job.skip, *state.times)) for state in left]
        lines, end = _child(given, command or (sys.executable, "-m", __name__), seconds, on_done)
        at_hand = None
        for line in lines:
            said = json.loads(line)
            state = left[said["job"]]
            if "done" in said:
                state.done = True
                state.problems += [said["problem"]] if said["problem"] else []
            elif "us" in said:
                state.times[said["algorithm"]] = said["us"]
                at_hand = None
            else:
                at_hand = state, said["algorithm"]
        if at_hand is None:
            for state in (state for state in left if not state.done):
                state.done = True
                state.problems.append(f"the search for cuSPARSELt's algorithms {end}")
            break
        state, algorithm = at_hand
        last = algorithm - 1 in state.job.skip
        for other in states:
            if other.job.dtype == state.job.dtype:
                skip = (*other.job.skip, algorithm)
                other.job = replace(other.job, skip=skip, end=algorithm if last else other.job.end)
                more = " and the ones after it, left out," if last else ""
                other.problems.append(f"cuSPARSELt's algorithm {algorithm}{more} {end}")
    for state in (state for state in states if not state.done):
        state.problems.append(f"the search for cuSPARSELt's algorithms was given up after {_CHILDREN} processes")
    return [state.answer() for state in states]


def _child(
    jobs: Sequence[Job], command: Sequence[str], seconds: float | None, on_done: Callable[[], None]
) -> tuple[list[str], str]:
    """The lines that the child has written, and its end in words."""
    written: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    with tempfile.TemporaryFile("w+") as errors:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors, "text": True}
        child = subprocess.Popen(command, **pipes)  # type: ignore[call-overload]
        threading.Thread(target=_converse, args=(child, json.dumps([asdict(job) for job in jobs]), written)).start()
        lines: list[str] = []
        limit = SECONDS if seconds is None else seconds
        try:
            while (line := written.get(timeout=limit)) is not None:
                if line.startswith("{") and line.endswith("}"):
                    lines.append(line)
                    if "done" in json.loads(line):
                        on_done()
                limit = SECONDS_AN_ALGORITHM if seconds is None else seconds
            end = f"ended a process with status {child.wait()}"
        except queue.Empty:
            end = f"took more than {limit:.0f} seconds"
        finally:
            child.kill()
            child.wait()
        errors.seek(0)
        said = [line for line in errors.read().splitlines() if line.strip()]
    if said and not end.startswith("took"):
        end = f"{end} ({said[-1].strip()})"
    return lines, end


def _converse(child: subprocess.Popen[str], given: str, written: queue.SimpleQueue[str | None]) -> None:
    """Hand the jobs over, and each line of the answer on; None is its end."""
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        with contextlib.suppress(BrokenPipeError), child.stdin:  # it may end before it has read them
            child.stdin.write(given)
        with child.stdout:
            for line in child.stdout:
                written.put(line.rstrip("\n"))
    finally:
        written.put(None)


def _measure(job: Job) -> Iterator[dict[str, float]]:
    """What is to be told about a job: before an algorithm, and its time after it."""
    dtype = _DTYPES[job.dtype]
    torch.cuda.set_device(job.device)
    device = torch.device("cuda", job.device)
    library = cusparselt.load()
    rows, columns = job.shape
    tokens = -(-job.tokens // cusparselt.TOKEN_MULTIPLE) * cusparselt.TOKEN_MULTIPLE
    weights = [random_buffer(job.shape, dtype, device, seed) for seed in range(job.copies)]
    inputs = torch.randn(tokens, columns, device=device, dtype=dtype)
    out = torch.empty(tokens, rows, device=device, dtype=dtype)
    least = math.inf
    for algorithm, plan in _plans(job, library, dtype, tokens):
        space = torch.empty(max(1, plan.workspace_bytes), dtype=torch.uint8, device=device)

        def run(plan: cusparselt.Plan = plan, space: torch.Tensor = space) -> None:
            stream = torch.cuda.current_stream().cuda_stream
            for weight in weights:
                plan.run(weight.data_ptr(), inputs.data_ptr(), out.data_ptr(), space.data_ptr(), stream)

        yield {"algorithm": algorithm}
        run()
        once = _once_us(run)
        if once > _HOPELESS * least:
            yield {"algorithm": algorithm, "us": once}
            continue
        least = min(least, once)
        graph = capture(run)
        yield {"algorithm": algorithm, "us": measure({"": graph.replay}, rounds=_ROUNDS)[""].median_us}


def _plans(
    job: Job, library: cusparselt.Library, dtype: torch.dtype, tokens: int
) -> Iterator[tuple[int, cusparselt.Plan]]:
    """The job's algorithms that take its shape, each with a plan.

    For float16 the library compiles a kernel with every plan, for a quarter of a second: so several are made at once.
    """

    def plan(algorithm: int) -> cusparselt.Plan | None:
        try:
            return cusparselt.Plan(library, job.device, dtype, job.shape, tokens, 0, algorithm)
        except cusparselt.CusparseltError:
            return None

    known = cusparselt.Plan(library, job.device, dtype, job.shape, tokens).algorithms
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
        problem = ""
        try:
            for line in _measure(Job(**{**entry, "shape": tuple(entry["shape"]), "skip": tuple(entry["skip"])})):
                print(json.dumps({"job": index, **line}), flush=True)
        except (cusparselt.CusparseltError, torch.OutOfMemoryError) as error:
            problem = describe(error)
        print(json.dumps({"job": index, "done": True, "problem": problem}), flush=True)


if __name__ == "__main__":
    main()
