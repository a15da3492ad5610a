"""Projections of one input that decode as one product: which, with which values, and what stays as it was."""

from __future__ import annotations

import copy
import logging
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import nn
from torch._dynamo.testing import CompileCounter

from prox24_lightning.convert.autotune.tune import stored_table
from prox24_lightning.convert.convert import convert_linear
from prox24_lightning.convert.kernels.buffers import pack_buffer
from prox24_lightning.convert.layers.dense_fp8_linear import DenseFp8Linear
from prox24_lightning.convert.layers.semi_structured_linear import SemiStructuredLinear
from prox24_lightning.integrations.transformers.decoding import join_layers
from prox24_lightning.integrations.transformers.decoding.captured_decoder import SmallOperations
from prox24_lightning.integrations.transformers.decoding.siblings import SiblingProjections
from prox24_lightning.integrations.transformers.generation import accelerate_generation
from prox24_lightning.mask import mask_24
from prox24_lightning.weights.rounding import round_rows

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}
FORMS = ["dense", "packed", "fp8_e4m3", "int8", "dense fp8"]


def tiny(form="dense", *, bias=False):
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, attention_bias=bias)).eval().requires_grad_(False)
    for module in list(model.model.layers.modules()):
        for name, layer in module.named_children():
            if isinstance(layer, nn.Linear):
                layer.weight.normal_(0, 0.1)
                if bias and layer.bias is not None:
                    layer.bias.normal_(0, 0.1)
                if form != "dense":
                    setattr(module, name, converted(layer.to(torch.bfloat16), form))
    return model if form == "dense" else model.to(torch.bfloat16)


def converted(layer, form):
    shape = layer.out_features, layer.in_features
    if form == "dense fp8":
        return DenseFp8Linear(round_rows(layer.weight, "fp8_e4m3"), torch.bfloat16, layer.bias, "1=dense_fp8:1")
    weights = None if form == "packed" else form
    packed = pack_buffer(layer.weight * mask_24(layer.weight), weights)
    return SemiStructuredLinear(packed, shape, torch.bfloat16, layer.bias, "1=cusparselt", form=weights)


@pytest.fixture(autouse=True)
def _expanded_on_a_cpu(monkeypatch, request):
    if "gpu" in request.keywords:
        return
    monkeypatch.setattr(SemiStructuredLinear, "forward", in_float32)


def in_float32(self, x):
    """A CPU's product of 16 bits rounds by the number of rows, so that a joined one would choose other tokens."""
    bias = None if self.bias is None else self.bias.float()
    return F.linear(x.float(), self.weight.float(), bias).to(x.dtype)


def tokens(model, batch=1):
    torch.manual_seed(1)
    ids = torch.randint(3, 64, (batch, 6)).to(model.device)
    mask = torch.ones_like(ids)
    if batch > 1:
        mask[0, :3] = mask[2, :1] = 0
    return model.generate(
        ids, attention_mask=mask, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0
    )


def joined(handle):
    """The names of the joined layers in the first block, without what they share."""
    return [tuple(name.rpartition(".")[2] for name in names) for names in handle._siblings.names if ".0." in names[0]]


