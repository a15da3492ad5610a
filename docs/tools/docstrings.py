"""Docstrings of the package as Markdown."""

from __future__ import annotations

import inspect
import re

ROLE = re.compile(r":(?:class|func|meth|mod|attr|data|exc):`(~?)([^`]+)`")


def without_roles(text: str) -> str:
    """Return ``text`` with each Sphinx role as code: its last name where the role begins with ``~``."""
    return ROLE.sub(lambda match: f"`{match[2].rpartition('.')[2] if match[1] else match[2]}`", text)


def first_sentence(value: object) -> str:
    """Return the first sentence of a docstring in one line; of a longer one what stands before its first semicolon or
    colon."""
    paragraph = (inspect.getdoc(value) or "").partition("\n\n")[0]
    text = without_roles(" ".join(paragraph.split())).replace("``", "`")
    sentence = re.split(r"(?<=[.;:])\s(?![^(]*\))", text)[0]  # not within parentheses
    return sentence.rstrip(".;:")
