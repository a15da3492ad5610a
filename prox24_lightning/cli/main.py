"""The ``prox24`` command: a table of names, and for each a function that is imported when it runs."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import NoReturn

from prox24_lightning import __version__

INTERRUPTED = 130
"""Exit code after Ctrl-C, as of a shell: 128 and the number of the signal."""


@dataclass(frozen=True)
class Command:
    """One line of ``prox24 --help``.

    Attributes:
        summary: what the command does.
        target: ``module:function``. The function takes the words after the command's name.
        typed: instead, the function has typed parameters, and jsonargparse makes the command line from them.
        positional: parameters without a default are words without a name.
        words: those words, for the usage line.
        first: the option that the first word without a name stands for.
    """

    summary: str
    target: str
    typed: bool = False
    positional: bool = False
    words: str = ""
    first: str = ""

    def run(self, name: str, words: list[str]) -> None:
        if self.first and words and not words[0].startswith("-"):
            words = [self.first, *words]
        module, function = self.target.split(":")
        entry = getattr(import_module(module), function)
        if not self.typed:
            entry(words)
            return
        from jsonargparse import auto_cli

        from prox24_lightning.cli.parsers import CommandParser

        auto_cli(
            entry,
            args=words,
            prog=f"prox24 {name}",
            usage=" ".join(part for part in ("prox24", name, self.words, "[options]") if part),
            as_positional=self.positional,
            parser_class=CommandParser,
            allow_abbrev=False,
        )


COMMANDS = {
    "fit": Command("train from a YAML (LightningCLI)", "prox24_lightning.cli.trainer:fit"),
    "validate": Command("score a model or checkpoint on the validation data", "prox24_lightning.cli.trainer:validate"),
    "test": Command("score a model or checkpoint on the test data", "prox24_lightning.cli.trainer:test"),
    "compare": Command(
        "dense, one-shot magnitude and Prox24 at equal steps, in one table",
        "prox24_lightning.cli.compare.command:compare",
    ),
    "study": Command(
        "figures of the prox: local against global, geometries, failures",
        "prox24_lightning.cli.study.command:study",
        typed=True,
    ),
    "recipes": Command(
        "copy example modules and their YAML into a folder, ready to run",
        "prox24_lightning.cli.recipes:recipes",
        typed=True,
        positional=True,
        words="FOLDER",
    ),
    "tradeoff": Command(
        "loss of MODEL against predicted speed, from dense to 2:4",
        "prox24_lightning.cli.tradeoff:tradeoff",
        typed=True,
        words="[MODEL]",
        first="--model.name",
    ),
    "prune": Command(
        "prune the pretrained Hugging Face model MODEL layer by layer",
        "prox24_lightning.cli.prune:prune",
        typed=True,
        words="[MODEL]",
        first="--model.name",
    ),
    "doctor": Command(
        "which layers of MODEL can run sparse, why others cannot, the gain",
        "prox24_lightning.cli.doctor:doctor",
        typed=True,
        positional=True,
        words="MODEL",
    ),
    "convert": Command(
        "check MODEL and write it packed, about half the size, into a folder",
        "prox24_lightning.cli.convert:convert",
        typed=True,
        positional=True,
        words="MODEL OUT",
    ),
    "bench": Command(
        "time MODEL dense against converted on this machine's GPU",
        "prox24_lightning.cli.bench:bench",
        typed=True,
        positional=True,
        words="MODEL",
    ),
}


def usage() -> str:
    """The text of ``prox24 --help``."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: prox24 COMMAND [options]",
            "",
            "2:4 sparsity for Lightning runs. Commands:",
            "",
            *lines,
            "",
            "prox24 COMMAND --help lists the options of a command; --version the version.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the console script."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return
    if words[0] == "--version":
        print(__version__)
        return
    name, *rest = words
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"commands: {', '.join(COMMANDS)}"
        order = " (options come after the command)" if name.startswith("-") else ""
        print(f"prox24: unknown command {name!r}{order}; {hint}", file=sys.stderr)
        raise SystemExit(2)
    # A console script does not have the working directory on its path, where users keep the classes they name in YAML.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        COMMANDS[name].run(name, rest)
    except KeyboardInterrupt:
        interrupted(name)
    except SystemExit as stop:
        # Lightning ends a run that Ctrl-C stops with code 1, which means a failure here.
        if isinstance(stop.__context__, KeyboardInterrupt):
            interrupted(name)
        raise


def interrupted(name: str) -> NoReturn:
    """Say in one line that the user has stopped the command, and exit."""
    print(f"prox24 {name}: interrupted", file=sys.stderr)
    raise SystemExit(INTERRUPTED) from None


if __name__ == "__main__":
    main()
