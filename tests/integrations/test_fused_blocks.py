"""Decoder blocks of 8 bits in fewer launches: which, with which results, and what stays as it was."""

from __future__ import annotations

import logging
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from test_sibling_projections import SIZES, converted, joined, on_a_gpu, tokens
from torch import nn

from prox24_lightning.convert.kernels.round_tokens import kernel as round_tokens_kernel
from prox24_lightning.convert.kernels.round_tokens.kernel import Rounding
from prox24_lightning.convert.kernels.round_tokens.reference import round_tokens
from prox24_lightning.convert.layers.semi_structured_linear import SemiStructuredLinear
from prox24_lightning.integrations.transformers.decoding import fused_blocks, rounded_inputs
from prox24_lightning.integrations.transformers.decoding.fused_blocks import fuse_blocks
from prox24_lightning.integrations.transformers.decoding.siblings import SiblingProjections
from prox24_lightning.integrations.transformers.generation import accelerate_generation
from prox24_lightning.weights.rounding import expand_rows

FORMS = ["fp8_e4m3", "int8", "dense fp8"]
TOKENS = 3


def multiplied(layer, values, scales):
    inputs = expand_rows(values, scales, layer.dtype)[:, : layer.in_features]
    return F.linear(inputs, layer.weight, layer.bias)


@pytest.fixture(autouse=True)
def given_rounded(monkeypatch, request):
    """Products of 8 bits in plain torch; what is given rounded is counted in ``given``."""
    given = []
    if "gpu" in request.keywords:
        return given

    def forward(self, x):
        if self.form is None:
            return F.linear(x, self.weight, self.bias)
        found = round_tokens(x.flatten(0, -2), self.form)
        return multiplied(self, found.values, found.scales).view(*x.shape[:-1], -1)

    def rounded(self, whole, count):
        given.append(self.out_features)
        wants = self.rounding(count)
        size = count * wants.columns
        values = round_tokens_kernel.values_view(whole, self.form, count, wants.columns)
        return multiplied(self, values, whole[size:].view(torch.float32))

    monkeypatch.setattr(SemiStructuredLinear, "forward", forward)
    monkeypatch.setattr(SemiStructuredLinear, "multiply_rounded", rounded)
    fused_blocks._warn.cache_clear()
    return given


def small(form, kind=(hf.LlamaConfig, hf.LlamaForCausalLM), **changes):
    torch.manual_seed(0)
    config, model = kind
    made = model(config(**SIZES | changes)).to(torch.bfloat16).eval().requires_grad_(False)
    for layer in made.model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, child in list(part.named_children()):
                if isinstance(child, nn.Linear):
                    child.weight.normal_(0, 0.1)
                    setattr(part, name, converted(child, form))
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight.normal_(1, 0.3)
    return made


@contextmanager
def found_in(model):
    """The step of a model with joined projections, and its fused blocks."""
    siblings = SiblingProjections(enabled=True)
    ids = torch.tensor([[3], [5], [7]])

    def step():
        return model(ids, use_cache=False).logits[:, -1]

    with torch.no_grad():
        siblings.refresh(model)
        with siblings._answering():
            yield step, fuse_blocks(model, siblings, step, TOKENS)


@pytest.mark.parametrize("form", FORMS)
def test_fewer_roundings_and_the_same_logits(form, given_rounded):
    model = small(form)
    with found_in(model) as (step, blocks):
        assert len(blocks) == 2
        expected = step()
        given_rounded.clear()
        found = blocks.run(step)
        # Query, key and value; gate and up; down.
        assert given_rounded == [128, 192, 64] * 2
        assert torch.equal(step(), expected), "it is as before"
    assert torch.equal(found, expected)


def test_every_sum_but_the_first_is_one_with_its_norm(monkeypatch):
    added = []
    real = fused_blocks.add_norm

    def spy(residual, update, *given):
        added.append(update is not None)
        return real(residual, update, *given)

    model = small("fp8_e4m3")
    with found_in(model) as (step, blocks):
        monkeypatch.setattr(fused_blocks, "add_norm", spy)
        blocks.run(step)
    assert added == [False, True, True, True, True]


def test_nothing_stays_on_the_modules():
    model = small("fp8_e4m3")
    with found_in(model) as (step, blocks):
        model.model.norm._compiled_call_impl = compiled = lambda *given: 1 / 0
        blocks.run(step)
        assert model.model.norm._compiled_call_impl is compiled
        model.model.norm._compiled_call_impl = None
    assert not any("forward" in vars(module) or module._forward_hooks for module in model.modules())


def test_16_bits_stay_as_they_are():
    with found_in(small("packed")) as (_, blocks):
        assert len(blocks) == 0


def test_a_gated_mlp_alone_is_enough():
    model = small("fp8_e4m3")
    for layer in model.model.layers:
        layer.self_attn.k_proj = nn.Linear(64, 32, bias=False).to(torch.bfloat16)
    with found_in(model) as (step, blocks):
        assert len(blocks) == 2
        torch.testing.assert_close(blocks.run(step), step(), rtol=0.02, atol=0.02)


def scaled(model):
    """The names of LLaMA and another sum."""
    layer = model.model.layers[0]

    class Scaled(type(layer)):
        def forward(self, hidden_states, **kwargs):
            return hidden_states + 0.5 * (super().forward(hidden_states, **kwargs) - hidden_states)

    layer.__class__ = Scaled


def hooked(model):
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, output: output * 2)


def other_activation(model):
    model.model.layers[0].mlp.act_fn = nn.GELU()


