"""Errors in one line, and one sentence out of the many in which jsonargparse explains a value that does not fit."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterable
from difflib import get_close_matches
from importlib import import_module

_WHERE = re.compile(r"""(Parser key "|Problem with given class_path ')(?P<key>[^"']+)["']:?\s*(?P<rest>.*)""")
_NOT_A_REASON = re.compile(
    r"Does not validate against|Subtypes:|Errors:|Not a valid subclass|Subclass types expect|a class path \(|a dict |"
    r"Given value type:|Expected a path but"
)
_STRUCTURED = re.compile(r'Parser key "|Problem with given class_path|^Errors:|Does not validate against', re.MULTILINE)
_NO_CLASS = re.compile(r"Not a valid subclass of (?P<base>\w+)\. Got value: (?P<value>.*)")
_NO_YAML = re.compile(r"Problems parsing config: (?P<text>.*)", re.DOTALL)
_NO_MAPPING = re.compile(r"Unexpected config: (?P<text>.*)", re.DOTALL)
_LONGEST_VALUE = 60
_LONGEST_LIST = 12


def describe(error: BaseException) -> str:
    """Return the kind of an error and the first line of its message, for a report or a log."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def first_reason(message: str) -> str:
    """Return the path of the first value that does not fit, and the reason, as one line.

    jsonargparse lists every type that a value may have; the first is the one that its argument is meant for. Names that
    do not exist come with the one that was probably meant.

    Args:
        message: of a parser's error. Text that is not of that form is returned on one line.
    """
    if not _STRUCTURED.search(message):
        return _no_config(message) or with_hint(" ".join(message.split()), None)
    path: list[str] = []
    expected: list[str] = []
    reason: list[str] = []
    given = ""
    for line in message.splitlines():
        text = line.strip()
        if reason and (text.startswith("- ") or _NOT_A_REASON.match(text)):
            break
        text = text.removeprefix("- ")
        if found := _WHERE.match(text):
            path.append(found["key"])
            expected.clear()
            text = found["rest"]
        if text.startswith("Given value: "):
            given = text.removeprefix("Given value: ")
            if expected:
                break  # what follows is about the values around this one
        elif found := re.fullmatch(r"Expected (?:a )?(<class '[^']+'>|\S+)", text):
            expected.append(found[1])
        elif found := _NO_CLASS.match(text):
            reason.append(f"expected the class_path of a {found['base']}, got {_short(found['value'])}")
        elif text and not _NOT_A_REASON.match(text):
            reason.append(text)
    if reason:
        return ": ".join([*path, with_hint(_plain(" ".join(reason)), path[-1] if path else None)])
    if expected and given:
        return ": ".join([*path, _plain(f"expected {' or '.join(expected)}, got {_short(given)}")])
    return " ".join(message.split())


def meant(name: str, names: Iterable[str], *, listed: bool = False) -> str:
    """Return the end of a sentence about a name that does not exist: "; did you mean 'x'?".

    Args:
        name: as it was written.
        names: those that exist.
        listed: name them all where none is near and they are few.

    Returns:
        an empty text where there is nothing to say.
    """
    known = list(names)
    room = name.rpartition(".")[0]  # what options of one group share says nothing about which is near
    tails = {one.rpartition(".")[2]: one for one in known if one.rpartition(".")[0] == room}
    if near := get_close_matches(name.rpartition(".")[2], tails, n=1):
        return f"; did you mean {tails[near[0]]!r}?"
    return f"; options: {', '.join(known)}" if listed and 0 < len(known) <= _LONGEST_LIST else ""


def with_hint(reason: str, class_path: str | None) -> str:
    """Return a reason, with the name that was probably meant.

    Args:
        reason: in one line.
        class_path: of the class that the reason is about; None if there is none.
    """
    if found := re.fullmatch(r"Group '(?P<group>[^']+)' does not accept option '(?P<name>[^']+)'", reason):
        return f"{found['group']}: no option {found['name']!r}"
    if found := re.fullmatch(r"Option '(?P<name>[^']+)' is not accepted", reason):
        name = found["name"].partition(".")[0]
        options = _parameters(class_path)
        # A mistyped `init_args` counts as an option of the class, too.
        near = meant(name, [*options, "init_args", "class_path"])
        return f"no option {name!r}{near or meant(name, options, listed=True)}"
    if found := re.match(r"module '(?P<module>[\w.]+)' has no attribute '(?P<name>\w+)'", reason):
        module = sys.modules.get(found["module"])
        return reason + meant(found["name"], [] if module is None else dir(module))
    if re.match(r"No module named '", reason):
        return f"{reason}, neither installed nor in this folder"
    return reason


def _parameters(class_path: str | None) -> list[str]:
    """Return the names of a constructor's parameters; none where the class cannot be read."""
    module, _, name = (class_path or "").rpartition(".")
    try:
        return list(inspect.signature(getattr(import_module(module), name)).parameters)
    except (ImportError, AttributeError, ValueError, TypeError):
        return []


def _no_config(message: str) -> str:
    """Return why a text is no config, in one line; empty for a message about something else."""
    if found := _NO_MAPPING.fullmatch(message):
        text = " ".join(found["text"].split())
        return f"expected lines 'key: value', got {_short(text) if text else 'an empty file'}"
    found = _NO_YAML.fullmatch(message)
    return yaml_problem(found["text"]) if found else ""


def yaml_problem(text: str) -> str:
    """Return why a text is no YAML, in one line, from the message of a loader: what and where, then what was begun."""
    parts: list[str] = []
    for line in text.splitlines():
        if place := re.match(r'\s*in ".*", (line \d+, column \d+)', line):
            parts[-1:] = [f"{parts[-1]} in {place[1]}" if parts else place[1]]
        elif line.strip() and not line.startswith("    "):  # the line itself, as some loaders quote it
            parts.append(line.strip())
    return f"not YAML: {'; '.join(reversed(parts))}"


def _short(value: str) -> str:
    return value if len(value) <= _LONGEST_VALUE else f"{value[: _LONGEST_VALUE - 1]}…"


def _plain(text: str) -> str:
    text = re.sub(r"<class '([\w.]+)'>", r"\1", text).replace("NoneType", "null")
    text = re.sub(r"typing\.Literal\[([^\]]*)\]", r"one of \1", text)
    if found := re.match(r"^Expected (?:a )?(.*)\. Got value: (.*)$", text):
        return f"expected {found[1]}, got {_short(found[2])}"
    return text
