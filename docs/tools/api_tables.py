"""The tables at the head of the API pages, from the members that a page names and their docstrings.

``python -m docs.tools.api_tables`` rewrites them.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from docs.tools.docstrings import first_sentence
from prox24_lightning.utils.markdown import markdown_table

PAGES = Path(__file__).resolve().parents[1] / "api"
MEMBER = re.compile(r"^::: (\S+)$", flags=re.MULTILINE)
TABLE = re.compile(r"^\| name \|.*?(?=\n\n)", flags=re.DOTALL | re.MULTILINE)


def with_table(page: str) -> str:
    """Return a page with the table of its members in place of the one that it has, or after its first paragraph.

    A name leads to the source, which the site replaces by the entry below.
    """
    rows = []
    for path in MEMBER.findall(page):
        for name, value, module in _named(path):
            source = f"../../{module.replace('.', '/')}.py"
            rows.append([f"[`{name}`]({source})", f"`{_home(name, module)}`", first_sentence(value)])
    table = markdown_table(["name", "import from", "what it does"], rows)
    if TABLE.search(page):
        return TABLE.sub(lambda _: table, page, count=1)
    head, members = page.split("\n\n:::", 1)
    return f"{head}\n\n{table}\n\n:::{members}"


def _named(path: str) -> Iterator[tuple[str, Any, str]]:
    """Yield name, object and module of a member; of a module all that it shows."""
    parent, _, name = path.rpartition(".")
    value = getattr(import_module(parent), name, None) or import_module(path)
    if not isinstance(value, ModuleType):
        yield name, value, parent
        return
    for inner, one in vars(value).items():
        public = not inner.startswith("_") and getattr(one, "__module__", "") == path
        if public and (inspect.isclass(one) or inspect.isfunction(one)):
            yield inner, one, path


def _home(name: str, module: str) -> str:
    """Return the shortest module whose public names hold this one; the module itself if none does."""
    parts = module.split(".")
    for size in range(1, len(parts)):
        home = ".".join(parts[:size])
        if name in getattr(import_module(home), "__all__", ()):
            return home
    return module


if __name__ == "__main__":
    for file in sorted(PAGES.glob("*.md")):
        file.write_text(with_table(file.read_text()))
