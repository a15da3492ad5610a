"""Pair the blocks of a student with those of its teacher."""

from __future__ import annotations

from torch import nn

from prox24_lightning.calibration.blocks import find_blocks


def pair_blocks(name: str, student: nn.Module, teacher: nn.Module) -> dict[str, tuple[nn.Module, nn.Module]]:
    """Return pairs (student block, teacher block) in order, by the names of the student's.

    Raises:
        ValueError: if a model has no repeated blocks, the numbers differ, or a compiled graph hides the hidden states.
    """
    if hasattr(student, "_orig_mod") or getattr(student, "_compiled_call_impl", None) is not None:
        raise ValueError(
            f"features compares hidden states inside {name!r}, which is compiled as a whole: compile its blocks one by "
            "one, or set features=0"
        )
    mine, theirs = find_blocks(student), find_blocks(teacher)
    if mine.whole or theirs.whole:
        bare = type(student if mine.whole else teacher).__name__
        raise ValueError(
            f"features compares the outputs of blocks, but {bare} has no ModuleList of them; set features=0"
        )
    if len(mine) != len(theirs):
        raise ValueError(
            f"features compares block with block, but {name!r} has {len(mine)} and the teacher {len(theirs)}; set "
            "features=0"
        )
    return dict(zip(mine.names, zip(mine.modules, theirs.modules, strict=True), strict=True))
