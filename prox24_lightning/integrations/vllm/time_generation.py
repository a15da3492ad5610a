"""Time vLLM on a model's dense and packed folders, each in a process of its own.

vLLM takes a GPU's memory for itself, so the two forms cannot take turns in one process.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path

import torch

from prox24_lightning.convert.benchmark.generation_report import Form, Generation
from prox24_lightning.integrations.vllm import served_rates
from prox24_lightning.integrations.vllm.served_rates import MARK, Serving
from prox24_lightning.utils.long_work import between_pieces

HOST = "vLLM"
_RESERVE = 0.05
"""Share of the GPU's memory that vLLM leaves free beside what is in use when it starts."""
_LIMIT = 1800  # seconds


def is_installed() -> bool:
    """Return whether vLLM is there, without importing it."""
    return find_spec("vllm") is not None


def time_vllm(folders: Mapping[Form, str | Path], serving: Serving) -> tuple[Generation, ...]:
    """Return one row a batch size. A form that vLLM does not serve leaves its numbers out, with the reason.

    Args:
        folders: "dense" and "converted" -> a folder of the model in that form.
        serving: what is timed; on a GPU, vLLM gets the memory that is free.
    """
    rows = [Generation(HOST, batch, serving.prompt, serving.new) for batch in serving.batches]
    if torch.cuda.is_available():
        free, whole = torch.cuda.mem_get_info()
        serving = replace(serving, memory=max(0.1, round(free / whole - _RESERVE, 2)))
    for form, folder in folders.items():
        between_pieces(f"generate() of {HOST}, {form}: a process of its own compiles the model, which may take minutes")
        try:
            rates = _in_child(str(folder), serving)
        except RuntimeError as error:
            rows = [replace(row, problem=row.problem or f"{form}: {error}") for row in rows]
        else:
            rows = [row.timed(form, rate) for row, rate in zip(rows, rates, strict=True)]
    return tuple(rows)


def _in_child(folder: str, serving: Serving) -> list[float]:
    words = [sys.executable, "-m", served_rates.__name__, folder, json.dumps(asdict(serving))]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=_LIMIT)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"its process has not ended within {_LIMIT // 60} minutes") from None
    found = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode or not found:
        # Libraries go on writing after the exception.
        lines = [line.strip() for line in done.stderr.splitlines() if re.match(r"\w+(\.\w+)*(Error|Exit)\b", line)]
        raise RuntimeError(lines[-1] if lines else f"its process ended with code {done.returncode}")
    rates: list[float] = json.loads(found[-1].removeprefix(MARK))
    return rates
