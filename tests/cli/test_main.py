"""The dispatcher: its help, its errors, and what it imports."""

from __future__ import annotations

import subprocess
import sys
from functools import wraps
from importlib import import_module
from importlib.metadata import version

import pytest
from lightning.pytorch import Trainer

from prox24_lightning.cli import main


@pytest.fixture
def in_empty_folder(tmp_path, monkeypatch):
    """A working directory that is not on the path of modules."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(tmp_path))])
    return tmp_path


@pytest.mark.parametrize("words", [[], ["-h"], ["--help"]])
def test_help_lists_every_command(words, capsys):
    main.main(words)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    for name, command in main.COMMANDS.items():
        assert [line.split() for line in lines if line.startswith(f"  {name} ")] == [[name, *command.summary.split()]]


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from prox24_lightning.cli.main import main; main(['--help']);"
        "print([name for name in ('torch', 'lightning', 'jsonargparse', 'rich') if name in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "[]"


def test_version(capsys):
    main.main(["--version"])
    assert capsys.readouterr().out.strip() == version("prox24_lightning")


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["fitt"], "did you mean 'fit'?"),
        (["quux"], "commands: fit"),
        (["--config", "x.yaml", "fit"], "options come after the command"),
    ],
)
def test_unknown_command_is_refused_with_a_hint(words, hint, capsys):
    with pytest.raises(SystemExit) as stopped:
        main.main(words)
    assert stopped.value.code == 2
    assert hint in capsys.readouterr().err


@pytest.mark.parametrize("name", list(main.COMMANDS))
def test_every_command_points_at_a_function(name):
    module, function = main.COMMANDS[name].target.split(":")
    assert callable(getattr(import_module(module), function))


def test_typed_command_gets_its_options_from_the_signature(in_empty_folder, monkeypatch, capsys):
    (in_empty_folder / "user_command.py").write_text("def double(value: int):\n    print(2 * value)\n")
    monkeypatch.setitem(main.COMMANDS, "double", main.Command("doubles", "user_command:double", typed=True))
    main.main(["double", "--value", "21"])
    assert capsys.readouterr().out.strip() == "42"


def test_fit_finds_a_class_in_the_working_directory(in_empty_folder):
    (in_empty_folder / "user_net.py").write_text(
        "from pathlib import Path\n"
        "from lightning.pytorch.demos.boring_classes import BoringModel\n"
        "class Net(BoringModel):\n"
        "    def on_train_end(self):\n"
        "        Path('steps.txt').write_text(str(self.trainer.global_step))\n"
    )
    options = ["--seed_everything=0", "--trainer.max_steps=2", "--trainer.accelerator=cpu", "--trainer.logger=false"]
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.enable_checkpointing=false"]
    main.main(["fit", "--model", "user_net.Net", *options, *quiet])
    assert (in_empty_folder / "steps.txt").read_text() == "2"


@pytest.mark.parametrize("subcommand", ["fit", "validate", "test"])
def test_a_missing_checkpoint_is_refused_before_the_model_is_made(subcommand, capsys):
    model = "lightning.pytorch.demos.boring_classes.BoringModel"
    with pytest.raises(SystemExit) as stopped:
        main.main([subcommand, f"--model={model}", "--ckpt_path=gone.ckpt"])
    assert stopped.value.code == 2
    assert "there is no gone.ckpt" in capsys.readouterr().err


@pytest.mark.parametrize("named", ["best", "registry:model", "s3://bucket/last.ckpt"])
def test_a_checkpoint_that_is_no_file_is_left_to_lightning(named, monkeypatch):
    asked = []

    @wraps(Trainer.validate)
    def validate(self, *args, **options):
        asked.append(options["ckpt_path"])

    monkeypatch.setattr(Trainer, "validate", validate)
    main.main(["validate", "--model=lightning.pytorch.demos.boring_classes.BoringModel", f"--ckpt_path={named}"])
    assert asked == [named]
