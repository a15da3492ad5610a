"""Imports run down only, between rooms and inside them, and light imports stay light."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "prox24_lightning"

ROOMS = {
    "utils": set(),
    "schedules": set(),
    "weights": {"utils"},
    "mask": {"utils", "weights"},
    "prox": {"utils", "weights", "mask"},
    "calibration": {"utils", "weights"},
    "solvers": {"utils", "weights", "mask", "prox", "schedules", "calibration"},
    "study": {"utils", "weights", "mask", "prox", "schedules", "calibration", "solvers"},
    "oneshot": {"utils", "weights", "mask", "prox", "schedules", "calibration", "solvers"},
    "finetune": {"utils", "weights", "mask", "calibration"},
    "convert": {"utils", "weights", "mask"},
    "io": {"utils", "weights", "mask", "prox", "schedules", "calibration", "solvers", "oneshot", "convert"},
}
ROOMS["sparsify"] = {"utils", "weights", "mask", "prox", "schedules", "calibration", "solvers", "finetune", "convert"}
ROOMS["monitoring"] = {*ROOMS["sparsify"], "sparsify"}
ROOMS["callbacks"] = {*ROOMS["monitoring"], "monitoring", *ROOMS["io"], "io"}
ROOMS["integrations"] = {*ROOMS["callbacks"], *ROOMS["io"], "callbacks", "io"}
ROOMS["cli"] = set(ROOMS) - {"cli"}
# Import paths that users' files and older READMEs name.
ROOMS["commands"] = {*ROOMS["io"], "io"}
ROOMS["layerwise"] = {*ROOMS["oneshot"], "oneshot"}
"""Room -> the rooms that it may load."""

LAYERS = {
    "calibration": [["calls"], [""], ["statistics"]],
    "prox": [
        ["checks", "penalty", "roots", "statistics"],
        ["reference", "batched", "block", "triton"],
        ["dispatch"],
        [""],
    ],
    "sparsify": [
        ["phases", "step_listener", "checks", "pass_statistics", "model_watch", "solve_watch", "zeros"],
        ["strategies.base"],
        ["strategies.keep_zeros", "strategies.post_step", "strategies.progressive"],
        ["reordering"],
        ["config", "engine", "sparse_training", "rounded_training"],
        ["traps", "make_strategy"],
        ["controller"],
    ],
    "finetune": [["optimizers"], ["optimizer_state"], ["masked_parameters"], ["mask_files", "lora", "distillation"]],
    "convert": [["format", "measurement"], ["kernels"], ["autotune"], ["layers"], [""], ["benchmark"]],
}
"""Layers inside a room, lowest first, by the beginning of a module's name; ``""`` stands for all that is not named."""


def module_name(file: Path) -> str:
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(file): file for file in PACKAGE.rglob("*.py")}


def imports_of(module: str) -> set[str]:
    """The modules of the package that ``module`` imports, wherever in its text, but for what types alone need."""
    tree = ast.parse(FILES[module].read_text())
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in FILES}
        if isinstance(node, ast.ImportFrom) and node.module in FILES:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in FILES else node.module for name in names}
    return found


IMPORTS = {module: imports_of(module) for module in FILES}


def room_of(module: str) -> str:
    return [*module.split("."), ""][1]


def layer_of(module: str) -> int | None:
    """The layer of a module inside its room; None where the room has no layers, and for a package itself."""
    room, _, rest = module.partition(".")[2].partition(".")
    if room not in LAYERS or not rest or FILES[module].name == "__init__.py":
        return None
    fits = [
        (len(prefix), number)
        for number, prefixes in enumerate(LAYERS[room])
        for prefix in prefixes
        if not prefix or f"{rest}.".startswith(f"{prefix}.")
    ]
    assert fits, f"{module} stands in no layer of {room}"
    return max(fits)[1]


