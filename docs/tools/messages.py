"""The page that lists every error and warning of the package, read from the sources."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOMS = {
    "callbacks": "Callbacks in Lightning",
    "sparsify": "A run on its way to 2:4",
    "weights": "Which weights become 2:4",
    "prox": "The prox",
    "mask": "Masks and their files",
    "schedules.py": "Schedules",
    "calibration": "Inputs of layers",
    "solvers": "Solving a layer",
    "oneshot": "One-shot pruning",
    "finetune": "Fine-tuning, LoRA, distillation",
    "monitoring": "Monitoring",
    "convert": "Conversion",
    "integrations": "transformers and vLLM",
    "io": "Models, folders and texts",
    "cli": "Command line",
    "study": "prox24 study",
    "utils": "Files, processes, memory",
}
"""Folder of the package and its heading, in the order of the page."""
NOT_FOR_USERS = {"SystemExit", "AttributeError"}
"""Exits have printed their text before; a missing attribute is Python's own message."""
WARNERS = {"warn", "_warn", "rank_zero_warn", "warning"}


class Message(NamedTuple):
    """A text that users can meet, with ``…`` where a value stands."""

    room: str
    kind: str
    text: str


def messages(repository: Path) -> list[Message]:
    """Return every error and warning that has a text of its own, in the order of the sources."""
    package = repository / "prox24_lightning"
    found = []
    for path in sorted(package.rglob("*.py")):
        if path.parent == package and path.name == "__init__.py":
            continue  # unknown attributes, as of any module
        room = path.relative_to(package).parts[0]
        found += [Message(room, kind, text) for kind, text in _in_tree(ast.parse(path.read_text())) if " " in text]
    return list(dict.fromkeys(found))


def messages_page(repository: Path) -> str:
    """Return the page as Markdown; folders that :data:`ROOMS` does not name come last, under their own name."""
    found = messages(repository)
    parts = [
        "# Every message",
        "Each error and warning of the package, read from its sources. `…` stands for a name or a value of yours; what "
        "to do is part of the message. Frequent ones are explained in [Troubleshooting](troubleshooting.md).",
    ]
    for room in [*ROOMS, *sorted({message.room for message in found} - ROOMS.keys())]:
        heading = ROOMS.get(room, room)
        rows = [message for message in found if message.room == room]
        if rows:
            parts += [f"## {heading}", "\n".join(f"- {_code(row.text)} *{row.kind}*" for row in rows)]
    return "\n\n".join(parts) + "\n"


def _in_tree(tree: ast.AST) -> Iterator[tuple[str, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
            kind = _name(node.exc.func)
            if kind not in NOT_FOR_USERS and (text := _text(node.exc.args[0])):
                yield kind, text
        elif isinstance(node, ast.Call) and _name(node.func) in WARNERS and node.args and (text := _text(node.args[0])):
            yield "warning", text


def _name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def _text(node: ast.expr) -> str:
    """Return a literal or formatted string with ``…`` for its values; empty for anything else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"%[sdrg]", "…", node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left) + _text(node.right)
    return ""


def _code(text: str) -> str:
    text = " ".join(text.split())
    return f"`` {text} ``" if "`" in text else f"`{text}`"
