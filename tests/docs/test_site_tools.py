"""What the site is made of besides its pages: results, messages, links into the repository, roles of docstrings."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from benchmarks.result_pages import result_pages, table_of
from docs.tools.api_tables import PAGES, with_table
from docs.tools.docstrings import first_sentence, without_roles
from docs.tools.messages import messages

# The extra `docs` is not everywhere where other tests run.
hooks = pytest.importorskip("docs.tools.hooks")


@pytest.fixture
def results(tmp_path):
    folder = tmp_path / "speed"
    folder.mkdir()
    (folder / "about.md").write_text("# Speed\n\nFast.\n\n[Table of 2026-01-02: size, ms](2026-01-02.md)\n")
    table = "| size | machine, kind | ms, median |\n| --- | --- | --- |\n| 1 | a | 0.5 |\n"
    (folder / "2026-01-02.md").write_text(f"# New\n\n{table}\n## More\n\n```yaml\n# a comment\n```\n")
    (folder / "2026-01-01.md").write_text(f"# Old\n\n{table}")
    return tmp_path


def test_a_page_a_benchmark_with_its_tables_and_files(results):
    pages = result_pages(results)
    assert list(pages) == ["index", "speed"]
    assert "- [Speed](speed.md)" in pages["index"]
    page = pages["speed"]
    assert "Fast.\n\n| size | ms, median |\n| --- | --- |\n| 1 | 0.5 |\n" in page
    assert page.index("### 2026-01-02 { #2026-01-02 }") < page.index("### 2026-01-01 { #2026-01-01 }")
    assert "**New** (`speed/2026-01-02.md`)" in page
    assert "\n#### More\n" in page
    assert "\n# a comment\n" in page, "code is left as it is"


def test_a_last_cell_may_be_empty(tmp_path):
    (tmp_path / "a.md").write_text("| size | ms | share |\n| --- | --- | --- |\n| 1 | 2 |  |\n")
    assert table_of(tmp_path / "a.md", "share, size") == "| share | size |\n| --- | --- |\n|  | 1 |"


def test_a_benchmark_without_words_of_its_own_has_a_page_too(results):
    (results / "speed" / "about.md").unlink()
    (results / "empty").mkdir()
    assert list(result_pages(results)) == ["index", "speed"]
    assert result_pages(results)["speed"].startswith("# Speed\n\n## Result files\n")


def test_the_navigation_gets_every_benchmark():
    config = SimpleNamespace(nav=[{"Start": ["index.md"]}, {"Results": ["results/recovery.md"]}])
    results = hooks.on_config(config).nav[1]["Results"]
    assert results[0] == "results/recovery.md"
    assert "results/convert.md" in results[1]["More"]
    assert "results/recovery.md" not in results[1]["More"]


def test_a_column_that_is_not_there_is_refused(results):
    with pytest.raises(ValueError, match="has no column 'loss'; columns: size, machine, kind, ms"):
        table_of(results / "speed" / "2026-01-02.md", "loss")


@pytest.mark.parametrize(
    ("path", "page"),
    [
        ("docs/install.md", "install.md"),
        ("docs/../benchmarks/results/recovery/about.md", "results/recovery.md"),
        ("benchmarks/results/recovery/2026-11-28.md", "results/recovery.md#2026-11-28"),
        ("benchmarks/results/recovery/2026-11-28.png", "results/recovery/2026-11-28.png"),
        ("benchmarks/results/README.md", "results/index.md"),
        ("prox24_lightning/prox/DERIVATION.md", "derivation.md"),
        ("tests/helpers/doc_blocks.py", None),
    ],
)
def test_links_into_the_repository(path, page):
    assert hooks.site_target(path) == page


def test_formulas_become_mathml():
    text = hooks.on_page_content('<p><span class="arithmatex">\\(a &lt; b\\)</span></p>', None, None, None)
    assert "<math" in text
    assert "arithmatex" not in text


def test_escaped_bars_of_cells_are_bars():
    text = hooks.on_page_content("<p>\\|</p><td><code>\\|a\\|</code></td>", None, None, None)
    assert text == "<p>\\|</p><td><code>|a|</code></td>"


def test_roles_become_code():
    assert without_roles("see :class:`~a.b.Name` and :func:`a.f`") == "see `Name` and `a.f`"


@pytest.mark.parametrize("page", sorted(PAGES.glob("*.md")), ids=lambda page: page.stem)
def test_the_tables_of_the_reference_are_of_today(page):
    text = page.read_text()
    assert with_table(text) == text, "run `python -m docs.tools.api_tables`"
    assert "| name | import from | what it does |" in text


def test_a_page_gets_a_row_for_each_member_and_for_each_name_of_a_module():
    page = "# Title\n\nWords.\n\n::: prox24_lightning.mask.check.is_24\n\n::: prox24_lightning.schedules\n"
    made = with_table(page)
    assert with_table(made) == made
    head, members = made.split("\n\n:::", 1)
    assert page == f"{head.partition(chr(10) + chr(10) + '|')[0]}\n\n:::{members}"
    assert "| [`is_24`](../../prox24_lightning/mask/check.py) | `prox24_lightning` | Return whether every group" in head
    assert "| [`Cubic`](../../prox24_lightning/schedules.py) | `prox24_lightning.schedules` |" in head
    assert "dataclass" not in head


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        ("Do it.\n\nMore.", "Do it"),
        ("Count what\nis there, by :class:`~a.B`. And more.", "Count what is there, by `B`"),
        ("Along ``dim`` (a pair: along both), no more: never", "Along `dim` (a pair: along both), no more"),
        (None, ""),
    ],
)
def test_the_first_sentence_of_a_docstring(docstring, expected):
    def function():
        """Replaced."""

    function.__doc__ = docstring
    assert first_sentence(function) == expected


def test_a_name_of_the_reference_leads_to_its_entry():
    page = SimpleNamespace(file=SimpleNamespace(src_uri="api/masks.md"))
    text = hooks.on_page_markdown("[`is_24`](../../prox24_lightning/mask/check.py)", page, None, None)
    assert text == "[`is_24`](#prox24_lightning.mask.check.is_24)"


def test_messages_are_read_with_their_values_left_open(tmp_path):
    folder = tmp_path / "prox24_lightning" / "io"
    folder.mkdir(parents=True)
    (folder / "x.py").write_text(
        "def f(a):\n"
        "    log.warning('%s is slow', a)\n"
        "    raise ValueError(f'size={a!r} does not fit; ' 'take another')\n"
    )
    found = {(message.room, message.kind, message.text) for message in messages(tmp_path)}
    assert found == {("io", "warning", "… is slow"), ("io", "ValueError", "size=… does not fit; take another")}
