"""Griffe extension: the docstrings' Sphinx roles (``:class:`~package.Name```) as plain code, which Markdown shows."""

from __future__ import annotations

from typing import Any

from griffe import Extension, Object

from docs.tools.docstrings import without_roles


class SphinxRoles(Extension):
    """Rewrite every docstring that has a role."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = without_roles(obj.docstring.value)
