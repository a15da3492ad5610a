"""Errors in one line, and one sentence out of the many in which jsonargparse explains a value that does not fit."""

from __future__ import annotations

import re

_WHERE = re.compile(r"""(Parser key "|Problem with given class_path ')(?P<key>[^"']+)["']:?\s*(?P<rest>.*)""")
_NOT_A_REASON = re.compile(
    r"Does not validate against|Subtypes:|Errors:|Not a valid subclass|Subclass types expect|a class path \(|a dict |"
    r"Given value type:"
)
_STRUCTURED = re.compile(r'Parser key "|Problem with given class_path|^Errors:|Does not validate against', re.MULTILINE)


def describe(error: BaseException) -> str:
    """Return the kind of an error and the first line of its message, for a report or a log."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def first_reason(message: str) -> str:
    """Return the path of the first value that does not fit, and the reason, as one line.

    jsonargparse lists every type that a value may have; the first is the one that its argument is meant for.

    Args:
        message: of a parser's error. Text that is not of that form is returned on one line.
    """
    path: list[str] = []
    expected: list[str] = []
    reason: list[str] = []
    given = ""
    for line in message.splitlines() if _STRUCTURED.search(message) else ():
        text = line.strip()
        if reason and (text.startswith("- ") or _NOT_A_REASON.match(text)):
            break
        text = text.removeprefix("- ")
        if found := _WHERE.match(text):
            path.append(found["key"])
            text = found["rest"]
        if text.startswith("Given value: "):
            given = text.removeprefix("Given value: ")
        elif found := re.fullmatch(r"Expected (?:a )?(<class '[^']+'>|\S+)", text):
            expected.append(found[1])
        elif text and not _NOT_A_REASON.match(text):
            reason.append(text)
    if reason:
        return ": ".join([*path, _plain(" ".join(reason))])
    if expected and given:
        return ": ".join([*path, _plain(f"expected {' or '.join(expected)}, got {given}")])
    return " ".join(message.split())


def _plain(text: str) -> str:
    text = re.sub(r"<class '([\w.]+)'>", r"\1", text).replace("NoneType", "null")
    text = re.sub(r"typing\.Literal\[([^\]]*)\]", r"one of \1", text)
    return re.sub(r"^Expected (a )?(.*)\. Got value: (.*)$", r"expected \2, got \3", text)
