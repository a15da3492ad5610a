"""Short forms of module and parameter names, for tables and messages."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

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
