"""The second model of the recovery benchmark is trained, saved as a folder and read like any pretrained model."""

from __future__ import annotations

import json

import torch

from benchmarks.recovery.second_model import Epochs, main
from prox24_lightning.io.pretrained import Pretrained
from tests.helpers.tiny_language import Chains, save_tiny_llama


def test_the_second_model_learns_and_is_read_from_its_folder(tmp_path):
    size = {"width": 16, "depth": 1, "heads": 2, "vocabulary": 300, "length": 16, "batch_size": 4}
    folder = tmp_path / "model"
    text = Chains()
    main(folder, tmp_path, text, steps=60, lr=1e-2, warmup_steps=5, eval_sequences=4, evaluation={"text": text}, **size)

    rows = json.loads(next(tmp_path.glob("recovery/*.json")).read_text())["rows"]
    assert rows[-1]["step"] == 56
    assert rows[-1]["val_loss_text"] < rows[0]["val_loss_text"] - 0.5
    network, (tokenizer, *_) = Pretrained(str(folder)).load()
    ids = torch.tensor(tokenizer("w1 w2")["input_ids"])
    assert tokenizer.decode(ids) == "w1 w2"
    assert network(ids[None]).logits.shape == (1, len(ids), 300)


def test_the_second_model_may_take_the_tokenizer_of_another_one(tmp_path):
    other = Pretrained(save_tiny_llama(tmp_path / "other"))
    size = {"width": 16, "depth": 1, "heads": 2, "length": 16, "batch_size": 4, "steps": 8, "eval_sequences": 4}
    main(tmp_path / "model", tmp_path, Chains(), tokenizer=other, evaluation={"text": Chains()}, **size)
    network, (tokenizer, *_) = Pretrained(str(tmp_path / "model")).load()
    assert tokenizer.get_vocab() == other.tokenizer().get_vocab()
    assert network.config.vocab_size == len(tokenizer)


def test_text_that_is_short_is_read_again_in_another_order(tmp_path):
    data = Epochs(Pretrained(str(tmp_path)), Chains(), {})
    data._streams["training"] = torch.arange(40).numpy()
    data.length, data.sequences = 4, 25
    sequences = data.training_sequences()
    orders = torch.from_numpy(sequences.order).split(10)
    assert len(orders) == 3
    assert not torch.equal(orders[0], orders[1])
    assert all(torch.equal(order.sort().values, torch.arange(10)) for order in orders)
