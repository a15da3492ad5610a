"""Text that a model writes itself, and its share of each batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_language import Chains
from torch.utils.data import DistributedSampler

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


def test_settings_of_the_models_own_generation_change_nothing(pretrained):
    model = pretrained.model()
    expected = generate_sequences(model, 3, 9, seed=0, progress=False)
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.min_p = 0.9
    own = model.generation_config
    assert (generate_sequences(model, 3, 9, seed=0, progress=False) == expected).all()
    assert model.generation_config is own


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


def test_each_process_has_its_share_in_each_of_its_batches(pretrained, tmp_path):
    np.save(tmp_path / "text.npy", np.full((30, 10), 63, np.uint16))
    data = text_tokens(pretrained, generated=tmp_path / "text.npy")
    data.trainer = type("T", (), {"world_size": 2})
    sequences = data.training_sequences()
    assert len(sequences) == 8 * 15
    for rank in range(2):
        mine = list(DistributedSampler(sequences, 2, rank, shuffle=False))
        written = [(sequences[index]["input_ids"] == 63).all().item() for index in mine]
        assert written == [False, False, False, True] * 15
    text = [sequences[index]["input_ids"] for index in range(8 * 15) if index % 8 < 6]
    assert torch.equal(torch.stack(text), torch.cat(batches(text_tokens(pretrained)))[: 6 * 15])


def test_a_batch_that_a_tuner_made_too_small_is_refused(pretrained, tmp_path):
    np.save(tmp_path / "text.npy", np.zeros((5, 10), np.uint16))
    data = text_tokens(pretrained, generated=tmp_path / "text.npy")
    data.batch_size = 1
    with pytest.raises(ValueError, match="of batch_size=1 leaves 0 generated"):
        data.train_dataloader()


def test_a_file_that_holds_no_tokens_is_refused(pretrained, tmp_path):
    np.save(tmp_path / "floats.npy", np.zeros((5, 10)))
    np.savez(tmp_path / "several.npz", np.zeros((5, 10), np.int32))
    for name in ("floats.npy", "several.npz"):
        with pytest.raises(ValueError, match=f"{name} holds no array of tokens; write it by python -m"):
            batches(text_tokens(pretrained, generated=tmp_path / name))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.9, 1.0])
def test_a_share_that_is_no_sequence_or_all_is_refused(pretrained, tmp_path, share):
    with pytest.raises(ValueError, match=f"generated_share={share} of batch_size=4"):
        text_tokens(pretrained, generated=tmp_path / "text.npy", generated_share=share)