def upward(imports: dict[str, set[str]]) -> list[str]:
    """Imports that run up: into a room that may not be loaded, or into a higher layer of the same room."""
    wrong = []
    for module, targets in imports.items():
        room = room_of(module)
        for target in targets if room else ():
            up = room_of(target) not in ("", room) and room_of(target) not in ROOMS[room]
            if room_of(target) == room and layer_of(module) is not None and layer_of(target) is not None:
                up = layer_of(target) > layer_of(module)
            if up:
                wrong.append(f"{module} imports {target}")
    return sorted(wrong)


def test_every_room_is_known():
    assert {room_of(module) for module in FILES} - {""} == set(ROOMS)


def test_no_import_runs_up():
    assert upward(IMPORTS) == []


def test_an_import_that_runs_up_would_be_seen():
    prox = "prox24_lightning.prox"
    assert upward({f"{prox}.roots": {"prox24_lightning.sparsify.engine"}})
    assert upward({f"{prox}.roots": {f"{prox}.functional"}})
    assert not upward({f"{prox}.functional": {f"{prox}.roots"}})


def test_no_imports_form_a_cycle():
    # A package's own exports say nothing of its modules: each module's imports are checked.
    modules = {
        module: {target for target in targets if FILES[target].name != "__init__.py"}
        for module, targets in IMPORTS.items()
        if FILES[module].name != "__init__.py"
    }
    try:
        TopologicalSorter(modules).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


LOADED = """
import importlib, json, os, sys
package, *others = sys.argv[1:]
def report(module):
    importlib.import_module(module)
    rooms = {name.split(".")[1] for name in sys.modules if name.startswith("prox24_lightning.")}
    cuda = "torch" in sys.modules and sys.modules["torch"].cuda.is_initialized()
    print(json.dumps([module, sorted(rooms), sorted(sys.modules), cuda]), flush=True)
report(package)
import torch
for module in others:
    if not os.fork():
        report(module)
        os._exit(0)
    assert os.wait()[1] == 0, module
"""
"""The package comes first, in a process that has loaded nothing; the others have loaded torch alone."""
HEAVY = {"lightning", "pytorch_lightning", "transformers", "triton", "matplotlib", "datasets"}
LIGHT = [room for room in ROOMS if room not in ("callbacks", "integrations", "cli", "monitoring", "commands")]


@pytest.fixture(scope="module")
def loaded() -> dict[str, tuple[set[str], set[str], bool]]:
    """What the import of a module loads: rooms, all modules, and whether CUDA was initialised."""
    package = PACKAGE.name
    modules = [package, *(f"{package}.{room}" for room in LIGHT), f"{package}.callbacks.prox24"]
    done = subprocess.run([sys.executable, "-c", LOADED, *modules], stdout=subprocess.PIPE, text=True, check=True)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {module: (set(rooms), set(names), cuda) for module, rooms, names, cuda in lines}


@pytest.mark.parametrize("room", LIGHT)
def test_a_room_loads_only_what_lies_below(loaded, room):
    rooms, names, cuda = loaded[f"prox24_lightning.{room}"]
    assert rooms - ROOMS[room] - {room} == set()
    assert names & HEAVY == set()
    assert not cuda


def test_the_prox_needs_torch_alone(loaded):
    assert loaded["prox24_lightning.prox"][1] & {*HEAVY, "safetensors", "numpy.testing"} == set()


def test_heavy_libraries_would_be_seen(loaded):
    rooms, names, _ = loaded["prox24_lightning.callbacks.prox24"]
    assert "sparsify" in rooms
    assert "lightning" in names


def test_the_package_itself_loads_nothing(loaded):
    rooms, names, cuda = loaded["prox24_lightning"]
    assert (rooms, names & {*HEAVY, "torch", "numpy"}, cuda) == (set(), set(), False)


def test_every_public_name_is_there():
    import prox24_lightning

    assert [name for name in prox24_lightning.__all__ if getattr(prox24_lightning, name) is None] == []
    assert set(prox24_lightning.__all__) <= set(dir(prox24_lightning))
    with pytest.raises(AttributeError, match="has no attribute 'prox_42'"):
        _ = prox24_lightning.prox_42
