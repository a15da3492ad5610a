"""README and guide: everything that a page links or cites exists, and each public name has its place."""

from __future__ import annotations

import ast
import re
from importlib import import_module
from pathlib import Path

import pytest
import yaml

import prox24_lightning
from docs.tools.messages import messages
from prox24_lightning.cli.main import COMMANDS

REPOSITORY = Path(__file__).parents[2]
README = REPOSITORY / "README.md"
RESULTS = REPOSITORY / "benchmarks" / "results"
PAGES = [
    README,
    REPOSITORY / "CONTRIBUTING.md",
    *sorted((REPOSITORY / "docs").rglob("*.md")),
    *sorted(RESULTS.glob("*/about.md")),
]
MADE_BY_THE_BUILD = {"messages.md", "options.md"}

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPOSITORY).as_posix())


def python_blocks(page):
    return re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)


def test_the_readme_is_a_front_page():
    assert len(README.read_text().splitlines()) <= 160


def test_the_numbers_of_the_readme_stand_in_the_result_files_that_it_links():
    """The cells of its tables, as they are or rounded."""
    text = README.read_text()
    files = {REPOSITORY / link for link in re.findall(r"\((benchmarks/results/[^)]*\.md)\)", text)}
    files |= {path.parent / "about.md" for path in files}
    known = [float(n) for path in files if path.exists() for n in re.findall(r"\d+\.\d+", path.read_text())]
    tables = re.findall(r"^## (?:Recovery|Conversion).*?(?=^## )", text, flags=re.DOTALL | re.MULTILINE)
    assert len(tables) == 2
    for row in re.findall(r"^\|.*\|$", "".join(tables), flags=re.MULTILINE):
        for number in re.findall(r"(?<![\w.])\d+\.\d+(?![\w.])", row):
            places = len(number.partition(".")[2])
            assert any(f"{value:.{places}f}" == number for value in known), f"{number} of {row}"


@each_page
def test_python_blocks_parse_and_their_imports_exist(page):
    for block in python_blocks(page):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("prox24_lightning"):
                for alias in node.names:
                    assert hasattr(import_module(node.module), alias.name), f"{node.module}.{alias.name}"


@each_page
def test_every_link_leads_somewhere(page):
    prose = re.sub(r"`[^`\n]*`", "", page.read_text())
    for target, heading in re.findall(r"\]\((?!http)([^)#]*)(?:#([^)]*))?\)", prose):
        if target in MADE_BY_THE_BUILD:
            continue
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.*)$", path.read_text(), flags=re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, heading


@each_page
def test_every_cited_result_exists(page):
    for target in re.findall(r"`([a-z0-9_]+/\d{4}-\d\d-\d\d[^`]*)`", page.read_text()):
        assert (RESULTS / target).exists(), target


@each_page
def test_every_cited_test_exists(page):
    names = {path.stem for path in (REPOSITORY / "tests").rglob("test_*.py")}
    assert set(re.findall(r"`(test_\w+)`", page.read_text())) <= names


@each_page
def test_every_dotted_name_exists(page):
    for dotted in set(re.findall(r"`(prox24_lightning(?:\.\w+)+)`", page.read_text())):
        module, _, name = dotted.rpartition(".")
        try:
            import_module(dotted)
        except ModuleNotFoundError:
            assert hasattr(import_module(module), name), dotted


def test_every_public_name_is_in_the_reference():
    pages = "".join(page.read_text() for page in (REPOSITORY / "docs" / "api").glob("*.md"))
    documented = {name.rpartition(".")[2] for name in re.findall(r"^::: (\S+)", pages, flags=re.MULTILINE)}
    assert set(prox24_lightning.__all__) - documented == set()


def test_every_command_is_described():
    page = (REPOSITORY / "docs" / "command_line.md").read_text()
    assert [name for name in COMMANDS if f"prox24 {name}" not in page] == []


def test_every_page_is_in_the_navigation():
    text = (REPOSITORY / "mkdocs.yml").read_text()
    pages = [page.relative_to(REPOSITORY / "docs").as_posix() for page in (REPOSITORY / "docs").rglob("*.md")]
    assert [page for page in pages if f" {page}\n" not in text] == []


def test_every_warning_is_explained():
    """By four words in a row of its text, as values differ from run to run."""
    page = (REPOSITORY / "docs" / "troubleshooting.md").read_text().replace("`", "")
    for message in messages(REPOSITORY):
        if message.kind == "warning":
            parts = [part.strip(" :;,.()").split() for part in message.text.replace("`", "").split("…")]
            openings = [" ".join(words[:4]) for words in parts if len(words) > 1]
            known = not openings or any(opening in page for opening in openings)
            assert known, f"add a row to docs/troubleshooting.md: {message.text}"


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    assert citation["version"] == prox24_lightning.__version__
    assert citation["preferred-citation"]["url"] in README.read_text()
