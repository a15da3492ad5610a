"""Pages of the documentation about results: one a benchmark, made from ``benchmarks/results``.

A page is the folder's ``about.md``, what its runs say, and then every result file in full, the newest first. A line of
``about.md`` that is a link ``[Table of NAME](NAME.md)``, or ``[Table of NAME: COLUMN, COLUMN](NAME.md)``, becomes the
first table of that file, or those of its columns whose names begin so: no number is copied by hand where a file has it.
"""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks.result_files import RESULTS
from prox24_lightning.utils.markdown import markdown_table

TABLE = re.compile(r"^\[Table of [^\]:]*(?::([^\]]*))?\]\(([^)]*)\)$", flags=re.MULTILINE)
ROWS = re.compile(r"(?:^\|.*\n?)+", flags=re.MULTILINE)


def result_pages(folder: Path = RESULTS) -> dict[str, str]:
    """Return the Markdown of each benchmark's page by its name, and ``"index"``, which lists them."""
    pages = {path.name: page for path in sorted(folder.iterdir()) if path.is_dir() and (page := _page(path))}
    lines = [f"- [{_title(text)}]({name}.md)" for name, text in pages.items()]
    head = (
        "# Results\n\nOne page a benchmark. Every table comes from a script in `benchmarks/`; machine, versions and "
        "command stand below it. Absolute times compare within one run only.\n\n"
    )
    return {"index": head + "\n".join(lines) + "\n", **pages}


def anchor(path: Path) -> str:
    """Return the anchor of a result file on its benchmark's page."""
    return path.parent.name if path.name == "report.md" else path.stem


def table_of(path: Path, columns: str | None = None) -> str:
    """Return the first table of a result file; of the ``columns`` (comma-separated beginnings of names) if given.

    Raises:
        ValueError: if the file has no table, or no column begins with a name.
    """
    found = ROWS.search(path.read_text())
    if found is None:
        raise ValueError(f"{path} has no table")
    if columns is None:
        return found[0].strip()
    lines = (row.strip().removeprefix("|").removesuffix("|") for row in found[0].strip().splitlines())
    head, _, *rows = ([cell.strip() for cell in line.split(" | ")] for line in lines)  # a last cell may be empty
    chosen = []
    for name in (name.strip() for name in columns.split(",")):
        places = [place for place, title in enumerate(head) if title.startswith(name)]
        if not places:
            raise ValueError(f"{path} has no column {name!r}; columns: {', '.join(head)}")
        chosen.append(places[0])
    return markdown_table([head[place] for place in chosen], ([row[place] for place in chosen] for row in rows))


def _page(folder: Path) -> str:
    """Return the page of a benchmark; empty if it has no result."""
    files = sorted([*folder.glob("????-??-??*.md"), *folder.glob("????-??-??*/report.md")], reverse=True)
    if not files:
        return ""
    about = folder / "about.md"
    text = about.read_text() if about.is_file() else f"# {folder.name.replace('_', ' ').capitalize()}\n"
    text = TABLE.sub(lambda match: table_of(folder / match[2], match[1]), text)
    return "\n\n".join([text.strip(), "## Result files", *(_in_full(path, folder) for path in files)]) + "\n"


def _in_full(path: Path, folder: Path) -> str:
    """Return a result file as a section of its page: headings two levels down, links from the folder."""
    inside = path.parent.relative_to(folder).as_posix()
    text = path.read_text().strip()
    if inside != ".":
        text = re.sub(r"\]\((?!http)", f"]({inside}/", text)
    title, _, rest = text.partition("\n") if text.startswith("# ") else ("", "", text)
    prose_and_code = rest.split("```")
    prose_and_code[::2] = (re.sub(r"^#", "###", prose, flags=re.MULTILINE) for prose in prose_and_code[::2])
    name = anchor(path)
    heading = f"### {name.replace('_', ' ')} {{ #{name} }}"
    words = f"**{title.removeprefix('# ')}** (`{path.relative_to(folder.parent).as_posix()}`)"
    return f"{heading}\n\n{words}\n\n{'```'.join(prose_and_code).strip()}"


def _title(page: str) -> str:
    return page.splitlines()[0].removeprefix("# ")