def other_norm(model):
    model.model.layers[0].input_layernorm = nn.LayerNorm(64, dtype=torch.bfloat16)


@pytest.mark.parametrize("change", [scaled, hooked, other_activation, other_norm])
def test_blocks_of_another_kind_run_as_they_are(change):
    model = small("fp8_e4m3")
    change(model)
    with found_in(model) as (step, blocks):
        expected = step()
        assert len(blocks) == 1
        assert torch.equal(blocks.run(step), expected)


@pytest.mark.parametrize(
    ("kind", "changes", "count"),
    [
        ((hf.Qwen2Config, hf.Qwen2ForCausalLM), {}, 2),
        ((hf.Qwen3Config, hf.Qwen3ForCausalLM), {"head_dim": 16}, 2),
        ((hf.MistralConfig, hf.MistralForCausalLM), {}, 2),
        ((hf.GraniteConfig, hf.GraniteForCausalLM), {"residual_multiplier": 0.3}, 0),
        ((hf.Gemma2Config, hf.Gemma2ForCausalLM), {"head_dim": 16}, 0),
    ],
)
def test_architectures(kind, changes, count):
    model = small("fp8_e4m3", kind, **changes)
    with found_in(model) as (step, blocks):
        expected = step()
        assert len(blocks) == count
        assert torch.equal(blocks.run(step), expected)


def test_a_model_that_changes_what_lies_between_blocks():
    """A sum that is not the one behind the block: the block closes it."""
    model = small("fp8_e4m3")
    second = model.model.layers[1]
    second.register_forward_pre_hook(lambda module, args: (args[0] * 0.5, *args[1:]))
    with found_in(model) as (step, blocks):
        assert len(blocks) == 1
        assert torch.equal(blocks.run(step), step())


def test_a_kernel_that_fails_is_named_once(monkeypatch, caplog):
    model = small("fp8_e4m3")
    monkeypatch.setattr(fused_blocks, "silu_multiply", lambda *given: 1 / 0)
    for _ in range(2):
        with found_in(model) as (_, blocks):
            assert len(blocks) == 0
    assert [record.message for record in caplog.records] == ["decoder blocks run part by part: division by zero"]


def test_a_failure_later_ends_it(monkeypatch, caplog):
    model = small("fp8_e4m3")
    with found_in(model) as (step, blocks), caplog.at_level(logging.WARNING):
        expected = step()
        monkeypatch.setattr(fused_blocks, "silu_multiply", lambda *given: 1 / 0)
        assert torch.equal(blocks.run(step), expected)
        assert len(blocks) == 0
    assert "part by part: division by zero" in caplog.text


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["fp8_e4m3", "int8"])
@pytest.mark.parametrize("scale", [0.0, 0.02])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("features", [512, 1000, 14336])
def test_the_kernels_round_as_the_one_that_rounds_alone(form, scale, dtype, features):
    torch.manual_seed(0)
    columns = -(-features // 128) * 128
    wants = Rounding(form, columns, torch.tensor([scale, 0, 0, 0], device="cuda"))
    alone = round_tokens_kernel.prepare(form, dtype, features, columns, TOKENS, torch.cuda.current_device())
    residual, update = (torch.randn(TOKENS, 1, features, device="cuda").to(dtype) for _ in range(2))
    weight = torch.randn(features, device="cuda").to(dtype)
    normed, total, rounded = rounded_inputs.add_norm(residual, update, weight, 1e-5, wants)
    assert torch.equal(total, residual + update)
    assert torch.equal(rounded, alone(normed, wants.given.data_ptr()))
    on_cpu = rounded_inputs.add_norm(residual.cpu(), update.cpu(), weight.cpu(), 1e-5, None)[0]
    torch.testing.assert_close(normed.cpu(), on_cpu, rtol=2**-6 if dtype == torch.bfloat16 else 2**-9, atol=1e-6)
    both = torch.randn(TOKENS, 2 * features, device="cuda").to(dtype) * 3
    gate, up = both.chunk(2, -1)
    expected = alone((F.silu(gate) * up).contiguous(), wants.given.data_ptr())
    found = rounded_inputs.silu_multiply(both, wants)
    size = TOKENS * columns
    scales = [one[size:].view(torch.float32) for one in (found, expected)]
    torch.testing.assert_close(*scales, rtol=2**-7, atol=0)
    assert (found[:size] != expected[:size]).float().mean() < 0.01


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("batch", [1, 4])
def test_fused_blocks_in_a_graph(form, batch, caplog):
    torch.manual_seed(0)
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8}
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES | sizes)).to("cuda", torch.bfloat16).eval().requires_grad_(False)
    for layer in model.model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, child in list(part.named_children()):
                if isinstance(child, nn.Linear):
                    child.weight.normal_(0, 0.05)
                    setattr(part, name, on_a_gpu(child, form))
    handle = accelerate_generation(model)
    found = [tokens(model, batch) for _ in range(2)]  # captured, then replayed
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert torch.equal(*found)
    assert joined(handle) == [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")]
    (decoder,) = handle._decoders.values()
    assert decoder._graph is not None
    with torch.no_grad(), decoder._fixed_attention():
        assert len(handle._siblings.run(decoder._fused_blocks)) == 2
    # Replayed many times behind other work: a kernel that starts before its inputs are written would show.
    graph, logits = decoder._graph, decoder._logits
    position = decoder._cache.position.clone()
    results = []
    for _ in range(30):
        decoder._cache.position.copy_(position)
        graph.replay()
        results.append(logits.clone())
    assert all(torch.equal(result, results[0]) for result in results[1:])
