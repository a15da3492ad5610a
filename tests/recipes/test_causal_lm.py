"""Fine-tuning of language models: the loss, the order of the text, what is held out, compiled blocks."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from tiny_language import DOCUMENT, Chains, tiny_tokenizer

from prox24_lightning.io.pretrained import Pretrained
from prox24_lightning.mask import is_24
from prox24_lightning.oneshot import prune_layerwise
from recipes.causal_lm import CausalLM, next_token_loss
from recipes.compiled_blocks import CompiledForward, compile_blocks
from recipes.text_tokens import TextTokens
from recipes.token_corpus import cut, source_tokens, token_stream


@pytest.fixture
def pretrained(llama_folder):
    return Pretrained(llama_folder)


def text_tokens(pretrained, **options):
    defaults = {"length": 10, "batch_size": 4, "eval_sequences": 6, "progress": False}
    held_out = {"a": Chains(20), "b": Chains(30)}
    return TextTokens(pretrained, Chains(40), held_out, **{**defaults, **options})


def trainer(**options):
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    return Trainer(accelerator="cpu", devices=1, num_sanity_val_steps=0, **dict.fromkeys(quiet, False), **options)


def test_loss_is_that_of_the_model_itself(pretrained):
    model, _ = pretrained.load()
    tokens = torch.randint(0, 62, (3, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        output = model(input_ids=tokens, labels=tokens)
    assert next_token_loss(output.logits, tokens).item() == pytest.approx(output.loss.item(), rel=1e-5)


def test_the_model_is_the_only_child_in_training_mode_and_keeps_no_cache(pretrained):
    module = CausalLM(pretrained)
    assert [name for name, _ in module.named_children()] == ["model"]
    assert all(child.training for child in module.modules())
    assert module.model.config.use_cache is False


def test_scores_are_the_mean_losses_of_each_text(pretrained):
    module, data = CausalLM(pretrained), text_tokens(pretrained)
    scores = {}
    for logged in trainer().validate(module, data, verbose=False):
        scores.update(logged)
    rows = torch.stack([data.held_out_sequences("b")[index]["input_ids"] for index in range(6)])
    with torch.no_grad():
        expected = next_token_loss(module(rows), rows).item()
    assert scores["val_loss_b"] == pytest.approx(expected, rel=1e-5)
    assert scores["val_ppl_b"] == pytest.approx(np.exp(expected), rel=1e-5)
    assert scores["val_loss"] == pytest.approx((scores["val_loss_a"] + scores["val_loss_b"]) / 2, rel=1e-5)


def test_documents_are_joined_by_the_end_of_text():
    stream = token_stream(tiny_tokenizer(), ["w0 w1", "w2"], progress=False)
    assert stream.dtype == np.uint16
    assert stream.tolist() == [2, 3, 1, 4, 1]


def test_many_batches_of_documents_give_the_same_stream(monkeypatch):
    whole = token_stream(tiny_tokenizer(), Chains(9).texts("calibration"), progress=False)
    monkeypatch.setattr("recipes.token_corpus.CHARACTERS_A_BATCH", 150)
    assert np.array_equal(whole, token_stream(tiny_tokenizer(), Chains(9).texts("calibration"), progress=False))
    assert len(whole) == 9 * DOCUMENT


def test_text_without_documents_is_refused():
    with pytest.raises(ValueError, match="nothing holds no documents to train on"):
        token_stream(tiny_tokenizer(), [], label="nothing", progress=False)


def test_tokens_are_made_once_and_then_mapped_from_disk(tmp_path):
    first = source_tokens(tiny_tokenizer(), Chains(3), "calibration", cache=tmp_path, progress=False)

    class Silent(Chains):
        def texts(self, split):
            raise AssertionError("the text is on disk")

    again = source_tokens(tiny_tokenizer(), Silent(3), "calibration", cache=tmp_path, progress=False)
    assert isinstance(again, np.memmap)
    assert np.array_equal(first, again)
    with pytest.raises(AssertionError, match="on disk"):
        source_tokens(tiny_tokenizer(), Silent(3), "evaluation", cache=tmp_path, progress=False)


def batches(data):
    return [batch["input_ids"] for batch in data.train_dataloader()]


def test_training_sequences_are_shuffled_over_the_corpus_and_used_once(pretrained):
    data = text_tokens(pretrained)
    seen = torch.cat(batches(data)).tolist()
    stream = data.tokens("training")
    in_order = stream[: len(stream) // 10 * 10].reshape(-1, 10).tolist()
    assert sorted(seen) == sorted(in_order)
    assert seen != in_order
    neighbours = sum(in_order.index(b) - in_order.index(a) == 1 for a, b in itertools.pairwise(seen))
    assert neighbours < len(seen) / 10


def test_the_seed_sets_the_order_of_training_and_nothing_of_evaluation(pretrained):
    first, same, other = (text_tokens(pretrained, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.cat(batches(first)), torch.cat(batches(same)))
    assert not torch.equal(torch.cat(batches(first)), torch.cat(batches(other)))
    scored = [next(iter(data.val_dataloader()["a"]))["input_ids"] for data in (first, other)]
    assert torch.equal(*scored)


def test_a_run_that_would_use_a_sequence_twice_is_refused(pretrained):
    data = text_tokens(pretrained)  # 40 documents of 31 tokens: 124 sequences of 10
    with pytest.raises(ValueError, match="32 steps need 128 sequences of 10 tokens, but .* holds 124"):
        trainer(max_steps=32).fit(CausalLM(pretrained), data)
    with pytest.raises(ValueError, match="20 steps need 160 sequences"):
        trainer(max_steps=20, accumulate_grad_batches=2).fit(CausalLM(pretrained), data)
    with pytest.raises(ValueError, match="set trainer.max_steps, or max_epochs to 1"):
        trainer(max_epochs=2).fit(CausalLM(pretrained), data)


class Seen(Callback):
    """The batches of a fit, one entry a batch."""

    def __init__(self):
        self.batches = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches.append(batch["input_ids"].clone())


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_resumed_run_trains_on_the_sequences_that_are_left(pretrained, tmp_path, num_workers):
    def fit(steps, ckpt_path=None):
        seen, module, data = Seen(), CausalLM(pretrained), text_tokens(pretrained, num_workers=num_workers)
        run = trainer(max_steps=steps, limit_val_batches=0, callbacks=[seen])
        run.fit(module, data, ckpt_path=ckpt_path)
        run.save_checkpoint(tmp_path / "last.ckpt")
        return seen.batches

    unbroken = fit(7)
    assert len(torch.cat(unbroken).unique(dim=0)) > 24
    resumed = [*fit(2), *fit(5, tmp_path / "last.ckpt"), *fit(7, tmp_path / "last.ckpt")]
    assert torch.equal(torch.cat(resumed), torch.cat(unbroken))


def test_an_epoch_behind_a_whole_one_is_whole(pretrained):
    loader = text_tokens(pretrained).train_dataloader()
    assert len(list(loader)) == len(loader)
    again = text_tokens(pretrained).train_dataloader()
    again.load_state_dict(loader.state_dict())
    assert len(list(again)) == len(list(again)) == len(loader)


def test_a_held_out_text_that_is_too_short_is_refused(pretrained):
    with pytest.raises(ValueError, match="a holds 62 sequences of 10 tokens, but those up to 63 are asked for"):
        text_tokens(pretrained, eval_sequences=63).val_dataloader()
    with pytest.raises(ValueError, match="less than one sequence of 10"):
        cut(np.zeros(9), 10, seed=0, label="x")


@pytest.fixture
def no_compiler(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function: function)


def test_a_copy_of_a_compiled_model_runs_its_own_weights(pretrained, no_compiler):
    model = CausalLM(pretrained, compile=True).model.eval()
    tokens = torch.arange(8).view(1, 8)
    with torch.no_grad():
        before = model(input_ids=tokens).logits
        twin = copy.deepcopy(model)
        for parameter in twin.model.layers.parameters():
            parameter.zero_()
        assert torch.equal(model(input_ids=tokens).logits, before)
        assert not torch.equal(twin(input_ids=tokens).logits, before)


def test_layerwise_pruning_leaves_compiled_blocks_as_it_found_them(pretrained, no_compiler):
    model, _ = pretrained.load()
    assert compile_blocks(model) == 2
    prune_layerwise(model, [{"input_ids": torch.arange(24).view(2, 12)}], method="wanda", refine=None, progress=False)
    layers = model.model.layers
    assert all(isinstance(layer.forward, CompiledForward) and layer.forward.module is layer for layer in layers)
    assert is_24(layers[1].mlp.down_proj.weight)


def test_a_hook_inside_of_a_compiled_block_runs_although_it_came_later(pretrained):
    model = CausalLM(pretrained).model.eval()
    calls = []
    compiled = []
    for layer in model.model.layers:
        layer.forward = CompiledForward(layer)
        layer.forward._compiled = lambda *args, **kwargs: compiled.append(args) or args[0]
    handle = model.model.layers[0].mlp.up_proj.register_forward_pre_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        model(input_ids=torch.arange(8).view(1, 8))
        assert (len(calls), len(compiled)) == (1, 1)
        handle.remove()
        model(input_ids=torch.arange(8).view(1, 8))
    assert (len(calls), len(compiled)) == (1, 3)
