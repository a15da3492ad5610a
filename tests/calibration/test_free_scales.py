import copy
from dataclasses import replace

import pytest
import torch
from tiny_reordered import gpt2, llama
from torch import nn

from prox24_lightning.calibration.free_orders.scales import proved_scales


@torch.no_grad()
def found_in(region, run, wanted=None, **options):
    """What divides the inputs, by the names of the layers that read them; and the reasons of the other layers."""
    names = {module: name for name, module in region.named_modules()}
    layers = [m for m in region.modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"]
    before = copy.deepcopy(region.state_dict())
    scales, reasons = proved_scales(region, run, layers if wanted is None else wanted, **options)
    assert all(torch.equal(value, before[name]) for name, value in region.state_dict().items())
    by_layer = {" ".join(names[c].split(".")[-1] for c in s.consumers): s for s in scales}
    divided = {key: [f"{names[part.module]}.{part.name}" for part in s.divided] for key, s in by_layer.items()}
    return by_layer, divided, {names[layer]: reason for layer, reason in reasons.items()}


def block_of(model, block):
    call = {}

    def note(_, args, kwargs):
        call.update(args=args, kwargs=kwargs)

    handle = block.register_forward_pre_hook(note, with_kwargs=True)
    model()
    handle.remove()
    return lambda: block(*call["args"], **call["kwargs"])


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scales_of_a_llama_block_change_no_bit(dtype):
    model, run = llama()
    model.to(dtype)
    block = model.model.layers[0]
    run_block = block_of(run, block)
    scales, divided, reasons = found_in(block, run_block)
    assert divided == {
        "q_proj k_proj v_proj": ["input_layernorm.weight"],
        "o_proj": ["self_attn.v_proj.weight"],
        "gate_proj up_proj": ["post_attention_layernorm.weight"],
        "down_proj": ["mlp.up_proj.weight"],  # the gate's outputs go through an activation
    }
    assert not reasons
    assert scales["o_proj"].columns[:3].tolist() == [[0, 8], [1, 9], [2, 10]]  # heads that share values share factors
    before = run_block()
    for scale in scales.values():
        scale.scale(2.0 ** torch.randint(-4, 5, (scale.units,)))
    assert torch.equal(run_block(), before)


def test_values_in_a_fused_projection_and_norms_with_bias():
    model, run = gpt2()
    block = model.transformer.h[0]
    _, divided, reasons = found_in(block, block_of(run, block))
    assert divided == {
        "c_attn": ["ln_1.weight", "ln_1.bias"],
        "c_proj": ["attn.c_attn.weight", "attn.c_attn.bias"],
        "c_fc": ["ln_2.weight", "ln_2.bias"],
    }
    assert set(reasons) == {"mlp.c_proj"}
    assert "another scale of these inputs changes" in reasons["mlp.c_proj"]


class Experts(nn.Module):
    """A norm that two layers read, of which the second is called for large inputs only."""

    def __init__(self):
        super().__init__()
        self.norm, self.always, self.seldom = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        x = self.norm(x)
        return self.seldom(x) if x.amax() > 100 else self.always(x)


class Shifted(nn.Module):
    """A norm whose weight is added to one."""

    def __init__(self):
        super().__init__()
        self.norm, self.layer = OnePlus(), nn.Linear(8, 8)

    def forward(self, x):
        return self.layer(self.norm(x))


class OnePlus(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(8))

    def forward(self, x):
        return x * (1 + self.weight)


class SecondReader(nn.Module):
    """Something reads the norm's output that is no layer."""

    def __init__(self):
        super().__init__()
        self.norm, self.layer = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x):
        x = self.norm(x)
        return self.layer(x) + x


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Experts, "layers beside it are not called on every batch"),
        (Shifted, "another scale of these inputs changes"),
        (SecondReader, "another scale of these inputs changes"),
    ],
)
def test_what_is_not_free_stays(kind, words):
    torch.manual_seed(0)
    module, x = kind(), torch.randn(5, 8)
    scales, _, reasons = found_in(module, lambda: module(x))
    assert not scales
    assert all(words in reason for reason in reasons.values())
    assert reasons


@torch.no_grad()
def test_scales_of_a_block_are_guessed_in_the_next_and_proved_there():
    model, run = llama()
    first, second = model.model.layers
    scales, divided, _ = found_in(first, block_of(run, first))
    guesses = [scale.in_region(first, second) for scale in scales.values()]
    calls = []
    run_second = block_of(run, second)
    _, again, _ = found_in(second, lambda: calls.append(1) or run_second(), guesses=guesses)
    assert again == divided
    assert len(calls) == 4  # two for whether runs are equal, two for the proof
    at = [set(scale.consumers) == {second.mlp.down_proj} for scale in guesses].index(True)
    gate = replace(guesses[at].divided[0], module=second.mlp.gate_proj)
    guesses[at] = replace(guesses[at], divided=(gate,))
    _, again, _ = found_in(second, run_second, guesses=guesses)
    assert again == divided
    with pytest.raises(LookupError):
        guesses[0].in_region(second, nn.Sequential(nn.Linear(4, 4)))


def test_a_tensor_that_may_not_change():
    torch.manual_seed(0)
    module, x = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)), torch.randn(5, 8)
    weight = module[0].weight
    _, _, reasons = found_in(module, lambda: module(x), fixed=lambda tensor: "tied" if tensor is weight else None)
    assert reasons == {"1": "tied"}
