"""Every code block of README and guide runs, page by page, in a folder of its own and as a reader would run it."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import torch
import yaml
from doc_blocks import Block, blocks_of
from jsonargparse import auto_parser

from prox24_lightning.cli.main import COMMANDS, main
from prox24_lightning.cli.parsers import CommandParser

REPOSITORY = Path(__file__).parents[2]
PAGES = [page for page in [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md",
                           *sorted((REPOSITORY / "docs").rglob("*.md"))] if blocks_of(page)]  # fmt: skip
CODE = {"python", "yaml", "shell"}


def run_python(code: str, names: dict, page: Path, line: int) -> None:
    # The lines before it are empty, so that a traceback names the line of the page.
    exec(compile("\n" * (line - 1) + code, page, "exec"), names)


def commands_of(block: Block) -> list[list[str]]:
    """The command lines of a block, split into words; comments are left out."""
    lines = block.code.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def run_command(words: list[str], monkeypatch) -> None:
    if words[0] == "cd":
        monkeypatch.chdir(words[1])
        return
    assert words[0] == "prox24", f"only prox24 runs in a test; mark the block with <!-- not run: REASON -->: {words}"
    code = 0
    try:
        main(words[1:])
    except SystemExit as exit:
        code = exit.code or 0
    assert code == 0, f"{shlex.join(words)} ended with exit code {code}"


def parse_command(words: list[str]) -> None:
    """Check the options of a ``prox24`` command without running it."""
    if words[0] != "prox24" or words[1].startswith("-"):
        return
    command = COMMANDS[words[1]]
    if words[1] == "fit":
        with pytest.raises(SystemExit) as exit:
            main([*words[1:], "--print_config"])
        assert exit.value.code in (None, 0)
    elif command.typed:
        module, function = command.target.split(":")
        entry = getattr(__import__(module, fromlist=[function]), function)
        parser = auto_parser(entry, as_positional=command.positional, parser_class=CommandParser, allow_abbrev=False)
        options = words[2:]
        if command.first and options and not options[0].startswith("-"):
            options.insert(0, command.first)
        parser.parse_args(options)


def parse_yaml(code: str, folder: Path) -> None:
    """Lay a block over a recipe and let LightningCLI check every key and type of it."""
    assert isinstance(yaml.safe_load(code), dict)
    path = folder / "block.yaml"
    path.write_text(code)
    base = REPOSITORY / "configs" / "digits.yaml"
    with pytest.raises(SystemExit) as exit:
        main(["fit", "--config", str(base), "--config", str(path), "--print_config"])
    assert exit.value.code in (None, 0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPOSITORY).as_posix())
def test_the_code_blocks_of_a_page_run(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict = {"__name__": "__page__"}
    for block in blocks_of(page):
        assert block.language in CODE, f"line {block.line}: {block.language} is not one of {sorted(CODE)}"
        run_python(block.setup, names, page, 1)
        if block.language == "python":
            if block.not_run is None:
                run_python(block.code, names, page, block.line)
            else:
                compile(block.code, page, "exec")
        elif block.language == "yaml":
            parse_yaml(block.code, tmp_path)
        else:
            for words in commands_of(block):
                if block.not_run is None:
                    run_command([*words, *shlex.split(block.shorter)] if words[0] == "prox24" else words, monkeypatch)
                else:
                    parse_command(words)


def test_comments_are_read(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "a\n\n<!-- setup\nx = 1\n-->\n<!-- not run: it takes long -->\n```shell\nprox24 study\n```\n\n"
        "```python\ny\n```\n"
    )
    first, second = blocks_of(page)
    assert (first.language, first.code, first.setup, first.not_run) == (
        "shell",
        "prox24 study\n",
        "x = 1",
        "it takes long",
    )
    assert (second.setup, second.not_run, second.line) == ("", None, 12)


def test_a_wrong_option_of_a_command_that_is_not_run_is_found(capsys):
    with pytest.raises(SystemExit) as exit:
        parse_command(["prox24", "bench", "packed", "--no_such_option", "1"])
    assert exit.value.code == 2
