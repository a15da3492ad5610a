"""LoRA on a 2:4 model: what was trained is what is merged, and the zeros stay."""

from __future__ import annotations

import pytest
import torch
import transformers
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from tiny_runs import quiet_trainer
from torch import nn
from transformers import GPT2Config, GPT2Model

from prox24_lightning import Prox24, Prox24TrainerCallback, is_24
from prox24_lightning.finetune import MaskedLora
from prox24_lightning.finetune.lora import unmasked_adapters
from prox24_lightning.mask import mask_24
from prox24_lightning.sparsify.zeros import ZerosWatch
from prox24_lightning.weights.selection import select_weights

peft = pytest.importorskip("peft")
# peft's own: it turns this setting over by itself, and asks transformers for a name that is going away.
pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


def pruned(model):
    masks = {}
    for weight in select_weights(model).chosen:
        masks[weight.name] = mask_24(weight.parameter, dim=weight.dim)
        weight.parameter.data.mul_(masks[weight.name])
    return masks


def adapted(targets=("0", "2"), **arguments):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    masks = pruned(model)
    config = peft.LoraConfig(r=2, target_modules=list(targets), **arguments)
    return peft.get_peft_model(model, config), masks


def train(model, batch, steps=5):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        out = model(batch)
        (out if torch.is_tensor(out) else out[0]).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("given", [True, False], ids=["masks given", "masks of the zeros"])
def test_adapters_masked_in_inference_mode_can_be_trained(given):
    model, masks = adapted()
    with torch.inference_mode():
        masks = {name: mask.clone() for name, mask in masks.items()}
        lora = MaskedLora(model, masks if given else None)
    train(model, torch.randn(32, 8), steps=1)
    assert is_24(lora.merge()[0].weight)


def test_the_merged_model_is_the_trained_one_and_24():
    model, masks = adapted()
    lora = MaskedLora(model, masks)
    x = torch.randn(32, 8)
    before = model(x).detach()
    train(model, x)
    trained = model(x).detach()
    assert (trained - before).abs().max() > 0.1
    merged = lora.merge()
    torch.testing.assert_close(merged(x), trained, rtol=0, atol=1e-5)
    assert is_24(merged[0].weight)
    assert is_24(merged[2].weight)
    assert not any("lora" in name for name, _ in merged.named_parameters())


def test_the_trap_a_plain_merge_loses_the_zeros():
    model, _ = adapted()
    train(model, torch.randn(32, 8))
    assert not is_24(model.merge_and_unload()[0].weight)


def test_the_zeros_of_the_model_are_masks():
    model, masks = adapted()
    lora = MaskedLora(model)
    assert {name: mask.equal(masks[name]) for name, mask in lora.masks.items()} == {"0.weight": True, "2.weight": True}
    train(model, torch.randn(32, 8))
    assert is_24(lora.merge()[0].weight)


def test_adapters_that_a_plain_merge_would_turn_dense_are_found():
    model, _ = adapted()
    assert unmasked_adapters(model) == ["0.weight", "2.weight"]
    assert "0.weight and 1 more are 2:4 under LoRA adapters" in ZerosWatch(model).problem()
    lora = MaskedLora(model)
    assert unmasked_adapters(model) == []
    assert ZerosWatch(model).problem() is None
    lora.release()
    dense = peft.get_peft_model(nn.Sequential(nn.Linear(8, 16)), peft.LoraConfig(r=2, target_modules=["0"]))
    assert unmasked_adapters(dense) == []


def test_a_transposed_linear_layer():
    model = GPT2Model(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32, n_positions=8)).eval()
    masks = pruned(model)
    lora = MaskedLora(peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["c_attn", "c_fc"])), masks)
    ids = torch.randint(32, (2, 8))
    train(lora.model, ids, 3)
    with torch.no_grad():
        trained = lora.model(ids)[0]
        merged = lora.merge()
        torch.testing.assert_close(merged(ids)[0], trained, rtol=0, atol=1e-4)
    assert is_24(merged.h[0].attn.c_attn.weight, dim=0)


