"""The inputs of each expert are seen, whatever its module calls them and computes between them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from experts import EXPERTS, INNER, WIDTH, Experts, Mixture
from torch import nn

from prox24_lightning.calibration.expert_inputs import expert_inputs, expert_inputs_of
from prox24_lightning.calibration.statistics.expert_hessians import ExpertHessians
from prox24_lightning.calibration.statistics.input_second_moment import InputSecondMoments
from prox24_lightning.weights.selection import select_weights


def called(module=None, tokens=20):
    torch.manual_seed(1)
    mixture = Mixture()
    x = torch.randn(tokens, WIDTH)
    return module or mixture.experts, (x, *mixture.route(x))


@pytest.mark.parametrize("transposed", [False, True])
def test_each_expert_sees_its_own_tokens(transposed):
    experts, (x, index, shares) = called(Experts(transposed))
    found = expert_inputs(experts, (x, index), {"shares": shares})
    assert list(found) == ["gate_up_proj", "down_proj"], "in the order of use"
    for expert in range(EXPERTS):
        mine = x[(index == expert).any(-1)]
        assert torch.equal(found["gate_up_proj"][expert], mine)
        gate, up = experts.multiply(mine, experts.gate_up_proj[expert]).chunk(2, -1)
        assert torch.allclose(found["down_proj"][expert], F.silu(gate) * up)


def test_an_expert_without_tokens_is_left_out():
    experts, (x, _, shares) = called()
    found = expert_inputs(experts, (x, torch.zeros(len(x), 1, dtype=torch.long), shares), {})
    assert {name: list(rows) for name, rows in found.items()} == {"gate_up_proj": [0], "down_proj": [0]}


class AllAtOnce(nn.Module):
    """As Llama 4: every expert gets a slot for each token, and zeros where the token is another's."""

    def __init__(self):
        super().__init__()
        self.num_experts = EXPERTS
        self.gate_up_proj = nn.Parameter(torch.randn(EXPERTS, WIDTH, 2 * INNER))
        self.down_proj = nn.Parameter(torch.randn(EXPERTS, INNER, WIDTH))

    def forward(self, x):
        gate, up = torch.bmm(x.view(EXPERTS, -1, WIDTH), self.gate_up_proj).chunk(2, dim=-1)
        return torch.bmm(F.silu(gate) * up, self.down_proj)


def test_slots_of_other_experts_tokens_do_not_count():
    x = torch.randn(EXPERTS, 6, WIDTH)
    x[1, 2:] = 0
    found = expert_inputs(AllAtOnce(), (x.flatten(0, 1),), {})
    assert {e: len(rows) for e, rows in found["gate_up_proj"].items()} == {0: 6, 1: 2, 2: 6, 3: 6}
    assert {e: len(rows) for e, rows in found["down_proj"].items()} == {0: 6, 1: 2, 2: 6, 3: 6}


class Rude(Experts):
    """Draws random numbers, counts its calls, writes into its input, and ends in an error."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, hidden, index, shares):
        self.calls += 1
        hidden.add_(torch.rand_like(hidden))
        super().forward(hidden, index, shares)
        raise RuntimeError("the user's own")


def test_nothing_is_left_behind_not_even_by_an_error():
    experts, arguments = called(Rude())
    before, state = [tensor.clone() for tensor in arguments], torch.get_rng_state()
    experts.register_forward_pre_hook(lambda *_: pytest.fail("a hook ran"))
    with pytest.raises(RuntimeError, match="the user's own"):
        expert_inputs(experts, arguments, {})
    assert experts.calls == 0
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(now, then) for now, then in zip(arguments, before, strict=True))


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_what_transformers_computes_with_does_not_matter(implementation):
    config = tf.MixtralConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=32,
        num_local_experts=4,
    )
    torch.manual_seed(0)
    model = tf.MixtralForCausalLM(config)
    model.set_experts_implementation(implementation)
    experts = model.model.layers[0].mlp.experts
    (found,) = expert_inputs_of(experts, lambda: model(torch.arange(32).view(2, 16)))
    assert {name: sum(map(len, rows.values())) for name, rows in found.items()} == {"gate_up_proj": 64, "down_proj": 64}
    assert not experts._forward_pre_hooks


def observed(mixture, *batches, decay=0.5):
    weights = [weight for weight in select_weights(mixture) if weight.is_experts]
    moments = InputSecondMoments(weights, decay=decay)
    moments.attach()
    moments.collecting = True
    for batch in batches:
        mixture.experts(*batch)
        moments.fold()
    return moments


@pytest.mark.parametrize("transposed", [False, True])
def test_the_metric_of_each_expert_is_that_of_its_own_tokens(transposed):
    mixture = Mixture(transposed)
    x = torch.randn(40, WIDTH) * torch.arange(1.0, WIDTH + 1)
    batch = (x, *mixture.route(x))
    moments = observed(mixture, batch)
    found = expert_inputs(mixture.experts, batch, {})
    for name, rows in found.items():
        scale = moments.scale(f"experts.{name}")
        for expert, inputs in rows.items():
            mean = inputs.square().mean(0)
            mine = scale[expert].flatten()
            assert torch.allclose(mine, (mean / mean.mean()).sqrt().clamp_min(1e-3), rtol=1e-4)
        assert scale.shape == (EXPERTS, scale.shape[1], 1) if transposed else (EXPERTS, 1, scale.shape[2])


def test_an_expert_without_tokens_keeps_what_was_known_and_an_unknown_one_counts_weights_alike():
    mixture, shares = Mixture(), torch.ones(10, 1)
    first = torch.randn(10, WIDTH) * torch.arange(1.0, WIDTH + 1)
    zero, one = torch.zeros(10, 1, dtype=torch.long), torch.ones(10, 1, dtype=torch.long)
    moments = observed(mixture, (first, zero, shares))
    before = moments.scale("experts.gate_up_proj").clone()
    assert torch.equal(before[1:], torch.ones(EXPERTS - 1, 1, WIDTH))
    second = torch.randn(10, WIDTH)
    batches = [(first, zero, shares), (second, zero, shares)]
    without = observed(mixture, *batches).scale("experts.gate_up_proj")
    between = observed(mixture, batches[0], (second, one, shares), batches[1]).scale("experts.gate_up_proj")
    assert torch.equal(between[0], without[0])
    assert not torch.equal(between[0], before[0])


def test_experts_that_cannot_run_twice_end_no_training(caplog):
    mixture = Mixture()
    calls = []
    inner = mixture.experts.multiply
    mixture.experts.multiply = lambda x, w: calls.append(1) or (inner(x, w) if len(calls) > 1 else 1 / 0)
    x = torch.randn(10, WIDTH)
    moments = observed(mixture, (x, *mixture.route(x)), (x, *mixture.route(x)))
    assert moments.scale("experts.down_proj") is None
    assert caplog.text.count("cannot be run once more") == 1


def test_hessians_of_experts_are_saved_and_come_back():
    first, second = ExpertHessians(range(3)), ExpertHessians(range(3))
    rows = torch.randn(6, WIDTH)
    first.add({0: rows, 2: rows[:2], 7: rows})
    assert first.tokens == 8
    second.load_state_dict([first.state_dict(), first.state_dict()], torch.device("cpu"))
    assert second.tokens == 16
    assert torch.allclose(second.by_expert[0].hessian, rows.T @ rows / 6)
    assert second.by_expert[1].tokens == 0