ALL = [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")]


def one_by_one(model, batch=1):
    """The tokens of the accelerated loop without joined projections: in bfloat16 other attention rounds otherwise."""
    handle = accelerate_generation(model, fuse=False)
    try:
        return tokens(model, batch)
    finally:
        handle.remove()


@pytest.mark.parametrize(("form", "batch"), [("dense", 1), *((form, 4) for form in FORMS)])
def test_the_same_tokens_and_the_same_state(form, batch):
    model = tiny(form, bias=batch > 1)
    expected, before = one_by_one(model, batch), copy.deepcopy(model.state_dict())
    handle = accelerate_generation(model)
    for _ in range(2):
        assert torch.equal(tokens(model, batch), expected)
    assert joined(handle) == ALL
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert len(handle._decoders) == 1, "joining moves weights before the graph reads them, not after"


@pytest.mark.parametrize("form", FORMS)
def test_the_joined_weight_is_made_of_the_others_rows(form):
    model = tiny(form, bias=True)
    siblings = SiblingProjections(enabled=True)
    with torch.no_grad():
        siblings.refresh(model)
    for group in siblings._groups:
        assert torch.equal(group.whole.weight, torch.cat([member.weight for member in group.members]))
        if group.members[0].bias is not None:
            assert torch.equal(group.whole.bias, torch.cat([member.bias for member in group.members]))


def test_one_product_answers_for_all(monkeypatch):
    model = tiny()
    accelerate_generation(model)
    tokens(model)
    widths = []
    linear = F.linear
    monkeypatch.setattr(
        F, "linear", lambda x, weight, bias=None: (widths.append(len(weight)), linear(x, weight, bias))[1]
    )
    tokens(model)
    assert widths == ([128, 64, 192, 64] * 2 + [64]) * 5  # the prompt, and four tokens


def test_dense_weights_take_no_memory_twice_and_come_back():
    model = tiny()
    handle = accelerate_generation(model)
    tokens(model)
    attention = model.model.layers[0].self_attn
    weights = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
    assert all(one.data_ptr() + one.nbytes == other.data_ptr() for one, other in pairwise(weights))
    again = accelerate_generation(model)
    places = [weight.data_ptr() for weight in weights]
    tokens(model)
    assert [weight.data_ptr() for weight in weights] == places, "what is joined already stays where it is"
    again.remove()
    handle.remove()
    assert all(weight.untyped_storage().nbytes() == weight.nbytes for weight in weights)
    assert type(attention.q_proj) is nn.Linear
    assert not any("sibling" in name or "forward" in vars(attention.q_proj) for name in vars(attention.q_proj))


def test_saved_and_copied_models(tmp_path):
    model = tiny()
    expected, before = tokens(model), copy.deepcopy(model.state_dict())
    handle = accelerate_generation(model)
    tokens(model)
    model.save_pretrained(tmp_path / "saved")
    torch.save(model.state_dict(), tmp_path / "state.pt")
    for state in (
        hf.LlamaForCausalLM.from_pretrained(tmp_path / "saved").state_dict(),
        torch.load(tmp_path / "state.pt"),
    ):
        assert state.keys() == before.keys()
        assert all(torch.equal(state[name], before[name]) for name in before)
    copied = copy.deepcopy(model)
    copied.model.layers[0].mlp.up_proj.weight.zero_()
    assert not torch.equal(tokens(copied), expected)
    assert torch.equal(tokens(model), expected)
    handle.remove()
    weight = model.model.layers[0].mlp.up_proj.weight
    assert weight.untyped_storage().nbytes() == weight.nbytes


@pytest.mark.parametrize("form", ["dense", "packed"])
def test_weights_that_are_written_into_are_seen(form):
    model, other = tiny(form), tiny(form)
    name = "weight" if form == "dense" else "packed"
    for layer in other.model.layers:
        getattr(layer.mlp.up_proj, name).copy_(getattr(layer.mlp.gate_proj, name))
    accelerate_generation(model)
    tokens(model)
    model.load_state_dict(other.state_dict())
    assert torch.equal(tokens(model), one_by_one(other))


def test_a_model_that_is_converted_afterwards():
    model, other = tiny(), tiny("packed")
    handle = accelerate_generation(model)
    tokens(model)
    model.to(torch.bfloat16).model = other.model
    model.lm_head = other.lm_head
    assert torch.equal(tokens(model), one_by_one(other))
    assert joined(handle) == ALL
    assert type(handle._siblings._groups[0].whole) is SemiStructuredLinear


class Adapter(nn.Module):
    """A projection and what is added to it, as adapter libraries wrap layers."""

    def __init__(self, layer):
        super().__init__()
        self.base_layer, self.lora_A = layer, nn.Linear(64, 2, bias=False)
        self.lora_B = nn.Linear(2, layer.out_features, bias=False)

    def forward(self, x):
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


def test_adapters_after_the_first_tokens():
    model = tiny()
    handle = accelerate_generation(model)
    tokens(model)
    for layer in model.model.layers:
        layer.self_attn.k_proj = Adapter(layer.self_attn.k_proj)
    found = tokens(model)
    assert joined(handle) == ALL[1:]
    handle.remove()
    assert torch.equal(found, tokens(model))


def hooked(model):
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda module, args, output: output * 2)


