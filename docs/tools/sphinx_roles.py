"""Griffe extension: the docstrings' Sphinx roles (``:class:`~package.Name```) as plain code, which Markdown shows."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

ROLE = re.compile(r":(?:class|func|meth|mod|attr|data|exc):`(~?)([^`]+)`")


def without_roles(text: str) -> str:
    """Return ``text`` with each role as code: its last name where the role begins with ``~``."""
    return ROLE.sub(lambda match: f"`{match[2].rpartition('.')[2] if match[1] else match[2]}`", text)


class SphinxRoles(Extension):
    """Rewrite every docstring that has a role."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = without_roles(obj.docstring.value)
