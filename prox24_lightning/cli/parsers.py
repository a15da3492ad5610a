"""Command line parsers: lists and switches as everywhere, own options first in the help, errors in one sentence."""

from __future__ import annotations

import json
import re
import sys
from argparse import Action
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, NoReturn, Union, get_args, get_origin

import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch.cli import LightningArgumentParser
from typing_extensions import override

from prox24_lightning.cli.exit_codes import ERROR
from prox24_lightning.utils.errors import first_reason, meant

_OF_EVERY_COMMAND = ("help", "config", "print_config")
_NO_OPTION = re.compile(
    r"(?:Subcommand '\w+' does not accept option|Group '(?P<group>[\w.]+)' does not accept option|Option) "
    r"'(?P<key>[^']+)'(?: is not accepted)?"
)
_CONFIG_WORD = re.compile(r"unrecognized arguments: (?P<file>[^\s-]\S*\.ya?ml)")
_NO_WORD = re.compile(r"unrecognized arguments: (?P<option>--[^\s=]+)")


class CommandParser(ArgumentParser):
    """Parser of the commands whose options come from a function's signature.

    Attributes:
        files: configs that were read, for errors; the last of them is being read while ``reading``.
        reading: whether a config is being read.
    """

    files: tuple[str, ...] = ()
    reading = False

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:
            super().error(message, ex)
        _refuse_config(getattr(ex, "subcommand_parser", self), message)

    @override
    def parse_path(self, path: Any, *args: Any, **options: Any) -> Any:
        with _reading(self, path):
            return super().parse_path(path, *args, **options)

    @override
    def parse_args(  # type: ignore[override]  # argparse has overloads
        self, args: Sequence[str] | None = None, namespace: Any = None, **options: Any
    ) -> Any:
        return super().parse_args(readable(self, args), namespace, **options)

    @override
    def format_help(self, *args: Any, **options: Any) -> str:
        own_first(self)
        return _without_markup(super().format_help(*args, **options))


class TrainerParser(LightningArgumentParser):
    """Parser of the commands that LightningCLI runs.

    Attributes:
        own_group: title of the group of options that ``--help`` shows first; "" for none.
        own_help: what ``--help`` shows next, before LightningCLI's options; None for nothing.
        files, reading: as of :class:`CommandParser`.
    """

    files: tuple[str, ...] = ()
    reading = False
    own_group = ""
    own_help: Callable[[], str] | None = None

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:
            super().error(message, ex)
        _refuse_config(getattr(ex, "subcommand_parser", self), message)

    @override
    def parse_path(self, path: Any, *args: Any, **options: Any) -> Any:
        with _reading(self, path):
            return super().parse_path(path, *args, **options)

    @override
    def parse_args(  # type: ignore[override]  # argparse has overloads
        self, args: Sequence[str] | None = None, namespace: Any = None, **options: Any
    ) -> Any:
        return super().parse_args(readable(self, args), namespace, **options)

    @override
    def format_help(self, *args: Any, **options: Any) -> str:
        own_first(self, self.own_group)
        self.usage = f"{_program(self.prog)} --config X.yaml [options]"
        parts = _without_markup(super().format_help(*args, **options)).split("\n\n")  # usage, description, groups
        if self.own_help is not None:
            parts.insert(3 if self.own_group else 2, self.own_help())
        return "\n\n".join(parts)


def _without_markup(text: str) -> str:
    """Return a help text without the markup of docstrings, and types by their bare names."""
    text = re.sub(r":(?:class|func|meth|attr|mod|data):`~?(?:[\w.]*\.)?(\w+)`", r"\1", text)
    text = re.sub(r"<class\s+'(?:[\w.]*\.)?(\w+)'>", r"\1", text)
    return text.replace("``", "").replace("[ITEM,...]", "ITEM ...")


def refuse(program: str, message: str, file: str = "") -> NoReturn:
    """Print why the words or the config cannot be used, and exit.

    Args:
        program: as the user calls it, "prox24 fit".
        message: of a parser, or a sentence.
        file: the config that it is about, if it is about one.
    """
    program = _program(program)
    message = message.replace("required: model.name", "required: MODEL")  # the first word, for the user
    parts = [program, *([file] if file else []), first_reason(message)]
    print(f"{': '.join(parts)} (options: {program} --help)", file=sys.stderr)
    raise SystemExit(ERROR)


