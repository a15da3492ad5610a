"""The recipe for transformers.Trainer runs as it stands, smaller, and leaves a 2:4 model that learns."""

from __future__ import annotations

import pytest
from transformers import AutoModelForCausalLM

from prox24_lightning import is_24
from recipes import hugging_face
from recipes.stdlib_text import Document


@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
@pytest.mark.filterwarnings("ignore:.*no accelerator is found.*:UserWarning")
def test_it_runs(tmp_path, monkeypatch):
    documents = [Document(f"{name}.py", name, ("Return the number of words in it. " * 40,)) for name in "abcd"]
    monkeypatch.setattr(hugging_face, "stdlib_documents", lambda: documents)
    monkeypatch.setattr(hugging_face, "stdlib_held_out", lambda fraction: frozenset({"d.py"}))
    losses = hugging_face.main(
        str(tmp_path), dense_steps=12, sparse_steps=12, batch_size=4, length=32, width=32, depth=2
    )
    assert losses["sparse"] < losses["dense"] + 0.5 < 6
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    assert is_24(model.model.layers[1].mlp.down_proj.weight)
    assert (tmp_path / "sparse" / "sparsity.png").exists()
