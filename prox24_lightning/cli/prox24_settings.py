"""Settings of the Prox24 callback as words of the command line: ``--prox24.start 0.1``."""

from __future__ import annotations

from typing import Any

from jsonargparse import Namespace

from prox24_lightning.callbacks.prox24 import Prox24
from prox24_lightning.cli.callback_entries import callback_entries, loaded_class
from prox24_lightning.cli.parsers import CommandParser

_PREFIX = "--prox24."


def take_settings(words: list[str], program: str) -> tuple[list[str], dict[str, Any]]:
    """Split the settings from the other words.

    Args:
        words: of the command line.
        program: name for errors, "prox24 fit".

    Returns:
        the other words, and the settings by name.

    Raises:
        SystemExit: with one sentence and code 2, for a setting that does not exist or a value that does not fit.
    """
    own: list[str] = []
    others: list[str] = []
    target = others
    for word in words:
        if word.startswith("-") and not word[1:2].isdigit():
            target = own if word.startswith(_PREFIX) else others
        target.append(word)
    if not own:
        return others, {}
    names = [word.removeprefix(_PREFIX).partition("=")[0] for word in own if word.startswith(_PREFIX)]
    parsed = _parser(program).parse_args(own).prox24
    return others, {name: parsed[name] for name in (name.partition(".")[0].removesuffix("+") for name in names)}


def apply_settings(config: Namespace, settings: dict[str, Any]) -> None:
    """Put the settings into the config's Prox24 callback; a config without one gets it.

    Raises:
        ValueError: for a config with several.
    """
    if not settings:
        return
    entries = callback_entries(config)
    own = [entry for entry in entries if issubclass(loaded_class(entry), Prox24)]
    if len(own) > 1:
        raise ValueError(f"{_PREFIX}* is for one Prox24, and the config has {len(own)}: change them there")
    if not own:
        path = f"{Prox24.__module__}.{Prox24.__name__}"
        config.trainer.callbacks = [*entries, Namespace(class_path=path, init_args=Namespace(settings))]
        return
    arguments = own[0].get("init_args") or Namespace()
    for name, value in settings.items():
        arguments[name] = value
    own[0].init_args = arguments


def settings_help() -> str:
    """Return the settings as a part of a help text."""
    group = next(part for part in _parser("prox24 fit").format_help().split("\n\n") if _PREFIX in part)
    start = group.index(f"  {_PREFIX}")  # after the title, and the option that names a file
    return f"Settings of the Prox24 callback, over those of the config:\n{group[start:]}"


def _parser(program: str) -> CommandParser:
    parser = CommandParser(prog=program, usage=f"{program} [options]", allow_abbrev=False)
    parser.add_class_arguments(Prox24, "prox24", instantiate=False)
    return parser
