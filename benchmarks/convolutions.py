"""How long training pauses while the convolutions of a ResNet-18 are solved on a CPU, and what the short path costs.

    python -m benchmarks.convolutions --output benchmarks/results
    python -m benchmarks.convolutions --output benchmarks/results --spread true
    python -m benchmarks.convolutions --output benchmarks/results --shapes true --width 64 --dense_steps 20

A ResNet-18 of the given width learns the handwritten digits of scikit-learn, 24 x 24. Then all of its convolutions
are solved in one pruning step, once by ADMM's full path (200 steps a layer), once by the short one that training
takes for convolutions (60 to 150 steps), from the same weights and batches, and the network is fine-tuned under its
masks. Times are CPU seconds of the process, which other processes on the machine do not count into. The local losses
are those of single layers on the dense network's inputs. With ``spread`` the sparsify phase has room for every
pruning step of its own, as training has, and the longest one is what counts. With ``shapes`` one convolution of each
shape is solved, by the short path of today and by the earlier one in turns.
"""

from __future__ import annotations

import copy
import itertools
import math
import time
from pathlib import Path as Folder
from unittest.mock import patch

import torch
import torch.nn.functional as F
from jsonargparse import auto_cli
from torch import Tensor, nn

from benchmarks.result_files import write_result
from prox24_lightning.calibration.input_groups import layer_input
from prox24_lightning.calibration.statistics.hessian import HessianAccumulator
from prox24_lightning.schedules import Exponential
from prox24_lightning.solvers.admm import PATHS, Path, fitted_path
from prox24_lightning.solvers.config import DAMPING, SolverConfig
from prox24_lightning.solvers.layer import solve
from prox24_lightning.sparsify import PhasePlan, Progressive, SparsityEngine
from prox24_lightning.sparsify.strategies.progressive.calibration import SolveSettings
from prox24_lightning.weights.layer_matrix import as_matrix, input_rows
from prox24_lightning.weights.selection import select_weights

BATCHES = 8
HELD_OUT = 300
EARLIER = Path(150, 15, Exponential(0.1, 100.0), Exponential(0.0316, 1.0))
CONVOLUTIONS = SolveSettings(BATCHES, 0.0, 0, gradient_weighting=False, prox_steps=None)


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions beside an identity, or a 1 x 1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        same = stride == 1 and inputs == outputs
        beside = [nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)]
        self.downsample = nn.Identity() if same else nn.Sequential(*beside)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.downsample(x))


class ResNet18(nn.Module):
    """ResNet-18 with a 3 x 3 stem for small images; ``width`` is 64 in the original."""

    def __init__(self, width: int, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        sizes = [width, width, 2 * width, 4 * width, 8 * width]
        self.layers = nn.Sequential(
            *(
                nn.Sequential(BasicBlock(inputs, outputs, 1 + (inputs != outputs)), BasicBlock(outputs, outputs, 1))
                for inputs, outputs in itertools.pairwise(sizes)
            )
        )
        self.fc = nn.Linear(sizes[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layers(self.stem(x)).mean((2, 3)))


class Attributes(nn.Module):
    """The same network with its stages as attributes, as torchvision has them: no list of like blocks."""

    def __init__(self, width: int) -> None:
        super().__init__()
        whole = ResNet18(width)
        self.stem = whole.stem
        self.layer1, self.layer2, self.layer3, self.layer4 = whole.layers
        self.fc = whole.fc

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.stem(x)))))
        return self.fc(x.mean((2, 3)))


LAYOUTS = {"a list of four stages": ResNet18, "stages as attributes (torchvision)": Attributes}


