"""Command line parsers whose errors are one sentence on stderr and exit code 2."""

from __future__ import annotations

import sys
from typing import NoReturn

from jsonargparse import ArgumentParser
from lightning.pytorch.cli import LightningArgumentParser
from typing_extensions import override

from prox24_lightning.cli.exit_codes import ERROR
from prox24_lightning.utils.config_errors import first_reason


class CommandParser(ArgumentParser):
    """Parser of the commands whose options come from a function's signature."""

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:
            super().error(message, ex)
        refuse(self.prog, message)


class TrainerParser(LightningArgumentParser):
    """Parser of the commands that LightningCLI runs."""

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:
            super().error(message, ex)
        refuse(self.prog, message)


def refuse(program: str, message: str) -> NoReturn:
    """Print why the words or the config cannot be used, and exit."""
    program = program.replace(" [options]", "")
    print(f"{program}: {first_reason(message)} (options: {program} --help)", file=sys.stderr)
    raise SystemExit(ERROR)
