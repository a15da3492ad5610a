"""The page that lists every option of the commands, from their own help."""

from __future__ import annotations

import io
import os
from contextlib import redirect_stdout, suppress
from unittest.mock import patch

from prox24_lightning.cli.main import COMMANDS, main

WIDTH = "100"


def options_page() -> str:
    """Return the page as Markdown."""
    parts = [
        "# Every option",
        "What `prox24 COMMAND --help` prints. [Command line](command_line.md) says what the commands are for.",
    ]
    parts += [f"## prox24 {name}\n\n```text\n{help_of(name)}\n```" for name in COMMANDS]
    return "\n\n".join(parts) + "\n"


def help_of(name: str) -> str:
    """Return the help of a command; without the options that LightningCLI adds, where it does."""
    text = io.StringIO()
    with patch.dict(os.environ, {"COLUMNS": WIDTH}), redirect_stdout(text), suppress(SystemExit):
        main([name, "--help"])
    if COMMANDS[name].typed:
        return text.getvalue().strip()
    usage, description, *groups = text.getvalue().strip().split("\n\n")
    own = [group for group in groups[:1] if "--trainer" not in group and "--config" not in group]
    return "\n\n".join(
        [usage, description, *own, "and those of LightningCLI: --config, --model, --data, --trainer, ..."]
    )
