"""All runs of a comparison, several at a time; each result is on disk as soon as its run ends."""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.recovery.rows import Row
from benchmarks.recovery.run import execute, free_memory
from benchmarks.recovery.task import Task
from benchmarks.result_files import machine

WARM_UP_STEPS = 3


@dataclass(frozen=True)
class Job:
    """One run to do. ``purpose`` is ``"search"`` for choosing a learning rate, else ``"report"``."""

    task: Task
    name: str
    row: Row
    seed: int
    lr: float | None
    purpose: str = "report"

    def key(self) -> str:
        """The same for the same row, seed and settings, in every process."""
        found = {"task": self.task.identity(), "row": self.task.adapted(self.row).definition()}
        content = json.dumps({**found, "name": self.name, "seed": self.seed, "lr": self.lr}, sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]


class Results:
    """The lines of a file: one finished run each. What is there already is not run again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self._found: dict[str, dict[str, Any]] = {}
        for line in lines:
            with suppress(json.JSONDecodeError):  # the last line of a run that was cut off may not be whole
                entry = json.loads(line)
                self._found[entry["key"]] = entry

    def missing(self, jobs: Iterable[Job]) -> list[Job]:
        return [job for job in jobs if job.key() not in self._found]

    def of(self, jobs: Iterable[Job]) -> list[dict[str, Any]]:
        """The finished ones of ``jobs``, in their order."""
        return [self._found[key] for job in jobs if (key := job.key()) in self._found]

    def all(self) -> list[dict[str, Any]]:
        """Every finished run of the file, whatever it was for."""
        return list(self._found.values())

    def add(self, job: Job, result: dict[str, Any], start: str) -> None:
        """``start`` tells the runs that have shared a machine from others."""
        facts = {"key": job.key(), "row": job.name, "seed": job.seed, "lr": job.lr, "purpose": job.purpose}
        facts["start"] = start
        facts["machine"] = ", ".join(f"{name} {value}" for name, value in machine().items() if name != "command")
        entry = {**facts, **result}
        self._found[entry["key"]] = entry
        self.path.parent.mkdir(parents=True, exist_ok=True)
        whole = not self.path.exists() or self.path.read_bytes()[-1:] in (b"\n", b"")
        with self.path.open("a") as file:
            file.write(("" if whole else "\n") + json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())


def runs_path(folder: Path, name: str) -> Path:
    """Return the path of the runs behind the result ``name``, which is ``"BENCHMARK"`` or ``"BENCHMARK/VARIANT"``."""
    benchmark, _, variant = name.partition("/")
    return folder / benchmark / f"{variant or benchmark}.runs.jsonl"


def run_all(jobs: Sequence[Job], results: Results, processes: int, until: float | None = None) -> int:
    """Do the runs that are missing from ``results``, ``processes`` at a time; how many failed is returned.

    Each process does several runs, and sees one of the GPUs; a failed run is reported and the others go on.

    Args:
        until: time of the clock (``time.time()``) after which no further run begins; None waits for all.
    """
    console = Console()
    missing = results.missing(jobs)
    start = f"{datetime.now().isoformat(timespec='minutes')}, {processes} at a time"
    failed = 0
    for number, (job, result, error) in enumerate(_finished(missing, processes, until), start=1):
        title = f"run {number} of {len(missing)}: {job.name}, seed {job.seed}, lr {job.lr}"
        if result is None and not error:
            console.print(f"{title}: left for later, the time is up", markup=False)
            continue
        if result is None:
            failed += 1
            console.print(f"{title} failed:\n{error}", markup=False)
            continue
        results.add(job, result, start)
        losses = ", ".join(f"{name} {loss:.4f}" for name, loss in result["losses"].items())
        console.print(f"{title}: {losses}; {result['seconds']:.0f} s")
        for name, scored in result.get("averages", {}).items():
            losses = ", ".join(f"{text} {loss:.4f}" for text, loss in scored["losses"].items())
            console.print(f"  {name}: {losses}", markup=False)
    return failed


def _finished(
    jobs: Sequence[Job], processes: int, until: float | None
) -> Iterator[tuple[Job, dict[str, Any] | None, str]]:
    if until is not None and time.time() > until:
        yield from ((job, None, "") for job in jobs)
        return
    if not jobs:
        return
    if processes == 1:
        _prepare(jobs[0].task, 1, threading.Lock(), threading.Event())
        for job in jobs:
            yield (job, *_guarded(job, until))
        return
    context = multiprocessing.get_context("spawn")  # a process that was forked cannot use CUDA
    gpus, visible = context.SimpleQueue(), _gpus()
    for number in range(processes):
        gpus.put(visible[number % len(visible)])
    arguments = (gpus, jobs[0].task, processes, context.Lock(), context.Event())
    with ProcessPoolExecutor(processes, mp_context=context, initializer=_begin, initargs=arguments) as pool:
        running = {pool.submit(_guarded, job, until): job for job in jobs}
        for future in as_completed(running):
            try:
                result, error = future.result()
            except Exception as broken:  # the process died, for want of memory say
                result, error = None, f"{type(broken).__name__}: {broken}"
            yield running[future], result, error


def _gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [str(index) for index in range(max(1, torch.cuda.device_count()))] if visible is None else visible.split(",")


def _begin(gpus: Any, *arguments: Any) -> None:
    """Begin a process that sees one GPU, before anything there has looked for them."""
    os.environ["CUDA_VISIBLE_DEVICES"] = gpus.get()
    _prepare(*arguments)


def _prepare(task: Task, processes: int, first: Any, compiled: Any) -> None:
    """Share the cores, and pay for loading and compiling before the first run that is timed.

    One process compiles, the others wait and then find its kernels in the compiler's cache on disk.

    Args:
        first: lock that the process which compiles keeps.
        compiled: event that says it is done.
    """
    torch.set_num_threads(max(1, min(torch.get_num_threads(), (os.cpu_count() or 1) // processes)))
    if not torch.cuda.is_available():
        return
    if not (mine := first.acquire(False)):
        compiled.wait()
    try:
        execute(_shortened(task), Row(), seed=0, lr=None)
        free_memory()
    finally:
        if mine:
            compiled.set()


def _shortened(task: Any) -> Any:
    return replace(task, steps=min(task.steps, WARM_UP_STEPS))


def _guarded(job: Job, until: float | None) -> tuple[dict[str, Any] | None, str]:
    """The result, or what went wrong; neither, if the time was up before it began."""
    if until is not None and time.time() > until:
        return None, ""
    try:
        return execute(job.task, job.row, job.seed, job.lr), ""
    except Exception:
        return None, traceback.format_exc()
    finally:
        free_memory()
        sys.stdout.flush()


def best_rates(found: Sequence[dict[str, Any]], task: Task) -> dict[str, float]:
    """For each row, the learning rate of the smallest search loss that is finite.

    Raises:
        ValueError: for a row without any.
    """
    finite: dict[str, list[tuple[float, float]]] = {entry["row"]: [] for entry in found}
    for entry in found:
        if math.isfinite(loss := task.search_loss(entry["scores"])):
            finite[entry["row"]].append((loss, entry["lr"]))
    for name, runs in finite.items():
        if not runs:
            rates = sorted(entry["lr"] for entry in found if entry["row"] == name)
            raise ValueError(f"the search loss of {name!r} is finite at none of lrs={rates}; search smaller rates")
    return {name: min(runs)[1] for name, runs in finite.items()}


def compare(
    task: Task,
    rows: dict[str, Row],
    seeds: Sequence[int],
    lr: float | dict[str, float] | None,
    lrs: Sequence[float] | None,
    search_seed: int,
    processes: int,
    results: Results,
    until: float | None = None,
) -> tuple[list[dict[str, Any]], dict[str, float], int]:
    """Search learning rates if asked to, then run every row with every seed; ``until`` as in :func:`run_all`.

    Args:
        lr: of all rows, or by row; None is the task's own. What a search finds goes before it.

    Returns:
        the finished runs to report, the learning rates found by the search, and how many runs failed.

    Raises:
        ValueError: if the search would use a seed that is reported.
    """
    failed = 0
    rates: dict[str, Any] = dict(lr) if isinstance(lr, dict) else dict.fromkeys(rows, lr)
    if lrs:
        if search_seed in seeds:
            raise ValueError(f"search_seed={search_seed} is among the reported seeds {list(seeds)}; take another")
        search = [Job(task, name, row, search_seed, rate, "search") for name, row in rows.items() for rate in lrs]
        failed += run_all(search, results, processes, until)
        rates |= best_rates(results.of(search), task)
    jobs = [Job(task, name, row, seed, rates[name]) for seed in seeds for name, row in rows.items()]
    failed += run_all(jobs, results, processes, until)
    return results.of(jobs), rates, failed


def settings_line(task: Task) -> str:
    """The task's settings in one line for the result file."""
    return "; ".join(f"{name}: {value}" for name, value in task.identity().items())
