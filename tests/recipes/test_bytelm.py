"""The byte-level language model and its blocks of text."""

from __future__ import annotations

import pytest
import torch

from recipes import bytelm
from recipes.bytelm import ByteGPT, ByteLM, PythonText
from recipes.stdlib_text import Document, held_out_documents


@pytest.fixture
def text(monkeypatch):
    """Forty short documents in place of the standard library."""
    documents = tuple(Document(f"p/m{i}.py", "p", (f"document {i} é " * 5,)) for i in range(40))
    monkeypatch.setattr(bytelm, "stdlib_documents", lambda: documents)
    return documents


def stream(documents) -> bytes:
    return b"".join(document.text.encode() + b"\0" for document in documents)


def test_logits_see_no_later_byte():
    torch.manual_seed(0)
    model = ByteGPT(width=16, depth=2, heads=2, context=12)
    tokens = torch.randint(0, 256, (2, 12))
    changed = tokens.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % 256
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :7], after[:, :7])
    assert not torch.allclose(before[:, 7:], after[:, 7:])


def test_embedding_and_output_layer_are_one_parameter():
    model = ByteGPT(width=16, depth=1, heads=2, context=12)
    assert model.head.weight is model.embedding.weight


def test_fresh_model_predicts_about_uniformly():
    torch.manual_seed(0)
    loss, _ = ByteLM(width=32, depth=2, heads=2, context=32)._loss(torch.randint(0, 256, (4, 33)))
    assert loss.item() == pytest.approx(torch.tensor(256.0).log().item(), rel=0.05)


def test_width_that_does_not_divide_by_heads_is_refused():
    with pytest.raises(ValueError, match="width=10 does not divide by heads=4"):
        ByteGPT(width=10, depth=1, heads=4, context=8)


def test_blocks_hold_the_documents_of_each_part_in_order(text):
    data = PythonText(context=15, validation=0.3)
    data.setup("fit")
    names = held_out_documents(text, 0.3)
    for blocks, held_out in ((data.training, False), (data.held_out, True)):
        expected = stream(document for document in text if (document.name in names) == held_out)
        found = bytes(torch.stack(list(blocks["bytes"])).flatten().tolist())
        assert expected.startswith(found)
        assert len(expected) - len(found) < 16


def test_held_out_blocks_are_divided_into_validation_and_test(text):
    data = PythonText(context=15, validation=0.3, max_validation_blocks=3)
    data.setup("fit")
    whole = PythonText(context=15, validation=0.3)
    whole.setup("fit")
    assert len(data.held_out) == 3
    parts = [torch.stack(list(part["bytes"])) for part in (data.held_out, data.test, whole.held_out)]
    assert torch.equal(torch.cat(parts[:2]), parts[2])
    with pytest.raises(ValueError, match="max_validation_blocks=100000 leaves none of the"):
        PythonText(context=15, validation=0.3, max_validation_blocks=100000).setup("fit")


def test_batches_are_shuffled_only_for_training(text):
    data = PythonText(context=15, batch_size=2, validation=0.3)
    data.setup("fit")
    first = torch.stack(list(data.training["bytes"][:2]))
    torch.manual_seed(1)
    assert not torch.equal(next(iter(data.train_dataloader()))["bytes"], first)
    held_out = torch.stack(list(data.held_out["bytes"][:2]))
    assert torch.equal(next(iter(data.val_dataloader()))["bytes"], held_out)
