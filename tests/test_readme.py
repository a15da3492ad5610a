"""README and guide: the quickstart runs as it stands, and everything that a page cites exists."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
README = REPOSITORY / "README.md"
PAGES = [README, *sorted((REPOSITORY / "docs").glob("*.md"))]
RESULTS = REPOSITORY / "benchmarks" / "results"

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def python_blocks(page):
    return re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)


@pytest.mark.slow
def test_the_quickstart_runs(tmp_path):
    [block, *_] = python_blocks(README)
    done = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert list(tmp_path.rglob("benchmark.json")), "the final hook has written its report"


def test_the_readme_is_a_front_page():
    assert len(README.read_text().splitlines()) <= 200


@each_page
def test_python_blocks_parse_and_their_imports_exist(page):
    for block in python_blocks(page):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("prox24_lightning"):
                for alias in node.names:
                    assert hasattr(import_module(node.module), alias.name), f"{node.module}.{alias.name}"


@each_page
def test_every_link_leads_somewhere(page):
    for target, heading in re.findall(r"\]\((?!http)([^)#]*)(?:#([^)]*))?\)", page.read_text()):
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.*)$", path.read_text(), flags=re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, heading


@each_page
def test_every_cited_result_exists(page):
    for target in re.findall(r"`([a-z0-9_]+/\d{4}-\d\d-\d\d[^`]*)`", page.read_text()):
        assert (RESULTS / target).exists(), target


def test_the_results_page_cites_its_files():
    cited = re.findall(r"`([a-z0-9_]+/\d{4}-\d\d-\d\d[^`]*)`", (REPOSITORY / "docs" / "results.md").read_text())
    assert len(set(cited)) > 20


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
