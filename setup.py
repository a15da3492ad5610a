"""Build step beside pyproject.toml: a wheel carries recipes/ and configs/ as package data, for `prox24 recipes`."""

from __future__ import annotations

from pathlib import Path
from shutil import copytree, ignore_patterns, rmtree

from setuptools import setup
from setuptools.command.build_py import build_py

FOLDERS = ("recipes", "configs")


class BuildWithRecipes(build_py):
    """Copy the folders into the built package. An editable install reads them where they are."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib) / "prox24_lightning" / "cli" / "_recipes"
        rmtree(target, ignore_errors=True)  # of an earlier build
        for folder in FOLDERS:
            copytree(folder, target / folder, ignore=ignore_patterns("__pycache__"))


setup(cmdclass={"build_py": BuildWithRecipes})
