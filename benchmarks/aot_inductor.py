"""One decoder block of LLaMA through AOTInductor: dense and converted, exported, compiled, loaded and run.

    python -m benchmarks.aot_inductor --model 1B

Each form has a process of its own beside the other's, a time limit, and a line for every stage that ends; where the
limit ends it, the stack says what it was doing.
"""

from __future__ import annotations

import contextlib
import faulthandler
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any, Literal, get_args

import torch
from jsonargparse import auto_cli
from torch import Tensor, nn

from benchmarks.convert_models import build
from benchmarks.result_files import RESULTS, write_result
from prox24_lightning.convert import SemiStructuredLinear, convert_model
from prox24_lightning.convert.measurement import relative_error

Form = Literal["dense", "converted"]
_STAGES = ("export", "compile", "load", "run", "error")
"""What a process prints, each with a number: seconds, and the error of the outputs."""


class Block(nn.Module):
    """A decoder layer of transformers with tensors alone as arguments.

    Args:
        layer: of the model.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Return the next hidden states (batch, tokens, features), all tokens attending to those before them."""
        found = self.layer(hidden, attention_mask=None, position_embeddings=(cos, sin))
        return found[0] if isinstance(found, tuple) else found


def main(
    model: str = "1B",
    tokens: int = 64,
    limit: int = 120,
    form: Form | None = None,
    output: Path = RESULTS,
    device: str = "cuda",
) -> None:
    """Compile a block in both forms and write the table; exit code 1 if one of them fails.

    Args:
        model: "tiny", "1B" or "8B".
        tokens: of the input.
        limit: seconds for a form.
        form: the one that this process compiles, which prints its stages; null starts a process for each.
        output: folder for the result.
        device: where the block runs; on a CPU nothing is converted, which tries the script out.
    """
    if form is not None:
        faulthandler.enable()
        faulthandler.dump_traceback_later(limit, exit=True)
        compile_block(model, tokens, form, torch.device(device))
        return
    children = {each: _child(each, model, tokens, limit, device) for each in get_args(Form)}
    rows = [_row(each, child, limit) for each, child in children.items()]
    note = (
        f"One decoder block of a LLaMA-shaped {model}, random 2:4 weights, bfloat16, {tokens} tokens, by torch.export "
        "and torch._inductor.aoti_compile_and_package. Seconds of each stage; error: of the outputs, relative to the "
        "block that was exported."
    )
    write_result(output, f"aot_inductor/{model}", "A block through AOTInductor", rows, note=note)
    raise SystemExit(any(row["problem"] for row in rows))


def compile_block(model: str, tokens: int, form: Form, device: torch.device) -> None:
    """Compile a block in one form, and print the seconds of each stage as it ends."""
    torch.manual_seed(0)
    whole: Any = build(model, device, layers=1)
    if form == "converted" and device.type == "cuda":
        convert_model(whole)
        assert any(isinstance(module, SemiStructuredLinear) for module in whole.modules())
    block = Block(whole.model.layers[0]).eval()
    hidden = torch.randn(1, tokens, whole.config.hidden_size, device=device, dtype=torch.bfloat16)
    cos, sin = whole.model.rotary_emb(hidden, torch.arange(tokens, device=device)[None])
    inputs = (hidden, cos, sin)
    with torch.no_grad(), TemporaryDirectory() as folder:
        expected = block(*inputs)
        with _stage("export"):
            exported = torch.export.export(block, inputs)
        with _stage("compile"):
            path = torch._inductor.aoti_compile_and_package(exported, package_path=f"{folder}/block.pt2")
        with _stage("load"):
            loaded = torch._inductor.aoti_load_package(path)
        with _stage("run"):
            found = loaded(*inputs)
            _wait(device)
        print(f"error {relative_error(expected, found):.5f}", flush=True)


@contextlib.contextmanager
def _stage(name: str) -> Iterator[None]:
    start = perf_counter()
    yield
    print(f"{name} {perf_counter() - start:.1f}", flush=True)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _child(form: Form, model: str, tokens: int, limit: int, device: str) -> subprocess.Popen[str]:
    """Start the process that compiles one form; the other compiles beside it, mostly on another core."""
    arguments = {"model": model, "tokens": tokens, "limit": limit, "form": form, "device": device}
    command = [sys.executable, "-m", "benchmarks.aot_inductor", *(f"--{k}={v}" for k, v in arguments.items())]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _row(form: Form, child: subprocess.Popen[str], limit: int) -> dict[str, Any]:
    out, errors = child.communicate()
    stages = {line.split()[0]: line.split()[1] for line in out.splitlines() if line.startswith(_STAGES)}
    problem = ""
    if child.returncode:
        print(out, errors[-8000:], sep="\n", flush=True)
        lines = [line.strip() for line in errors.splitlines() if line.strip()]
        frames = [line for line in lines if line.startswith("File ")]
        stage = next((stage for stage in _STAGES if stage not in stages), "")
        late = f"not done within {limit} s: {stage}, in {frames[0] if frames else 'native code'}"
        how = f"ended by signal {-child.returncode}" if child.returncode < 0 else (lines or ["no message"])[-1]
        problem = late if any(line.startswith("Timeout") for line in lines) else f"{stage}: {how}"
    return {"block": form, **{stage: stages.get(stage, "") for stage in _STAGES}, "problem": problem}


if __name__ == "__main__":
    warnings.simplefilter("ignore", FutureWarning)
    auto_cli(main)
