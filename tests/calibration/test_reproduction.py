"""How far a second call of a module may lie from the first: its rounding decides, not the dtype of its output."""

from __future__ import annotations

from dataclasses import replace
from itertools import count

import pytest
import torch
from torch import nn

from prox24_lightning.calibration.calls.module_call import ModuleCall
from prox24_lightning.calibration.isolation.reproduction import NotReproducedError, check_same, rounding_tolerance
from prox24_lightning.sparsify import PhasePlan, Progressive, SparsityEngine
from prox24_lightning.weights.selection import select_weights


class RoundsOtherwise(nn.Module):
    """Blocks in bfloat16 and an output in float32, as a language model under autocast; each call rounds its own way."""

    calls = count()  # of the class: the state of a module is restored for a rerun

    def __init__(self, spread: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))
        self.norm = nn.LayerNorm(16)
        self.spread = spread

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).tanh()
        away = torch.linspace(-1, 1, x.numel()).reshape(x.shape)
        return self.norm(x.float()) * (1 + (next(self.calls) % 2) * self.spread * away.sign())


def call(autocast: torch.dtype | None) -> ModuleCall:
    return replace(ModuleCall((torch.zeros(1, 16),), {}), autocast=autocast)


@pytest.mark.parametrize(
    ("autocast", "weights", "expected"),
    [
        (None, torch.float32, 2e-3),
        (None, torch.float64, 2e-3),
        (torch.bfloat16, torch.float32, 0.05),
        (torch.float16, torch.float32, 0.02),
        (None, torch.bfloat16, 0.05),
    ],
)
def test_the_coarsest_dtype_of_a_call_decides(autocast, weights, expected):
    assert rounding_tolerance(nn.Linear(4, 4).to(weights), call(autocast)) == expected


def test_outputs_are_compared_within_the_tolerance_of_the_call_or_of_their_dtype():
    one = torch.ones(100)
    check_same(one, 1.01 * one, 0.05)
    check_same(one.bfloat16(), (1.01 * one).bfloat16(), 2e-3)
    with pytest.raises(NotReproducedError, match=r"relative difference 0\.01"):
        check_same(one, 1.01 * one, 2e-3)
    with pytest.raises(NotReproducedError, match=r"relative difference 0\.1"):
        check_same(one, 1.1 * one, 0.05)


@pytest.mark.parametrize(
    ("dtype", "spread", "reruns"), [(torch.bfloat16, 0.012, True), (None, 0.012, False), (torch.bfloat16, 0.2, False)]
)
def test_mixed_precision_training_is_run_again(dtype, spread, reruns, caplog):
    torch.manual_seed(0)
    model = RoundsOtherwise(spread)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    strategy = Progressive(model, batches=4, prox_steps=5, reconstruction_steps=8)
    engine = SparsityEngine(select_weights(model), PhasePlan(6, 18), strategy)
    engine.bind([optimizer])
    for _ in range(20):
        engine.before_batch()
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            loss = model(torch.randn(8, 16)).square().mean()
        loss.backward()
        optimizer.step()
        engine.after_batch()
    engine.unbind()
    assert engine.phase == "frozen"
    assert strategy.state_dict()["way"] == ("rerun" if reruns else "stream")
    assert ("not run again" in caplog.text) is not reruns


@pytest.mark.gpu
def test_compiled_blocks_in_bfloat16_are_run_again_on_a_gpu(caplog):
    import transformers as hf

    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=12,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    model = hf.LlamaForCausalLM(config).cuda()
    for layer in model.model.layers:
        layer.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    strategy = Progressive(model, batches=4, prox_steps=5, reconstruction_steps=8)
    engine = SparsityEngine(select_weights(model), PhasePlan(6, 40), strategy)
    engine.bind([optimizer])
    for _ in range(42):
        ids = torch.randint(256, (4, 64), device="cuda")
        engine.before_batch()
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        engine.after_batch()
    engine.unbind()
    assert strategy.state_dict()["way"] == "rerun"
    assert "not run again" not in caplog.text
