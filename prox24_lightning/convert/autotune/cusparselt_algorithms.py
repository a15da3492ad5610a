"""Find the fastest of cuSPARSELt's algorithms, in a process of its own: an algorithm can crash the process's CUDA.

(cuSPARSELt 0.8.0 has answered a search for a float16 layer of 512 x 1024 with an illegal instruction on an H200.)
The child process is :mod:`~prox24_lightning.convert.autotune.cusparselt_worker`.
"""

from __future__ import annotations

import contextlib
import json
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

from prox24_lightning.weights.rounding import RoundedForm

WORKER = "prox24_lightning.convert.autotune.cusparselt_worker"
"""The child's module, which is not imported here: ``python -m`` warns of modules that are loaded already."""

START_SECONDS, ALGORITHM_SECONDS = 90.0, 15.0
"""A child that writes nothing for the first at its start, when it loads torch, or for the second from then on counts
as dead: an algorithm may hang."""

SEARCH_SECONDS = 120.0
"""The whole search ends after so many; what has been timed by then counts."""

_FINALISTS = 2  # so many of the fastest are returned: the caller measures them again beside the other kernels
_CHILDREN = 16  # one more for each algorithm that crashes


@dataclass(frozen=True)
class AlgorithmJob:
    """One product whose algorithms are timed.

    Attributes:
        dtype: "float16" or "bfloat16".
        shape: padded (out_features, in_features).
        tokens: rows of the inputs.
        copies: weights that rotate, so that none stays in the cache.
        device: index of the GPU.
        skip: algorithms to leave out.
        end: leave out the algorithms from this one on; None for none.
        form: of a weight and inputs of 8 bits, whose sums are in ``dtype``; None for 16 bits.
    """

    dtype: str
    shape: tuple[int, int]
    tokens: int
    copies: int
    device: int
    skip: tuple[int, ...] = ()
    end: int | None = None
    form: RoundedForm | None = None


@dataclass(frozen=True)
class FastestAlgorithms:
    """The fastest algorithms of a job, best first; ``problem``: what went wrong with the others, or with all."""

    algorithms: tuple[int, ...]
    problem: str = ""


@dataclass
class _Progress:
    job: AlgorithmJob
    times: dict[int, float]
    problems: list[str]
    done: bool = False

    def answer(self) -> FastestAlgorithms:
        best = sorted(self.times, key=lambda algorithm: self.times[algorithm])[:_FINALISTS]
        return FastestAlgorithms(tuple(best), "; ".join(self.problems))


def fastest_algorithms(
    jobs: Sequence[AlgorithmJob],
    *,
    command: Sequence[str] | None = None,
    seconds: float | None = None,
    search_seconds: float = SEARCH_SECONDS,
    on_done: Callable[[], None] = lambda: None,
) -> list[FastestAlgorithms]:
    """Answer every job.

    A child that dies costs the algorithm it was timing, for every job of that dtype: it would go on crashing, and each
    crash costs a process. After two in a row all further ones are left out: on an H200 cuSPARSELt 0.8.0 has 36
    algorithms for float16 that work, and after them only algorithms that crash.

    Args:
        jobs: may be empty.
        command: starts the child; for tests.
        seconds: of silence after which a child counts as dead; None is :data:`START_SECONDS` at its start and
            :data:`ALGORITHM_SECONDS` from then on.
        search_seconds: after which the search ends; jobs that are not finished keep what has been timed.
        on_done: called after each job.
    """
    command = command or (sys.executable, "-m", WORKER)
    states = [_Progress(job, {}, []) for job in jobs]
    until = time.monotonic() + search_seconds
    for _ in range(_CHILDREN):
        left = [state for state in states if not state.done]
        if not left:
            break
        remaining = [replace(state.job, skip=(*state.job.skip, *state.times)) for state in left]
        lines, end = _run_child(remaining, command, seconds, until, on_done)
        running = None
        for line in lines:
            event = json.loads(line)
            state = left[event["job"]]
            if "done" in event:
                state.done = True
                state.problems += [event["problem"]] if event["problem"] else []
            elif "us" in event:
                state.times[event["algorithm"]] = event["us"]
                running = None
            else:
                running = state, event["algorithm"]
        late = time.monotonic() >= until
        if running is None or late:
            end = f"was given up after {search_seconds:.0f} seconds" if late else end
            for state in (state for state in left if not state.done):
                state.done = True
                state.problems.append(f"the search for cuSPARSELt's algorithms {end}")
            break
        state, algorithm = running
        last = algorithm - 1 in state.job.skip
        for other in states:
            if (other.job.dtype, other.job.form) == (state.job.dtype, state.job.form):
                skip = (*other.job.skip, algorithm)
                other.job = replace(other.job, skip=skip, end=algorithm if last else other.job.end)
                more = " and the ones after it, left out," if last else ""
                other.problems.append(f"cuSPARSELt's algorithm {algorithm}{more} {end}")
    for state in (state for state in states if not state.done):
        state.problems.append(f"the search for cuSPARSELt's algorithms was given up after {_CHILDREN} processes")
    return [state.answer() for state in states]


def _run_child(
    jobs: Sequence[AlgorithmJob],
    command: Sequence[str],
    seconds: float | None,
    until: float,
    on_done: Callable[[], None],
) -> tuple[list[str], str]:
    """Return the lines that the child has written by ``until`` (of the monotonic clock), and its end in words."""
    written: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    with tempfile.TemporaryFile("w+") as errors:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors, "text": True}
        child = subprocess.Popen(command, **pipes)  # type: ignore[call-overload]
        text = json.dumps([asdict(job) for job in jobs])
        threading.Thread(target=_exchange_lines, args=(child, text, written)).start()
        lines: list[str] = []
        limit = START_SECONDS if seconds is None else seconds
        try:
            while (line := written.get(timeout=max(0.0, min(limit, until - time.monotonic())))) is not None:
                if line.startswith("{") and line.endswith("}"):
                    lines.append(line)
                    if "done" in json.loads(line):
                        on_done()
                limit = ALGORITHM_SECONDS if seconds is None else seconds
            end = f"ended a process with status {child.wait()}"
        except queue.Empty:
            end = f"took more than {limit:.0f} seconds"
        finally:
            child.kill()
            child.wait()
        errors.seek(0)
        messages = [line for line in errors.read().splitlines() if line.strip()]
    if messages and not end.startswith("took"):
        end = f"{end} ({messages[-1].strip()})"
    return lines, end


def _exchange_lines(child: subprocess.Popen[str], jobs: str, written: queue.SimpleQueue[str | None]) -> None:
    """Write the jobs to the child and put each line of its answer into the queue; None marks the end."""
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        with contextlib.suppress(BrokenPipeError), child.stdin:  # it may end before it has read them
            child.stdin.write(jobs)
        with child.stdout:
            for line in child.stdout:
                written.put(line.rstrip("\n"))
    finally:
        written.put(None)