@pytest.mark.parametrize(
    "model, shape",
    [
        (lambda: nn.Sequential(nn.Conv2d(4, 8, 3, stride=2, padding=1), nn.Tanh(), nn.Conv2d(8, 4, 1)), (4, 4, 6, 6)),
        (lambda: nn.Sequential(nn.Conv1d(4, 8, 3), nn.Tanh(), nn.Conv1d(8, 4, 1)), (4, 4, 6)),
    ],
)
def test_convolutions(model, shape):
    torch.manual_seed(0)
    model = model()
    masks = pruned(model)
    lora = MaskedLora(peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["0", "2"])), masks)
    x = torch.randn(shape)
    train(lora.model, x)
    trained = lora.model(x).detach()
    merged = lora.merge()
    torch.testing.assert_close(merged(x), trained, rtol=0, atol=1e-5)
    assert is_24(merged[0].weight, dim=1)
    assert is_24(merged[2].weight, dim=1)


def test_adapters_switched_off_leave_the_base_model():
    model, masks = adapted()
    MaskedLora(model, masks)
    x = torch.randn(4, 8)
    train(model, x)
    with model.disable_adapter():
        base = model(x)
    torch.testing.assert_close(base, adapted()[0].base_model.model(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "arguments, masks, words",
    [
        ({}, {"1.weight": torch.ones(4, 4, dtype=torch.bool)}, r"none of the adapted layers has a mask; .*'1.weight'"),
        ({}, {"0.weight": torch.ones(4, 4, dtype=torch.bool)}, r"0: its mask has shape \(4, 4\), its weight \(16, 8\)"),
        ({"lora_dropout": 0.1}, None, "an adapter with dropout cannot be masked; set lora_dropout=0.0"),
        (
            {"use_dora": True},
            None,
            r"0: an adapter that does more than add a product .*\(DoraLinearVariant\); leave out",
        ),
        ({"init_lora_weights": "pissa"}, None, r"0 has \d+ non-zero weights where its mask prunes: prune it before"),
        ({"targets": ["0"], "modules_to_save": ["2"]}, None, r"2 has an adapter that .* \(modules_to_save trains it"),
    ],
)
def test_what_cannot_be_masked_is_refused(arguments, masks, words):
    model, own = adapted(**arguments)
    with pytest.raises(ValueError, match=words):
        MaskedLora(model, own if masks is None else masks)
    assert not any(layer._forward_hooks for layer in model.modules())


def test_a_model_that_peft_has_not_wrapped_has_no_adapter():
    model = nn.Sequential(nn.Linear(8, 16))
    with pytest.raises(ValueError, match=r"Sequential has no adapter: pass what peft\.get_peft_model"):
        MaskedLora(model, pruned(model))


def test_a_dense_base_has_no_zeros_to_keep():
    model = peft.get_peft_model(nn.Sequential(nn.Linear(8, 16)), peft.LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(ValueError, match="no weight under an adapter is 2:4 along its inputs"):
        MaskedLora(model)


def test_another_kind_of_adapter_is_refused():
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    masks = pruned(model)
    with pytest.raises(ValueError, match=r"0 has an adapter that cannot be masked \(peft.tuners.loha.layer\)"):
        MaskedLora(peft.get_peft_model(model, peft.LoHaConfig(r=2, target_modules=["0"])), masks)


def test_a_model_with_adapters_alone_is_refused_in_both_hosts_with_the_remedy(tmp_path):
    class Module(LightningModule):
        def __init__(self):
            super().__init__()
            self.model = adapted()[0]

        def training_step(self, batch, batch_idx):
            return self.model(batch).square().sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    data = [{"input": torch.randn(8)} for _ in range(4)]
    arguments = transformers.TrainingArguments(str(tmp_path), max_steps=4, report_to=[], use_cpu=True)
    trainer = transformers.Trainer(
        adapted()[0], arguments, train_dataset=data, callbacks=[Prox24TrainerCallback(1, 2, verbose=False)]
    )
    with pytest.raises(ValueError, match=r"LoRA adapter: prune the model before .*finetune.MaskedLora"):
        trainer.train()
    with pytest.raises(MisconfigurationException, match=r"LoRA adapter: prune the model before .*MaskedLora"):
        quiet_trainer(max_steps=4, callbacks=[Prox24(1, 2, verbose=False)]).fit(Module(), [torch.randn(4, 8)])
