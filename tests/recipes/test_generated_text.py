"""Text that a model writes itself, and its share of each batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_language import Chains

from prox24_lightning.io.pretrained import Pretrained
from recipes.generated_text import generate_sequences, main
from recipes.text_tokens import TextTokens


@pytest.fixture
def pretrained(llama_folder):
    return Pretrained(llama_folder)


def text_tokens(pretrained, **options):
    return TextTokens(pretrained, Chains(40), {"a": Chains(20)}, length=10, batch_size=4, progress=False, **options)


def batches(data):
    return [batch["input_ids"] for batch in data.train_dataloader()]


def test_tokens_are_drawn_from_the_model_and_follow_the_seed(pretrained):
    model = pretrained.model()
    state = torch.get_rng_state()
    first, same, other = (
        generate_sequences(model, 5, 12, batch_size=2, seed=seed, progress=False) for seed in (0, 0, 1)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert first.shape == (5, 12)
    assert first.dtype == np.uint16
    assert first.max() < 64
    assert (first == same).all()
    assert (first != other).any()


def test_each_token_follows_from_those_before(pretrained):
    model = pretrained.model()
    with torch.no_grad():
        model.model.norm.weight.mul_(1e4)  # logits so far apart that sampling takes the largest
        written = torch.from_numpy(generate_sequences(model, 8, 9, seed=0, progress=False).astype(np.int64))
        assert torch.equal(model(written).logits.argmax(-1)[:, :-1], written[:, 1:])


def test_end_of_text_stops_no_sequence(pretrained):
    model = pretrained.model()
    model.generation_config.eos_token_id = list(range(64))
    assert generate_sequences(model, 3, 9, seed=0, progress=False).shape == (3, 9)


def test_arguments_that_make_no_text_are_refused(pretrained, tmp_path):
    with pytest.raises(ValueError, match="count=0, length=8, batch_size=2: at least 1 sequence"):
        generate_sequences(pretrained.model(), 0, 8, batch_size=2)
    with pytest.raises(ValueError, match="65"):
        main(pretrained, tmp_path / "text.npy", sequences=2, length=65, device="cpu")


def test_each_batch_ends_with_its_share_and_the_text_keeps_its_order(pretrained, tmp_path):
    main(pretrained, tmp_path / "sub" / "text.npy", sequences=30, length=20, device="cpu")
    written = np.load(tmp_path / "sub" / "text.npy", allow_pickle=False)
    mixed = batches(text_tokens(pretrained, generated=tmp_path / "sub" / "text.npy"))
    alone = torch.cat(batches(text_tokens(pretrained)))
    assert len(mixed) == 41  # 124 sequences of text, three a batch
    assert torch.equal(torch.cat([batch[:3] for batch in mixed]), alone[: 3 * 41])
    generated = torch.cat([batch[3:] for batch in mixed])
    known = {tuple(row) for row in written.reshape(-1, 10).tolist()}
    assert {tuple(row) for row in generated.tolist()} <= known
    assert len({tuple(row) for row in generated.tolist()}) == 41


def test_a_run_for_which_the_generated_text_is_too_short_is_refused(pretrained, tmp_path):
    np.save(tmp_path / "text.npy", np.zeros((5, 10), np.uint16))
    data = text_tokens(pretrained, generated=tmp_path / "text.npy")
    assert len(batches(data)) == 5
    data.trainer = type("T", (), {"max_steps": 6, "max_epochs": 1, "accumulate_grad_batches": 1, "world_size": 1})
    with pytest.raises(ValueError, match=r"share of 0.25 of .*text.npy\) holds 20"):
        data.setup("fit")


@pytest.mark.parametrize("share", [0.0, 0.1, 0.9, 1.0])
def test_a_share_that_is_no_sequence_or_all_is_refused(pretrained, tmp_path, share):
    with pytest.raises(ValueError, match=f"generated_share={share} of batch_size=4"):
        text_tokens(pretrained, generated=tmp_path / "text.npy", generated_share=share)