def tied(model):
    model.model.layers[0].mlp.up_proj.weight = model.model.layers[1].mlp.up_proj.weight


def part(model):
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = nn.Parameter(torch.cat([layer.weight, layer.weight])[:96], requires_grad=False)


def patched(model):
    layer = model.model.layers[0].mlp.up_proj
    layer.forward = lambda x: -F.linear(x, layer.weight)


def derived(model):
    layer = model.model.layers[0].mlp.up_proj
    layer.__class__ = type("Scaled", (nn.Linear,), {"forward": lambda self, x: 3 * F.linear(x, self.weight)})


def half(model):
    layer = model.model.layers[0].mlp.up_proj
    layer.bias = nn.Parameter(torch.ones(96), requires_grad=False)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (hooked, "hook"),
        (tied, "shares its weight"),
        (part, "part of a larger tensor"),
        (patched, "forward of its own"),
        (derived, "Linear, Scaled"),
        (half, "several kinds"),
    ],
)
def test_what_is_odd_runs_as_it_is_and_is_named(change, reason, caplog):
    model = tiny()
    change(model)
    expected = tokens(model)
    handle = accelerate_generation(model)
    with caplog.at_level(logging.INFO, logger="prox24_lightning"):
        assert torch.equal(tokens(model), expected)
    assert joined(handle) == ALL[:1]
    assert reason in caplog.text
    assert "gate_proj, model.layers.0.mlp.up_proj run one by one" in caplog.text


def test_fixed_scales_of_inputs_must_agree():
    model = tiny("fp8_e4m3")
    floats = model.model.layers[0].mlp.up_proj.packed[-16:].view(torch.float32)
    floats[0] = 0.5
    handle = accelerate_generation(model)
    tokens(model)
    assert joined(handle) == ALL[:1]


def test_a_model_in_training_mode_is_joined_when_it_is_not():
    model = tiny().train()
    handle = accelerate_generation(model)
    tokens(model)
    assert joined(handle) == []
    model.eval()
    tokens(model)
    assert joined(handle) == ALL


def test_what_cannot_be_joined_runs_one_by_one(monkeypatch, caplog):
    model = tiny("packed")
    expected = one_by_one(model)
    monkeypatch.setattr(join_layers, "to_buffer", lambda packed: {}["no kernel"])
    handle = accelerate_generation(model)
    with caplog.at_level(logging.INFO, logger="prox24_lightning"):
        assert torch.equal(tokens(model), expected)
    assert joined(handle) == []
    assert "could not be joined: 'no kernel'" in caplog.text


def test_hooks_that_come_later_act():
    model = tiny()
    siblings = SiblingProjections(enabled=True)
    mlp, x = model.model.layers[0].mlp, torch.randn(1, 1, 64)
    with torch.no_grad():
        siblings.refresh(model)
        mlp.up_proj.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
        hooked(model)
        expected = mlp(x)
        torch.testing.assert_close(siblings.run(lambda: mlp(x)), expected)
    assert len(siblings.names) == 2 * 2


def test_nothing_is_joined_where_it_is_not_wanted_or_fails(monkeypatch, caplog):
    model = tiny()
    expected = tokens(model)
    handle = accelerate_generation(model, fuse=False)
    assert torch.equal(tokens(model), expected)
    assert joined(handle) == []
    handle = accelerate_generation(model)
    monkeypatch.setattr(torch.Tensor, "narrow", lambda *given: 1 / 0)
    assert torch.equal(tokens(model), expected)
    assert joined(handle) == []
    assert "projections that share an input run one by one: division by zero" in caplog.text