def main(
    output: Folder = Folder("benchmarks/results"),
    width: int = 16,
    dense_steps: int = 120,
    tuned_steps: int = 40,
    batch_size: int = 32,
    threads: int = 1,
    seed: int = 0,
    spread: bool = False,
    shapes: bool = False,
) -> None:
    """Measure and write the table.

    Args:
        output: folder for the Markdown and JSON result.
        width: channels of the first stage.
        dense_steps: steps of the dense network.
        tuned_steps: steps under the masks.
        batch_size: images a step.
        threads: CPU threads.
        seed: of weights and batches.
        spread: measure the pauses of a sparsify phase with room for all, instead of one pruning step.
        shapes: compare the short path with the earlier one on one convolution of each shape, instead.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    images, labels = digits()
    if spread:
        rows = [pauses(name, width, images, labels, dense_steps, batch_size, seed) for name in LAYOUTS]
        note = f"Width {width}, batches of {batch_size} images of 24 x 24, {threads} threads; the short path."
        title = "Pauses while the convolutions of a ResNet-18 go 2:4 over a sparsify phase (CPU)"
        write_result(output, "convolutions", title, rows, part="spread", note=note)
        return
    dense = ResNet18(width)
    train(dense, images, labels, dense_steps, batch_size, seed)
    before = evaluated(dense, images, labels)
    if shapes:
        rows = by_shape(dense, images, batch_size, seed + 1)
        note = (
            f"Width {width}, {BATCHES} batches of {batch_size} images of 24 x 24, {threads} threads. Earlier: 150 "
            "steps of ADMM, 15 values of rho, at most 300 steps of refinement. One layer of each shape is solved; "
            "the last row adds up the layers. Losses are local, those of today relative to the earlier ones. The "
            f"dense network has a held-out loss of {before['held-out loss']:.3f}."
        )
        title = "Solving the convolutions of a ResNet-18 by shape, earlier and today (CPU)"
        write_result(output, "convolutions", title, rows, part="shapes", note=note)
        return
    rows = []
    losses = {path: local_losses(dense, images[:128], path) for path in ("full", "short")}
    for path, prox_steps in (("full", 200), ("short", None)):
        model = copy.deepcopy(dense)
        seconds, pruned = prune_and_tune(model, images, labels, tuned_steps, batch_size, seed + 1, prox_steps)
        ratios = [mine / full for mine, full in zip(losses[path], losses["full"], strict=True)]
        rows.append(
            {
                "path": path,
                "CPU s": seconds,
                "local loss, mean over layers": sum(ratios) / len(ratios),
                "largest": max(ratios),
                "held-out loss when pruned": pruned,
                **{f"{name} after tuning": value for name, value in evaluated(model, images, labels).items()},
            }
        )
    write_result(
        output,
        "convolutions",
        "Solving the convolutions of a ResNet-18 in one pruning step (CPU)",
        rows,
        note=f"Width {width}, {len(losses['full'])} convolutions, {BATCHES} batches of {batch_size} "
        f"images of 24 x 24, {threads} threads; local losses relative to the full path; {tuned_steps} steps of "
        f"fine-tuning, the first eight of them dense. The dense network has a held-out loss of "
        f"{before['held-out loss']:.3f} and an accuracy of {before['accuracy']:.3f}.",
    )


def pauses(
    layout: str, width: int, images: Tensor, labels: Tensor, dense_steps: int, batch_size: int, seed: int
) -> dict[str, object]:
    """Return how long the optimizer steps that prune take, where each block or layer has one of its own."""
    torch.manual_seed(seed)
    model = LAYOUTS[layout](width)
    train(model, images, labels, dense_steps, batch_size, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    weights = select_weights(model).chosen
    freeze = BATCHES * (1 + len(weights))
    engine = SparsityEngine(weights, PhasePlan(BATCHES, freeze), Progressive(model), metric="activation")
    engine.bind([optimizer])
    seconds = []
    for batch in batches(len(images) - HELD_OUT, freeze, batch_size, seed + 1):
        sparse = len(engine.masks)
        spent = timed_step(engine, model, optimizer, images[batch], labels[batch])
        if len(engine.masks) > sparse:
            seconds.append(spent)
    engine.unbind()
    return {
        "layout": layout,
        "convolutions": len(weights),
        "pruning steps": len(seconds),
        "CPU s in all": sum(seconds),
        "CPU s of the longest": max(seconds),
    }


def by_shape(model: ResNet18, images: Tensor, batch_size: int, seed: int) -> list[dict[str, object]]:
    """Return how long the first convolution of each shape takes, by the earlier path and by today's."""
    inputs = torch.cat([images[one] for one in batches(len(images) - HELD_OUT, BATCHES, batch_size, seed)])
    found = hessians(model, inputs)
    layers: dict[tuple[int, ...], list[nn.Module]] = {}
    for module in found:
        layers.setdefault(tuple(as_matrix(module).shape), []).append(module)
    rows: list[dict[str, object]] = []
    total = [0.0, 0.0]
    for shape, modules in sorted(layers.items(), key=lambda item: math.prod(item[0])):
        weight, hessian = as_matrix(modules[0]), found[modules[0]].hessian
        with patch.dict(PATHS, {"short": EARLIER}):
            before, then = timed_solve(weight, hessian, SolverConfig(path="short"))
        after, now = timed_solve(weight, hessian, CONVOLUTIONS.solver(modules[0]))
        total = [total[0] + len(modules) * before, total[1] + len(modules) * after]
        rows.append(
            {
                "rows x columns": f"{shape[0]} x {shape[1]}",
                "layers": len(modules),
                "steps": fitted_path(PATHS["short"], hessian, DAMPING).steps,
                "CPU s, earlier": before,
                "CPU s": after,
                "times faster": before / after,
                "loss": now / then,
            }
        )
    whole: dict[str, object] = {"rows x columns": "all", "layers": len(found), "steps": ""}
    times = {"CPU s, earlier": total[0], "CPU s": total[1], "times faster": total[0] / total[1], "loss": ""}
    return [*rows, {**whole, **times}]


