"""Dense against 2:4 semi-structured on this machine's GPU: a wide MLP, or the layers of a checkpoint.

    python -m benchmarks.convert_mlp
    python -m benchmarks.convert_mlp --dtype float16 --tokens 1 16 64 256 1024 4096
    python -m benchmarks.convert_mlp --checkpoint last.ckpt --module recipes.bytelm:ByteLM --ids 32 128 256

The MLP has random 2:4 weights: its output means nothing, its times are those of a trained one. From a checkpoint
without ``--module`` the weights are taken as a list of linear layers; with it, the class's ``load_from_checkpoint``
rebuilds the model, which is timed as a whole on ``--ids`` or its ``example_input_array``.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.result_files import machine, result_path
from prox24_lightning.convert import ExampleInputs, Report, Settings, run_benchmark
from prox24_lightning.convert.benchmark.example_inputs import own_example
from prox24_lightning.convert.benchmark.render import print_report, write_report
from prox24_lightning.convert.state_dict_model import layers_of
from prox24_lightning.mask import mask_24


def wide_mlp(width: int, hidden: int, blocks: int) -> nn.Sequential:
    """Blocks of width -> width -> hidden -> width with biases and random 2:4 weights, on the CPU."""
    layers: list[nn.Module] = []
    for _ in range(blocks):
        for inputs, outputs in ((width, width), (width, hidden), (hidden, width)):
            layer = nn.Linear(inputs, outputs)
            with torch.no_grad():
                layer.weight.mul_(mask_24(layer.weight))
            layers += [layer, nn.GELU()]
    return nn.Sequential(*layers)


def load(checkpoint: Path, module: str | None, ids: list[int] | None) -> tuple[nn.Module, ExampleInputs | None]:
    """Return the model of a Lightning checkpoint, or of a state dict, and its example inputs."""
    if module is None:
        state: Any = torch.load(checkpoint, map_location="cpu", weights_only=True)
        return layers_of(state.get("state_dict", state)), None
    package, _, name = module.partition(":")
    model = getattr(import_module(package), name).load_from_checkpoint(checkpoint, map_location="cpu")
    if ids is None:
        return model, own_example(model)
    batch, length, vocabulary = ids
    return model, ExampleInputs("", (torch.randint(vocabulary, (batch, length)),), {})


def run(arguments: argparse.Namespace) -> Report:
    settings = Settings(
        token_counts=tuple(arguments.tokens),
        dtype=getattr(torch, arguments.dtype),
        only_if_faster=not arguments.convert_all,
        run_mode=arguments.run_mode,
        rounds=arguments.rounds,
    )
    torch.manual_seed(0)
    inputs: ExampleInputs | None
    if arguments.checkpoint is None:
        model: nn.Module = wide_mlp(arguments.width, arguments.hidden, arguments.blocks)
        inputs = ExampleInputs("", (torch.randn(arguments.batch, arguments.width),), {})
        what = f"MLP, {arguments.blocks} x ({arguments.width}, {arguments.hidden}), {arguments.batch} tokens as a whole"
    else:
        model, inputs = load(arguments.checkpoint, arguments.module, arguments.ids)
        what = f"layers of {arguments.checkpoint.name}"
    report = run_benchmark(model, settings, inputs=inputs)
    return replace(report, machine={"model": what, **report.machine})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=16384)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--batch", type=int, default=4096, help="tokens of the whole MLP's input")
    parser.add_argument("--checkpoint", type=Path, help="take the layers of this file instead of the MLP")
    parser.add_argument("--module", help="package.module:Class that rebuilds the checkpoint's model")
    parser.add_argument(
        "--ids", type=int, nargs=3, metavar=("BATCH", "LENGTH", "VOCABULARY"), help="random ids as the model's input"
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 64, 1024, 4096])
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--run-mode", choices=["eager", "graph"], default="eager", help="the times that decide")
    parser.add_argument("--convert-all", action="store_true", help="make sparse what can be, faster or not")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()

    facts = machine()  # first: what cannot be found out about the machine is to stop the run before it takes time
    report = run(arguments)
    known = {key.lower() for key in report.machine}
    report = replace(report, machine=report.machine | {k: v for k, v in facts.items() if k.lower() not in known})
    print_report(report)
    model = arguments.dtype if arguments.checkpoint is None else f"{arguments.checkpoint.stem}_{arguments.dtype}"
    target = result_path(arguments.output, f"convert_mlp/{model}", "")
    for path in write_report(report, target.parent, target.name):
        print(path)


if __name__ == "__main__":
    main()
