"""Arrows between the rooms only run down, and light imports stay light; each is looked at in a fresh process."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

BASE = {"groups", "weight_blocks", "files", "tensor_files", "ranks", "sharding"}
BELOW = {
    "groups": set(),
    "schedules": set(),
    "files": set(),
    "tensor_files": set(),
    "ranks": set(),
    "copying": set(),
    "sharding": {"groups"},
    "weight_blocks": {"groups"},
    "mask": {"groups", "weight_blocks", "files", "tensor_files"},
    "prox": {"groups", "weight_blocks", "mask", "files", "tensor_files"},
    "moments": {"groups", "ranks", "sharding"},
    "finetune": {*BASE, "mask", "copying"},
    "layerwise": {*BASE, "schedules", "prox", "mask", "moments"},
    "study": {*BASE, "schedules", "prox", "mask", "moments", "layerwise"},
    "sparsify": {*BASE, "schedules", "prox", "mask", "moments", "copying", "finetune", "layerwise", "convert"},
    "convert": {*BASE, "prox", "mask", "moments", "copying"},
}
"""Room -> the rooms that it may load. The rooms above these (callbacks, cli, recipes) may load anything."""

LOOK = """
import json, sys
import {module}
rooms = sorted({{name.split(".")[1] for name in sys.modules if name.startswith("prox24_lightning.")}})
heavy = sorted(name for name in ("lightning", "pytorch_lightning", "transformers", "triton", "matplotlib")
               if name in sys.modules)
cuda = "torch" in sys.modules and sys.modules["torch"].cuda.is_initialized()
print(json.dumps([rooms, heavy, cuda]))
"""


def look(module: str) -> tuple[set[str], set[str], bool]:
    """What importing ``module`` loads: rooms of the package, heavy libraries, and whether CUDA was touched."""
    done = subprocess.run(
        [sys.executable, "-c", LOOK.format(module=module)], capture_output=True, text=True, check=True
    )
    rooms, heavy, cuda = json.loads(done.stdout)
    return set(rooms), set(heavy), cuda


def wrong(module: str, room: str) -> set[str]:
    """What importing ``module`` loads although ``room`` must not."""
    rooms, heavy, cuda = look(module)
    return (rooms - BELOW[room] - {room}) | heavy | ({"cuda"} if cuda else set())


@pytest.mark.parametrize("room", BELOW)
def test_a_room_loads_only_what_lies_below(room):
    assert wrong(f"prox24_lightning.{room}", room) == set()


def test_the_look_would_see_a_wrong_arrow():
    assert {"callbacks", "sparsify", "lightning"} <= wrong("prox24_lightning.callbacks.prox24", "prox")
    assert "prox" in wrong("prox24_lightning.sparsify", "finetune")


def test_the_package_itself_loads_nothing():
    assert look("prox24_lightning") == (set(), set(), False)


def test_every_public_name_is_there():
    import prox24_lightning

    assert [name for name in prox24_lightning.__all__ if getattr(prox24_lightning, name) is None] == []
    assert set(prox24_lightning.__all__) <= set(dir(prox24_lightning))
    with pytest.raises(AttributeError, match="has no attribute 'prox_42'"):
        _ = prox24_lightning.prox_42