def timed_solve(weight: Tensor, hessian: Tensor, config: SolverConfig) -> tuple[float, float]:
    """Return the CPU seconds of a solve and its relative local loss."""
    begin = time.process_time()
    solution = solve(weight, hessian, config)
    return time.process_time() - begin, solution.refined_loss or 0.0


def digits() -> tuple[Tensor, Tensor]:
    """Return scikit-learn's digits as images (n, 1, 24, 24) in [-1, 1], and their labels."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    return F.interpolate(images, scale_factor=3, mode="bilinear"), torch.tensor(labels)


def train(model: nn.Module, images: Tensor, labels: Tensor, steps: int, batch_size: int, seed: int) -> None:
    """Train the dense network."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for batch in batches(len(images) - HELD_OUT, steps, batch_size, seed):
        F.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
        optimizer.zero_grad()


def prune_and_tune(
    model: ResNet18, images: Tensor, labels: Tensor, steps: int, batch_size: int, seed: int, prox_steps: int | None
) -> tuple[float, float]:
    """Train on, prune in one step once eight batches have been seen, and tune what is left.

    Returns:
        CPU seconds of the step that prunes, and the held-out loss right after it.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    strategy = Progressive(model, prox_steps=prox_steps)
    engine = SparsityEngine(select_weights(model).chosen, PhasePlan(BATCHES, BATCHES), strategy, metric="activation")
    engine.bind([optimizer])
    seconds = loss = 0.0
    for step, batch in enumerate(batches(len(images) - HELD_OUT, steps, batch_size, seed), start=1):
        spent = timed_step(engine, model, optimizer, images[batch], labels[batch])
        if step == BATCHES:
            seconds, loss = spent, evaluated(model, images, labels)["held-out loss"]
    engine.unbind()
    return seconds, loss


def timed_step(
    engine: SparsityEngine, model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor
) -> float:
    """Train on one batch, and return the CPU seconds of the optimizer step, in which layers are solved."""
    engine.before_batch()
    F.cross_entropy(model(images), labels).backward()
    begin = time.process_time()
    optimizer.step()
    spent = time.process_time() - begin
    optimizer.zero_grad()
    engine.after_batch()
    return spent


def batches(images: int, steps: int, batch_size: int, seed: int) -> list[Tensor]:
    """Return the numbers of the images of each step."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(images, (batch_size,), generator=generator) for _ in range(steps)]


@torch.no_grad()
def evaluated(model: ResNet18, images: Tensor, labels: Tensor) -> dict[str, float]:
    """Return loss and accuracy on the held-out images."""
    model.eval()
    logits = model(images[-HELD_OUT:])
    model.train()
    accuracy = (logits.argmax(1) == labels[-HELD_OUT:]).float().mean()
    return {"held-out loss": F.cross_entropy(logits, labels[-HELD_OUT:]).item(), "accuracy": accuracy.item()}


def local_losses(model: ResNet18, images: Tensor, path: str) -> list[float]:
    """Return the local loss of every convolution that can be 2:4, solved on its inputs in the dense network."""
    config = CONVOLUTIONS.solver(nn.Conv2d(4, 4, 3)) if path == "short" else SolverConfig()
    return [
        timed_solve(as_matrix(module), found.hessian, config)[1] for module, found in hessians(model, images).items()
    ]


@torch.no_grad()
def hessians(model: ResNet18, images: Tensor) -> dict[nn.Module, HessianAccumulator]:
    """Return the Hessian of every convolution that can be 2:4, over its inputs in the dense network."""
    sums = {weight.module: HessianAccumulator() for weight in select_weights(model).chosen}

    def note(module: nn.Module, args: tuple, kwargs: dict) -> None:
        sums[module].add(input_rows(module, layer_input(args, kwargs)))

    handles = [
        module.register_forward_pre_hook(note, with_kwargs=True) for module in sums if isinstance(module, nn.Conv2d)
    ]
    model.eval()
    for batch in images.split(32):
        model(batch)
    model.train()
    for handle in handles:
        handle.remove()
    return sums


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
