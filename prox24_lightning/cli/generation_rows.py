"""The rows of ``prox24 bench`` that time whole calls of ``generate``: transformers, and vLLM where it is installed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from prox24_lightning.cli.convert import write_dense
from prox24_lightning.convert.benchmark.generation_report import Generation, Host, generation_notes
from prox24_lightning.convert.benchmark.report import Report
from prox24_lightning.convert.benchmark.settings import Settings
from prox24_lightning.convert.measurement import release_memory
from prox24_lightning.convert.packed_model import find_packable
from prox24_lightning.integrations.transformers.time_generation import HOSTS, dense_and_converted, time_generation
from prox24_lightning.integrations.vllm.served_rates import Serving
from prox24_lightning.integrations.vllm.time_generation import is_installed, time_vllm
from prox24_lightning.io.packed_folder import save_folder
from prox24_lightning.io.sources import Source
from prox24_lightning.utils.errors import describe


@dataclass(frozen=True)
class GenerateCalls:
    """What is generated: ``batches`` of sequences, ``prompt`` + ``new`` tokens each, ``rounds`` times, by ``hosts``."""

    batches: tuple[int, ...]
    prompt: int
    new: int
    rounds: int
    hosts: tuple[Host, ...]

    @classmethod
    def of(
        cls, batches: Sequence[int], prompt: int, new: int, rounds: int, hosts: Sequence[Host] | None
    ) -> GenerateCalls:
        """Whole calls take seconds, so that five rounds are enough; ``hosts`` None: all that are installed.

        Raises:
            ValueError: if vLLM is named and not installed.
        """
        if hosts is None:
            hosts = (*HOSTS, "vllm") if is_installed() else tuple(HOSTS)
        elif "vllm" in hosts and not is_installed():
            raise ValueError(f"--hosts names vllm, which is not installed here: leave it out, or name {list(HOSTS)}")
        return cls(tuple(batches), prompt, new, min(rounds, 5), tuple(hosts))


def with_generation(
    report: Report,
    source: Source,
    names: tuple[str, ...],
    settings: Settings,
    calls: GenerateCalls,
    keep: Callable[[Report], None],
) -> Report:
    """Return the report with the rows of ``generate``.

    Args:
        report: has a language model's part.
        source: the model, on the CPU.
        names: the layers that are converted.
        settings: dtype, and whether dense weights are kept.
        calls: what is generated. vLLM reads the model from a temporary folder (``TMPDIR``).
        keep: called with the report after every row.
    """
    if report.language is None:
        return report
    language = report.language
    rows: list[Generation] = []

    def add(row: Generation) -> None:
        rows.append(row)
        keep(with_rows())

    def with_rows() -> Report:
        notes = (*report.notes, *generation_notes(rows))
        return replace(report, language=replace(language, generation=tuple(rows)), notes=notes)

    if set(HOSTS) & set(calls.hosts):
        _transformers(source, names, report.dense_fp8_names, settings, calls, add)
    if "vllm" in calls.hosts:
        release_memory()
        for row in _vllm(source, settings, calls):
            add(row)
    elif not is_installed():
        report = report.with_note("vLLM is not installed here, so it was not timed.")
    return with_rows()


def _transformers(
    source: Source,
    names: tuple[str, ...],
    dense_fp8: tuple[str, ...],
    settings: Settings,
    calls: GenerateCalls,
    add: Callable[[Generation], None],
) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    try:
        models = dense_and_converted(
            source.model,
            names,
            settings.dtype,
            device,
            keep_dense=settings.keep_dense,
            weights=settings.weights,
            dense_fp8=dense_fp8,
        )
    except torch.OutOfMemoryError as error:
        problem = f"both forms do not fit into memory together ({describe(error)})"
        for batch in calls.batches:
            add(Generation("transformers", batch, calls.prompt, calls.new, problem=problem))
        return
    time_generation(models, calls.batches, calls.prompt, calls.new, rounds=calls.rounds, hosts=calls.hosts, keep=add)


def _vllm(source: Source, settings: Settings, calls: GenerateCalls) -> tuple[Generation, ...]:
    vocabulary = source.model.config.get_text_config().vocab_size  # type: ignore[union-attr,operator]
    dtype = str(settings.dtype).removeprefix("torch.")
    serving = Serving(dtype, calls.batches, calls.prompt, calls.new, calls.rounds, vocabulary)
    with TemporaryDirectory(prefix="prox24_bench_") as folder:
        dense, packed = Path(folder, "dense"), Path(folder, "packed")
        write_dense(dense, source)
        save_folder(
            packed,
            source.model,
            find_packable(source.model),
            source=source.description,
            companions=source.companions,
            weights=settings.form,
        )
        return time_vllm({"dense": dense, "converted": packed}, serving)
