"""``prox24 recipes FOLDER``: the example modules and their YAML, as files to run and to change."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from shutil import copyfile

from prox24_lightning.cli.exit_codes import errors_as_exit
from prox24_lightning.utils.files import check_folder, filling

FOLDERS = ("recipes", "configs")
NEEDED = ("sklearn", "datasets")


def recipes(folder: Path, overwrite: bool = False) -> None:
    """Copy the recipes and their configs into a folder, ready to run from there.

    Exit code 0: copied. 2: an error, and nothing was written.

    Args:
        folder: where they go; made if it does not exist.
        overwrite: replace files of the same names that are there.
    """
    with errors_as_exit("recipes"):
        source = recipes_folder()
        check_folder(folder)
        files = [path.relative_to(source) for name in FOLDERS for path in (source / name).rglob("*")]
        files = sorted(file for file in files if file.suffix in (".py", ".yaml"))
        present = [str(file) for file in files if (folder / file).exists()]
        if present and not overwrite:
            raise FileExistsError(
                f"{folder} holds {present[0]}{f' and {len(present) - 1} more' if len(present) > 1 else ''} already: "
                "name another folder, or replace them with --overwrite"
            )
        with filling(folder) as temporary:
            for file in files:
                (temporary / file).parent.mkdir(parents=True, exist_ok=True)
                copyfile(source / file, temporary / file)
        print(f"{len(files)} files lie in {folder}. Next:\n\n{next_commands(folder)}")


def recipes_folder() -> Path:
    """Return the folder that holds ``recipes`` and ``configs``: in the installed package, or the repository.

    Raises:
        FileNotFoundError: if neither has them.
    """
    here = Path(__file__).parent
    for folder in (here / "_recipes", here.parents[1]):
        if all((folder / name).is_dir() for name in FOLDERS):
            return folder
    raise FileNotFoundError("this installation lacks the recipes: install the wheel, or clone the repository")


def next_commands(folder: Path) -> str:
    """Return the commands that run the smallest recipe, the missing packages' installation among them."""
    lines = [f"  cd {folder}", "  prox24 fit --config configs/digits.yaml"]
    if any(find_spec(name) is None for name in NEEDED):
        lines.insert(0, "  pip install 'prox24_lightning[recipes]'")
    return "\n".join(lines)
