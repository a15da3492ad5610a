"""Hooks of mkdocs: pages made from other files of the repository, links into it, and formulas as MathML.

The sources of the guide link to files of the repository, so that they read on any Git host as well. In the site the
same links lead to the page that shows that file.
"""

from __future__ import annotations

import html
import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

from benchmarks.result_files import RESULTS
from benchmarks.result_pages import anchor, result_pages
from docs.tools.messages import messages_page
from docs.tools.options import options_page

REPOSITORY = Path(__file__).resolve().parents[2]
MIRRORED = {
    "derivation.md": "prox24_lightning/prox/DERIVATION.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
}
"""Pages that are files of the repository outside of ``docs``."""
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|#|mailto:)([^)#\s]*)(#[^)\s]*)?\)")
CELL = re.compile(r"<td\b.*?</td>", flags=re.DOTALL)
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', flags=re.DOTALL)


def on_config(config: Any) -> Any:
    """Add to the navigation the benchmarks that it does not name."""
    [results] = [entry["Results"] for entry in config.nav if "Results" in entry]
    named = str(results)
    more = [f"results/{name}.md" for name in result_pages() if f"results/{name}.md" not in named]
    if more:
        results.append({"More": more})
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages, and the figures and data of the results."""
    pages = {f"results/{name}.md": text for name, text in result_pages().items()}
    pages["messages.md"] = messages_page(REPOSITORY)
    pages["options.md"] = options_page()
    pages |= {page: (REPOSITORY / source).read_text() for page, source in MIRRORED.items()}
    for page, text in pages.items():
        files.append(File.generated(config, page, content=text))
    for path in sorted(RESULTS.rglob("*")):
        if path.is_file() and path.suffix != ".md":
            target = f"results/{path.relative_to(RESULTS).as_posix()}"
            files.append(File.generated(config, target, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Lead links into the repository to the pages of the site."""
    here = page.file.src_uri
    source = _source(here)

    def lead(match: re.Match[str]) -> str:
        image, text, target, fragment = match[1], match[2], match[3], match[4] or ""
        if not target:
            return match[0]
        path = (source.parent / target).as_posix()
        found = site_target(path, fragment)
        if found is None and here.startswith("api/"):
            return f"[{text}](#{member_anchor(path, text)})"
        if found is None:
            return text
        uri, _, fragment = found.partition("#")
        relative = os.path.relpath(uri, PurePosixPath(here).parent)
        return f"{image}[{text}]({relative}{'#' + fragment if fragment else ''})"

    prose_and_code = re.split(r"(^```.*?^```$)", markdown, flags=re.DOTALL | re.MULTILINE)
    prose_and_code[::2] = (LINK.sub(lead, prose) for prose in prose_and_code[::2])
    return "".join(prose_and_code)


def on_page_content(html_text: str, page: Any, config: Any, files: Files) -> str:
    """Turn formulas into MathML, which browsers draw without a script, and show escaped bars of tables as bars."""

    def formula(match: re.Match[str]) -> str:
        display = "block" if match[2] == "[" else "inline"
        return convert(html.unescape(match[3]), display=display)

    # Python-Markdown keeps the backslash in code, where other renderers of Markdown want it.
    html_text = CELL.sub(lambda match: match[0].replace("\\|", "|"), html_text)
    return FORMULA.sub(formula, html_text)


def member_anchor(path: str, name: str) -> str:
    """Return the anchor of a member of the package, from the path of its source and its name as code."""
    module = os.path.normpath(path).removesuffix(".py").replace(os.sep, ".")
    return f"{module}.{name.strip('`')}"


def site_target(path: str, fragment: str = "") -> str | None:
    """Return where the site shows a path of the repository, or None where it does not."""
    path = os.path.normpath(path)
    by_source = {source: page for page, source in MIRRORED.items()}
    if path in by_source:
        return by_source[path] + fragment
    if path == "README.md":
        return "index.md"
    results = os.path.relpath(path, "benchmarks/results")
    if not results.startswith(".."):
        file = RESULTS / results
        if results == "." or results == "README.md":
            return "results/index.md"
        name = results.split("/")[0]
        if file.name == "about.md" or file.is_dir():
            return f"results/{name}.md{fragment}"
        return f"results/{name}.md#{anchor(file)}" if file.suffix == ".md" else f"results/{results}"
    inside = os.path.relpath(path, "docs")
    return None if inside.startswith("..") else inside + fragment


def _source(page: str) -> PurePosixPath:
    """Return the path in the repository that a page's links start from."""
    if page in MIRRORED:
        return PurePosixPath(MIRRORED[page])
    if page.startswith("results/"):
        name = PurePosixPath(page).stem
        return PurePosixPath("docs", page) if name == "index" else PurePosixPath("benchmarks/results", name, "about.md")
    return PurePosixPath("docs", page)
