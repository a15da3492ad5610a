"""Zero-shot multiple choice: the likelihood of each answer after a context, as sums and normalised by length.

    python -m benchmarks.zero_shot --models '{dense: {name: MODEL}, pruned: {name: runs/pruned}}'

The questions are our own: a document, its next sentence and three sentences of other documents, of about the same
length. ``--hub`` adds the usual sets (piqa, arc_easy, hellaswag) for those who are online. Scores of one run compare
with each other: with other texts, prompts and harnesses they do not.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import auto_cli
from rich.progress import track
from torch import Tensor

from benchmarks.result_files import write_result
from prox24_lightning.io.pretrained import Pretrained
from prox24_lightning.io.texts import TextSource
from recipes.calibration_text import LibraryDocs

HubSet = Literal["piqa", "arc_easy", "hellaswag"]

_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
_BRACKETS = re.compile(r"\s*\[.*?\]")
_CHOICES = 4


@dataclass(frozen=True)
class Question:
    """A context, and answers that may follow it; ``answer`` is the number of the right one."""

    context: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class Accuracy:
    """Share of questions whose right answer has the largest log-likelihood: the sum, or the sum a character."""

    sums: float
    normalised: float
    questions: int

    @property
    def error(self) -> float:
        """Standard error of :attr:`normalised`."""
        return (self.normalised * (1 - self.normalised) / self.questions) ** 0.5


def next_sentences(texts: Sequence[str], count: int, *, seed: int = 0) -> list[Question]:
    """Return questions that ask for the sentence that follows three others, from passages that do not overlap.

    The wrong answers follow three sentences elsewhere themselves; of a random sample those of the most similar
    length are taken.

    Raises:
        ValueError: if the texts hold too few passages.
    """
    draw = random.Random(seed)
    passages = []
    for text in texts:
        sentences = [" ".join(part.split()) for part in _SENTENCE.split(text)]
        for start in range(0, len(sentences) - 3, 4):
            if 20 <= len(sentences[start + 3]) <= 300:
                passages.append((" ".join(sentences[start : start + 3]), sentences[start + 3]))
    if len(passages) < max(count, 8 * _CHOICES):
        raise ValueError(f"the texts hold {len(passages)} passages of four sentences; {count} questions are asked for")
    draw.shuffle(passages)
    questions = []
    for context, right in passages[:count]:
        others = [follows for other, follows in draw.sample(passages, 8 * _CHOICES) if follows != right]
        wrong = sorted(others, key=lambda other: abs(len(other) - len(right)))[: _CHOICES - 1]
        choices = [right, *wrong]
        draw.shuffle(choices)
        questions.append(Question(context, tuple(f" {choice}" for choice in choices), choices.index(right)))
    return questions


def hub_questions(name: HubSet, count: int) -> list[Question]:
    """Return the first questions of a usual set, read with ``datasets``; needs a connection or its cache."""
    from datasets import load_dataset

    sets = {
        "piqa": ("ybisk/piqa", None, "validation"),
        "arc_easy": ("allenai/ai2_arc", "ARC-Easy", "test"),
        "hellaswag": ("Rowan/hellaswag", None, "validation"),
    }
    place, part, split = sets[name]
    rows = load_dataset(place, part, split=f"{split}[:{count}]")
    return [_question(name, row) for row in rows]


def _question(name: HubSet, row: dict[str, Any]) -> Question:
    if name == "piqa":
        choices = (f" {row['sol1']}", f" {row['sol2']}")
        return Question(f"Question: {row['goal']}\nAnswer:", choices, int(row["label"]))
    if name == "arc_easy":
        choices = tuple(f" {text}" for text in row["choices"]["text"])
        return Question(
            f"Question: {row['question']}\nAnswer:", choices, row["choices"]["label"].index(row["answerKey"])
        )
    context, *endings = (
        _BRACKETS.sub("", text) for text in (f"{row['activity_label']}: {row['ctx']}", *row["endings"])
    )
    return Question(context, tuple(f" {ending}" for ending in endings), int(row["label"]))


@torch.no_grad()
def log_likelihoods(model: Any, tokenizer: Any, question: Question) -> Tensor:
    """Return the log-likelihood of each answer after the context, (choices,), in nats."""
    device = next(model.parameters()).device
    context = tokenizer(question.context, add_special_tokens=False)["input_ids"]
    whole = [tokenizer(question.context + choice, add_special_tokens=False)["input_ids"] for choice in question.choices]
    longest = max(map(len, whole))
    ids = torch.zeros(len(whole), longest, dtype=torch.long)
    wanted = torch.zeros(len(whole), longest, dtype=torch.bool)
    for row, tokens in enumerate(whole):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        # Where the answer changes how the context is cut into tokens, what differs counts as the answer.
        same = next((i for i, (a, b) in enumerate(zip(context, tokens, strict=False)) if a != b), len(context))
        wanted[row, max(1, min(same, len(tokens) - 1)) : len(tokens)] = True
    ids, wanted = ids.to(device), wanted.to(device)
    logits = model(input_ids=ids, attention_mask=_mask(whole, longest).to(device)).logits[:, :-1].float()
    found = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    return (found * wanted[:, 1:]).sum(1)


def _mask(whole: Sequence[Sequence[int]], longest: int) -> Tensor:
    return (torch.arange(longest)[None] < torch.tensor([len(tokens) for tokens in whole])[:, None]).long()


def accuracy(model: Any, tokenizer: Any, questions: Sequence[Question], *, progress: bool = True) -> Accuracy:
    """Return how often the model prefers the right answer."""
    sums = normalised = 0
    for question in track(questions, "multiple choice", disable=not progress):
        found = log_likelihoods(model, tokenizer, question).cpu()
        lengths = torch.tensor([len(choice.strip()) for choice in question.choices])
        sums += int(found.argmax()) == question.answer
        normalised += int((found / lengths).argmax()) == question.answer
    return Accuracy(sums / len(questions), normalised / len(questions), len(questions))


def _rows(
    models: dict[str, Pretrained], sets: dict[str, list[Question]], device: torch.device
) -> Iterator[dict[str, Any]]:
    for label, model in models.items():
        network, (tokenizer, *_) = model.load()
        network.to(device)
        for name, questions in sets.items():
            found = accuracy(network, tokenizer, questions)
            yield {
                "model": label,
                "set": name,
                "questions": found.questions,
                "accuracy": found.sums,
                "accuracy, normalised": found.normalised,
                "± (standard error)": found.error,
                "chance": sum(1 / len(question.choices) for question in questions) / len(questions),
            }


def main(
    models: dict[str, Pretrained],
    output: Path = Path("benchmarks/results"),
    data: TextSource = LibraryDocs(),  # noqa: B008
    hub: list[HubSet] | None = None,
    questions: int = 500,
    seed: int = 0,
    device: str | None = None,
    name: str = "zero_shot",
) -> None:
    """Score every model on every set, and write the table.

    Args:
        models: label -> model; pruned folders are models like any other.
        output: folder for the Markdown and JSON result.
        data: whose held-out documents the questions are made of; not what a model was calibrated or trained on.
        hub: usual sets to add; each is downloaded, or read from the cache of the hub.
        questions: of each set.
        seed: of the choice and order of passages and answers.
        device: null is cuda if there is one, else cpu.
        name: of the result file.
    """
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    sets = {"next sentence": next_sentences(list(data.texts("evaluation")), questions, seed=seed)}
    sets |= {one: hub_questions(one, questions) for one in hub or ()}
    described = "; ".join(f"{label}: {model.describe()}" for label, model in models.items())
    note = f"{described}. Next sentence: held-out documents of {data.describe()}, seed {seed}."
    rows: list[dict[str, Any]] = []
    for row in _rows(models, sets, place):
        rows.append(row)
        write_result(output, name, "Zero-shot multiple choice", rows, note=note)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