def test_what_fails_anyway_takes_nothing_away(caplog):
    model = tiny()
    siblings = SiblingProjections(enabled=True)
    with torch.no_grad():
        siblings.refresh(model)
        with pytest.raises(ZeroDivisionError):
            siblings.run(lambda: 1 / 0)
    assert len(siblings.names) == 2 * 2
    assert not caplog.records


@pytest.mark.parametrize("dynamic", [False, True])
def test_code_compiled_for_one_block_fits_all(dynamic):
    model = tiny()
    siblings, operations = SiblingProjections(enabled=True), SmallOperations(model, enabled=True)
    x = torch.randn(1, 1, 64)
    expected = [layer.mlp(x) for layer in model.model.layers]
    torch._dynamo.reset()
    counter = CompileCounter()
    operations._made[dynamic] = (
        [torch.compile(part._call_impl, dynamic=dynamic, backend=counter) for part in operations._parts],
        [],
    )
    operations._rotary = []
    with torch.no_grad():
        siblings.refresh(model)
        with operations.compiled(dynamic=dynamic):  # in two passes, as before a capture
            found = siblings.run(lambda: [layer.mlp(x) for _ in range(2) for layer in model.model.layers])
    torch.testing.assert_close(found, expected + expected)
    assert len(siblings.names) == 2 * 2
    assert counter.frame_count == 1


def test_small_operations_of_many_batch_sizes_stay_compiled(caplog):
    operations = SmallOperations(tiny(), enabled=True)
    counter = CompileCounter()
    torch._dynamo.reset()
    norm = operations._parts[0]
    operations._parts, operations._rotary = [norm], []
    operations._made[False] = ([torch.compile(norm._call_impl, dynamic=False, backend=counter)], [])
    with torch._dynamo.config.patch(recompile_limit=1):  # it is eight
        for batch in (2, 3, 4):
            with operations.compiled(dynamic=False), torch.no_grad():
                norm(torch.ones(batch, 1, 64))
    torch._dynamo.reset()
    assert counter.frame_count == 3
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
def test_joined_projections_in_a_graph(form, caplog):
    torch.manual_seed(0)
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8}
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES | sizes)).to("cuda", torch.bfloat16).eval().requires_grad_(False)
    for module in list(model.model.layers.modules()):
        for name, layer in module.named_children():
            if isinstance(layer, nn.Linear):
                layer.weight.normal_(0, 0.05)
                setattr(module, name, on_a_gpu(layer, form))
    handle = accelerate_generation(model)
    found = [tokens(model, 4) for _ in range(2)]  # captured, then replayed
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert torch.equal(*found)
    assert joined(handle) == ALL
    assert all(decoder._graph is not None for decoder in handle._decoders.values())
    for group in handle._siblings._groups:
        x = torch.randn(4, 1, 512, device="cuda", dtype=torch.bfloat16)
        expected = torch.cat([member(x) for member in group.members], -1)
        torch.testing.assert_close(group.whole(x), expected, rtol=0.02, atol=0.02 * float(expected.float().std()))


def on_a_gpu(layer, form):
    shape, weights = (layer.out_features, layer.in_features), None if form in ("dense", "packed") else form
    if form == "dense":
        return layer
    rounded = "fp8_e4m3" if form == "dense fp8" else weights
    table = stored_table(shape, torch.bfloat16, device=torch.cuda.current_device(), form=rounded)
    if form == "dense fp8":
        return DenseFp8Linear(
            round_rows(layer.weight, rounded), torch.bfloat16, layer.bias, table.dense_fp8_text
        ).eval()
    layer.weight.mul_(mask_24(layer.weight))
    return convert_linear(layer, kernels=table, weights=weights)
