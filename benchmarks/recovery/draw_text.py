r"""Write the text of a run into files, so that other machines train and score on the very same one.

    python -m benchmarks.recovery.draw_text --output runs/text
    python -m benchmarks.recovery \
        --training '{class_path: prox24_lightning.io.texts.PlainText, \
            init_args: {path: runs/text/training.jsonl, use: calibration}}' \
        --evaluation '{docs: {class_path: prox24_lightning.io.texts.PlainText, \
            init_args: {path: runs/text/docs.jsonl}}}'

What installed libraries hold depends on their versions.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from jsonargparse import auto_cli

from prox24_lightning.io.near_duplicates import check_apart
from prox24_lightning.io.texts import TextSource
from recipes.calibration_text import PythonDocs
from recipes.source_text import PythonSources


def write_documents(path: Path, documents: Iterable[str]) -> None:
    """Write a document a line, in the field "text"."""
    lines = (json.dumps({"text": document}, ensure_ascii=False) + "\n" for document in documents)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(lines)


def main(
    output: Path,
    training: TextSource = PythonSources(standard_library=False),  # noqa: B008
    evaluation: dict[str, TextSource] | None = None,
) -> None:
    """Write ``training.jsonl``, a file for each held-out text, and ``about.txt``: what they hold.

    Args:
        output: folder of these files.
        training: text to train on.
        evaluation: held-out texts by name; null is those of ``benchmarks.recovery``.

    Raises:
        ValueError: if a held-out text shares a window of words with the training text.
    """
    output.mkdir(parents=True, exist_ok=True)
    held_out = evaluation or {"docs": PythonDocs(), "libraries": PythonSources()}
    sources = {"training": list(training.texts("calibration"))}
    sources |= {name: list(source.texts("evaluation")) for name, source in held_out.items()}
    apart = check_apart({name: sources[name] for name in held_out}, sources["training"])
    lines = [f"training: {training.describe()}", *(f"{name}: {source.describe()}" for name, source in held_out.items())]
    for name, documents in sources.items():
        write_documents(output / f"{name}.jsonl", documents)
        print(f"{name}: {len(documents)} documents, {sum(map(len, documents)):,} characters")
    (output / "about.txt").write_text("\n".join([*lines, apart]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
