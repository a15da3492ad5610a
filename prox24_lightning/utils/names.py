"""Short forms of module and parameter names, and counts of them, for tables and messages."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import takewhile

MAX_PATTERNS = 3


def numbers_as_wildcards(name: str) -> str:
    """Replace the numbers among a name's dotted components: ``layers.3.up`` becomes ``layers.*.up``.

    A number at the end stays, since it tells layers of one ``nn.Sequential`` apart.
    """
    return re.sub(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)", "*", name)


def collapse_names(names: Iterable[str]) -> str:
    """Join names; those that differ in their numbers only share a pattern and a count: ``layers.*.up x 12``."""
    counts = Counter(numbers_as_wildcards(name or "(the model)") for name in names)
    shown = [f"{pattern} x {count}" if count > 1 else pattern for pattern, count in list(counts.items())[:MAX_PATTERNS]]
    more = f" and {len(counts) - MAX_PATTERNS} more" if len(counts) > MAX_PATTERNS else ""
    return ", ".join(shown) + more


def counted(count: int, noun: str) -> str:
    """Return a number and its noun: ``1 weight``, ``12 weights``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def shorten(name: str, width: int) -> str:
    """Cut a name in the middle down to ``width`` characters; its end, which tells layers apart, keeps most of them."""
    if len(name) <= width:
        return name
    head = max(1, (width - 1) // 4)
    return f"{name[:head]}…{name[len(name) - (width - 1 - head) :]}"


def shorten_all(names: Iterable[str], width: int) -> dict[str, str]:
    """Map names to forms of ``width`` characters (:func:`shorten`), or more where two of them would read the same."""
    distinct = set(names)
    longest = max(map(len, distinct), default=0)
    while width < longest and len({shorten(name, width) for name in distinct}) < len(distinct):
        width += 2
    return {name: shorten(name, width) for name in distinct}


def common_start(names: Sequence[str]) -> str:
    """Return the parents that all dotted names share, with the last dot; "" if there are none."""
    parents = [name.split(".")[:-1] for name in names] if len(set(names)) > 1 else []
    levels = takewhile(lambda parts: len(set(parts)) == 1, zip(*parents, strict=False))
    return "".join(f"{parts[0]}." for parts in levels)
