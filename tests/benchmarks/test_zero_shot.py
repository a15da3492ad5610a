import itertools
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from benchmarks.zero_shot import Question, _question, accuracy, log_likelihoods, next_sentences


class Letters:
    """One token a character."""

    def __call__(self, text, **_):
        return {"input_ids": [ord(letter) % 64 for letter in text]}


class Bigrams(nn.Module):
    """The next letter depends on the last one alone."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)))

    def forward(self, input_ids, attention_mask):
        assert attention_mask.shape == input_ids.shape
        return SimpleNamespace(logits=self.table[input_ids])


def test_the_log_likelihood_is_that_of_the_answer_alone():
    model, question = Bigrams(), Question("abc", (" de", " f"), 0)
    found = log_likelihoods(model, Letters(), question)
    logs = model.table.log_softmax(-1)
    for row, choice in enumerate(question.choices):
        ids = [ord(letter) % 64 for letter in "c" + choice]
        assert float(found[row]) == pytest.approx(
            sum(float(logs[a, b].detach()) for a, b in itertools.pairwise(ids)), rel=1e-5
        )


def test_length_counts_only_without_normalisation():
    model = Bigrams()
    with torch.no_grad():
        model.table.zero_()  # every letter costs the same: the short answer has the larger sum
        model.table[ord("y") % 64, ord("y") % 64] = 1.0  # and the long one the larger mean
    question = Question("x", (" a", " yyyyyyyy"), 1)
    found = accuracy(model, Letters(), [question], progress=False)
    assert (found.sums, found.normalised, found.questions) == (0.0, 1.0, 1)


def test_questions_are_made_of_documents_and_repeat():
    texts = [f"One {i} is. Two {i} is. Three {i} is. The fourth sentence of text {i} is here." for i in range(50)]
    questions = next_sentences(texts, 10)
    assert questions == next_sentences(texts, 10)
    assert {question.answer for question in questions} != {0}
    for question in questions:
        number = question.context.split()[1]
        assert question.choices[question.answer] == f" The fourth sentence of text {number} is here."
        assert len(set(question.choices)) == 4
    with pytest.raises(ValueError, match="hold 50 passages .* 60 questions"):
        next_sentences(texts, 60)


def test_rows_of_the_usual_sets():
    arc = {"question": "Why?", "choices": {"text": ["so", "no"], "label": ["A", "B"]}, "answerKey": "B"}
    assert _question("arc_easy", arc) == Question("Question: Why?\nAnswer:", (" so", " no"), 1)
    piqa = {"goal": "Cut it", "sol1": "knife", "sol2": "spoon", "label": 0}
    assert _question("piqa", piqa) == Question("Question: Cut it\nAnswer:", (" knife", " spoon"), 0)
    swag = {"activity_label": "Run", "ctx": "He [title] runs", "endings": ["far [step] off", "up"], "label": "1"}
    assert _question("hellaswag", swag) == Question("Run: He runs", (" far off", " up"), 1)