@contextmanager
def _reading(parser: CommandParser | TrainerParser, path: Any) -> Iterator[None]:
    parser.files, before = (*parser.files, str(path)), parser.reading
    parser.reading = True
    try:
        yield
    finally:
        parser.reading = before


def _refuse_config(parser: CommandParser | TrainerParser, message: str) -> NoReturn:
    """Refuse with the file that a parser's error is about, and the option that was probably meant."""
    file = parser.files[-1] if parser.reading else ""
    if found := _NO_OPTION.fullmatch(message):
        keys = [action.dest for action in parser._actions]
        name = key = ".".join(filter(None, [found["group"], found["key"]]))
        # The shortest beginning of the key that no option has: of `modle.init_args.lr`, `modle`.
        for size in range(1, key.count(".") + 2):
            name = ".".join(key.split(".")[:size])
            known = sorted({".".join(one.split(".")[:size]) for one in keys})
            if name not in known:
                break
        message = f"no option {name!r}{meant(name, known, listed=True)}"
        file = file or _file_with(key, parser.files)
    elif found := _NO_WORD.match(message):
        message += meant(found["option"], parser._option_string_actions)
    elif found := _CONFIG_WORD.fullmatch(message):
        message += f"; did you mean --config {found['file']}?"
    refuse(parser.prog, message, file)


def _file_with(key: str, files: Sequence[str]) -> str:
    """Return the last of the configs that has a key; empty if none has."""
    for file in reversed(files):
        value = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if value is not None:
            return file
    return ""


def readable(parser: ArgumentParser, words: Sequence[str] | None) -> list[str] | None:
    """Return words as jsonargparse reads them.

    Several words after a list's option become one list (``--seeds 0 1``; ``--seeds "[0, 1]"`` stays), and a switch
    without a value is true (``--overwrite``).
    """
    if words is None:
        return None
    actions = {option: action for action in parser._actions for option in action.option_strings}
    found: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        action = actions.get(word)
        kind = None if action is None else getattr(action, "_typehint", None)
        if (values := _switch_values(kind)) and (not rest or rest[0].lower() not in values):
            found.append(f"{word}=true")
        elif (element := _element(kind)) is not None and action is not None:
            listed = []
            while rest and not re.match(r"-(?!\d)", rest[0]):
                listed.append(rest.pop(0))
            found += [word, *listed] if not _spread(listed) else [f"{word}={_listed(listed, element)}"]
        else:
            found.append(word)
    return found


def _switch_values(kind: Any) -> list[str]:
    """Return the words that may follow a switch, in lower case: of a bool, or of a bool or some words; else none."""
    options = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    if bool not in options:
        return []
    null = ["null"] if type(None) in options else []
    return ["true", "false", "yes", "no", *null, *(str(word) for option in options for word in get_args(option))]


def _spread(values: Sequence[str]) -> bool:
    """Return whether the values are elements, and not one list already."""
    return bool(values) and not (len(values) == 1 and (values[0] == "null" or values[0].startswith("[")))


def _listed(values: Sequence[str], element: Any) -> str:
    return json.dumps(list(values)) if element is str else f"[{', '.join(values)}]"


def _element(kind: Any) -> Any:
    """Return the type of a list's elements; None if ``kind`` is neither a list nor a list or None."""
    if get_origin(kind) in (Union, UnionType):
        options = [option for option in get_args(kind) if option is not NoneType]
        kind = options[0] if len(options) == 1 else None
    if get_origin(kind) not in (list, Sequence):
        return None
    element = get_args(kind)[0]
    return str if get_origin(element) is not None else element  # a choice of words


def own_first(parser: ArgumentParser, title: str = "") -> None:
    """Order what ``--help`` shows: the group of this title, the command's own options, those of every command.

    Groups with a title of their own, but for LightningCLI's, stand before the options.
    """

    def general(action: Action) -> bool:
        return action.dest in _OF_EVERY_COMMAND

    for group in parser._action_groups:
        group._group_actions.sort(key=general)
    groups = parser._action_groups
    named = [group for group in groups[2:] if isinstance(parser, CommandParser) or group.title == title]
    parser._action_groups = [groups[0], *named, groups[1], *(one for one in groups[2:] if one not in named)]


def _program(name: str) -> str:
    return name.replace(" [options]", "")
