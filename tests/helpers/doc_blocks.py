"""The code blocks of a page of the guide, and the invisible comments that say how to run them.

A comment directly before a block tells the test what a reader need not see:

- ``<!-- setup ... -->``: Python that runs first (a tiny model, a text file);
- ``<!-- not run: REASON -->``: the block is compiled or parsed only;
- ``<!-- shorter: ARGUMENTS -->``: more words for each ``prox24`` command of the block.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_BLOCK = re.compile(
    r"(?P<comments>(?:^<!--(?:(?!-->).)*-->\n)*)^```(?P<language>\w+)\n(?P<code>.*?)^```$",
    flags=re.DOTALL | re.MULTILINE,
)
_COMMENT = re.compile(r"<!--\s*(setup|not run|shorter)[: \n](.*?)-->", flags=re.DOTALL)


@dataclass(frozen=True)
class Block:
    """One fenced block of code.

    Attributes:
        language: word after the fence.
        code: what stands in it.
        setup: Python that runs before it.
        not_run: the reason why it is not run; None where it is.
        shorter: more words for its commands.
        line: of the page, for messages.
    """

    language: str
    code: str
    setup: str
    not_run: str | None
    shorter: str
    line: int


def blocks_of(page: Path) -> list[Block]:
    """Return the blocks of a page in their order."""
    text = page.read_text()
    found = []
    for match in _BLOCK.finditer(text):
        notes = {kind: value.strip() for kind, value in _COMMENT.findall(match["comments"])}
        line = text.count("\n", 0, match.start("code")) + 1
        found.append(
            Block(
                match["language"],
                match["code"],
                notes.get("setup", ""),
                notes.get("not run"),
                notes.get("shorter", ""),
                line,
            )
        )
    return found
