"""Names of parameters and modules, and the patterns that select among them."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase


def clean_name(name: str) -> str:
    """Return ``name`` without the ``_orig_mod`` components that ``torch.compile`` puts into it."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def matching(aliases: set[str], patterns: Sequence[str]) -> list[str]:
    """Return those of ``patterns`` (shell wildcards, case matters) that match any of ``aliases``."""
    return [pattern for pattern in patterns if any(fnmatchcase(alias, pattern) for alias in aliases if alias)]
