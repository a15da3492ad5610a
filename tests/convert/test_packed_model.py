"""Which weights of a model are packed, and a packed file back into models of several kinds."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from experts import MixtureModel
from live_bytes import LiveBytes
from torch import nn

from prox24_lightning.convert import SemiStructuredLinear, Target, packed_model
from prox24_lightning.convert.autotune.kernel_table import KernelTable, TableRow
from prox24_lightning.convert.format.reader import PackedFile
from prox24_lightning.convert.format.writer import write_packed
from prox24_lightning.convert.kernels.registry import Kernel
from prox24_lightning.convert.packed_model import EmptyOnMeta, find_packable, load_packed
from prox24_lightning.mask import is_24, mask_24
from prox24_lightning.weights import chunks
from prox24_lightning.weights.eligibility import fit_groups
from prox24_lightning.weights.rounding import round_weight


def prune(model, skip=()):
    """Make every weight that can be 2:4 along its inputs."""
    with torch.no_grad():
        for name, module in model.named_modules():
            for key, parameter in module.named_parameters(recurse=False):
                reason, dim = fit_groups(module, key, parameter, "row") if parameter.dim() > 1 else ("small", 0)
                if reason is None and name not in skip:
                    parameter.mul_(mask_24(parameter, dim=dim))
    return model


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.conv = nn.Conv2d(8, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.attention = nn.MultiheadAttention(8, 2)
        self.shared = nn.Linear(8, 8)
        self.same = self.shared
        self.head = nn.Linear(8, 12)
        self.tied = nn.Linear(8, 12, bias=False)
        self.tied.weight = self.embed.weight


def net():
    torch.manual_seed(0)
    return prune(Net(), skip=("head",))


def test_what_is_packed_and_why_the_rest_is_not():
    found = find_packable(net())
    assert found.dims == {
        "conv.weight": 1,
        "attention.in_proj_weight": 1,
        "attention.out_proj.weight": 1,
        "shared.weight": 1,
    }
    assert found.dense["embed.weight"] == "embedding: looked up, not multiplied"
    assert found.dense["head.weight"].startswith("not 2:4: no group is")


def test_groups_along_the_outputs_are_packed_too():
    layer = nn.Linear(12, 8, bias=False)
    with torch.no_grad():
        layer.weight.mul_(mask_24(layer.weight, dim=0))
    assert find_packable(nn.Sequential(layer)).dims == {"0.weight": 0}


def test_a_damaged_weight_is_refused_unless_it_is_left_out():
    model = net()
    with torch.no_grad():
        model.shared.weight[2, :3] = 1
    with pytest.raises(ValueError, match=r"shared\.weight is not 2:4, though most of it is: 1 of 16 .*at \(2, 0\)"):
        find_packable(model)
    assert "shared.weight" in find_packable(model, skip=["shared"]).dense


@pytest.mark.parametrize(
    "options, words",
    [
        ({"targets": ["head"]}, r"head\.weight of shape \(12, 8\) cannot be packed: not 2:4: no group is"),
        ({"targets": ["embed.weight"]}, "cannot be packed: embedding"),
        ({"targets": ["shared", "nope*"]}, r"'nope\*' matches no weight"),
        ({"skip": ["Linear"]}, "'Linear' matches no weight"),
    ],
)
def test_a_target_that_cannot_be_packed_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        find_packable(net(), **options)


def test_targets_choose():
    found = find_packable(net(), targets=["attention*"])
    assert set(found.dims) == {"attention.in_proj_weight", "attention.out_proj.weight"}
    assert found.dense["shared.weight"] == "not among the targets"


def packed(tmp_path, model):
    return PackedFile(write_packed(tmp_path / "packed.safetensors", model.state_dict(), find_packable(model).dims))


def equal(left, right):
    left, right = left.state_dict(), right.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("build", [Net, lambda: torch.compile(Net(), backend="eager"), lambda: Net().half()])
def test_a_model_comes_back(tmp_path, build):
    model, twin = net(), build()
    load_packed(twin, packed(tmp_path, model))
    assert equal(getattr(twin, "_orig_mod", twin), model)
    inner = getattr(twin, "_orig_mod", twin)
    assert inner.tied.weight is inner.embed.weight
    assert inner.same is inner.shared
    assert inner.shared.weight.requires_grad


@pytest.mark.parametrize("transposed", [False, True])
def test_experts_are_packed_and_come_back(tmp_path, transposed):
    model = prune(MixtureModel(transposed=transposed))
    file = packed(tmp_path, model)
    inputs = 1 if transposed else 2
    assert file.packed["blocks.0.experts.gate_up_proj"].dim == inputs
    assert file.shape("blocks.0.experts.gate_up_proj") == tuple(model.blocks[0].experts.gate_up_proj.shape)
    assert file.stored_bytes < 0.75 * file.dense_bytes
    twin = MixtureModel(transposed=transposed)
    load_packed(twin, file)
    assert equal(twin, model)


def test_experts_that_are_24_along_their_outputs_are_packed_so():
    model = MixtureModel(1)
    with torch.no_grad():
        weight = model.blocks[0].experts.down_proj
        weight.mul_(mask_24(weight, dim=1))
    assert find_packable(model, targets=["*.down_proj"]).dims == {"blocks.0.experts.down_proj": 1}


LANGUAGE_MODELS = [
    hf.LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=64, **ids
    )
    for ids in ({"tie_word_embeddings": True}, {"tie_word_embeddings": False})
] + [
    hf.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=64, n_positions=32, bos_token_id=0, eos_token_id=0),
]


@pytest.mark.parametrize("config", LANGUAGE_MODELS, ids=["tied llama", "llama", "gpt2"])
def test_a_language_model_is_rebuilt_without_its_dense_memory(tmp_path, config):
    torch.manual_seed(0)
    model = prune(hf.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)).eval()
    file = packed(tmp_path, model)
    assert len(file.packed) >= 2 * (4 if config.model_type == "gpt2" else 7)
    with EmptyOnMeta():
        twin = hf.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    assert all(parameter.is_meta for name, parameter in twin.named_parameters() if "proj.weight" in name)
    load_packed(twin, file)
    assert equal(twin, model)
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        assert torch.equal(twin(ids).logits, model(ids).logits)
    for name in file.packed:
        assert is_24(twin.get_parameter(name), dim=file.packed[name].dim)


def test_another_model_is_refused_and_not_touched(tmp_path):
    file = packed(tmp_path, net())
    twin = Net()
    before = twin.head.weight.clone()
    twin.more = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"of another model: it lacks \['more.bias', 'more.weight'\]"):
        load_packed(twin, file)
    del twin.more, twin.norm
    with pytest.raises(ValueError, match=r"the model lacks \['norm.bias'"):
        load_packed(twin, file)
    twin = Net()
    twin.head = nn.Linear(8, 16)
    with pytest.raises(ValueError, match=r"head.weight has shape \(16, 8\), and \(12, 8\) in"):
        load_packed(twin, file)
    twin = Net()
    twin.head.weight = nn.Parameter(before)
    assert torch.equal(twin.head.weight, before)


def test_the_prefix_of_a_lightning_module_is_named_and_the_remedy_works(tmp_path):
    module = nn.ModuleDict({"model": net()})
    file, twin = packed(tmp_path, module), Net()
    with pytest.raises(ValueError, match=r"every name in it begins with 'model\.'.*ModuleDict\(\{'model': model\}\)"):
        load_packed(twin, file)
    load_packed(nn.ModuleDict({"model": twin}), file)
    assert equal(twin, module["model"])


def test_integers_for_a_trainable_parameter_are_refused_before_anything_is_changed(tmp_path):
    file = PackedFile(
        write_packed(
            tmp_path / "p.safetensors",
            {"0.weight": torch.zeros(4, 8, dtype=torch.int8), "1.weight": torch.zeros(4, 4)},
            {"0.weight": 1},
        )
    )
    model = nn.Sequential(nn.Linear(8, 4, bias=False), nn.Linear(4, 4, bias=False))
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(ValueError, match=r"0.weight is trainable in the model and stored as torch.int8"):
        load_packed(model, file)
    assert all(map(torch.equal, model.parameters(), before))
    load_packed(model.requires_grad_(False), file)
    assert model[0].weight.dtype == torch.int8


def test_a_buffer_that_no_file_can_give_is_refused(tmp_path):
    file = packed(tmp_path, net())
    twin = Net()
    twin.register_buffer("scratch", torch.empty(3, device="meta"), persistent=False)
    with pytest.raises(ValueError, match="scratch is a meta tensor and no part of the state dict"):
        load_packed(twin, file)


@pytest.fixture
def pretended_gpu(monkeypatch):
    """The CPU counts as a GPU that runs sparse layers; they are made and put in, and cannot be called."""
    table = KernelTable((0, 0), (TableRow(16384, Kernel("cusparselt")),))
    monkeypatch.setattr(packed_model, "target_of", lambda device: Target("pretended H200", (9, 0), "cusparselt"))
    monkeypatch.setattr(packed_model, "stored_table", lambda *args, **options: table)


def test_packed_weights_become_sparse_layers_without_being_expanded(tmp_path, pretended_gpu, monkeypatch):
    config = hf.LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=64,
        attention_bias=True,
    )
    torch.manual_seed(0)
    model = prune(hf.LlamaForCausalLM(config).bfloat16(), skip=("model.layers.1.mlp.down_proj", "lm_head"))
    file = packed(tmp_path, model)
    with EmptyOnMeta():
        twin = hf.LlamaForCausalLM(config)
    expanded = []
    monkeypatch.setattr(file, "read", lambda name, device: expanded.append(name) or PackedFile.read(file, name, device))
    names = load_packed(twin, file, device="cpu", sparse=True)
    assert sorted(f"{name}.weight" for name in names) == sorted(file.packed)
    assert len(names) == 13
    assert not set(expanded) & set(file.packed)
    layers = dict(twin.named_modules())
    for name in names:
        layer, linear = layers[name], model.get_submodule(name)
        assert isinstance(layer, SemiStructuredLinear)
        assert torch.equal(layer.weight, linear.weight)
        assert (layer.bias is None) == (linear.bias is None)
        assert layer.bias is None or torch.equal(layer.bias, linear.bias)
        assert not layer.training
    assert torch.equal(twin.model.layers[1].mlp.up_proj.weight, model.model.layers[1].mlp.up_proj.weight)
    assert torch.equal(twin.lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize(
    ("capability", "form", "sparse"), [((9, 0), "fp8_e4m3", True), ((8, 6), "int8", True), ((8, 6), "fp8_e4m3", False)]
)
def test_rounded_weights_become_sparse_layers_where_the_gpu_multiplies_them(
    tmp_path, pretended_gpu, monkeypatch, capability, form, sparse
):
    monkeypatch.setattr(packed_model, "target_of", lambda device: Target("pretended", capability, "cusparselt"))
    model = nn.Sequential(prune(nn.Linear(32, 64)), prune(nn.Linear(64, 32))).bfloat16()
    forms = {"0.weight": form, "1.weight": form}
    file = PackedFile(write_packed(tmp_path / "p", model.state_dict(), find_packable(model).dims, forms=forms))
    twin = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 32))
    assert load_packed(twin, file, device="cpu", sparse=True) == (("0", "1") if sparse else ())
    for layer, dense in zip(twin, model, strict=True):
        assert isinstance(layer, SemiStructuredLinear) == sparse
        assert getattr(layer, "form", form) == form
        assert torch.equal(layer.weight, round_weight(dense.weight.detach(), form))


def test_what_cannot_run_sparse_is_expanded(tmp_path, pretended_gpu):
    """Convolutions, weights of attention that it multiplies itself, groups along the outputs, float32."""
    half = net().bfloat16()
    wide = nn.Sequential(nn.Linear(16, 32, bias=False), prune(nn.Linear(32, 16)), half)
    with torch.no_grad():
        wide[0].weight.mul_(mask_24(wide[0].weight, dim=0))
    file = packed(tmp_path, wide)
    assert {"0.weight", "1.weight", "2.conv.weight", "2.shared.weight"} <= set(file.packed)
    twin = nn.Sequential(nn.Linear(16, 32, bias=False), nn.Linear(32, 16), Net())
    assert load_packed(twin, file, device="cpu", sparse=True) == ()
    assert equal(twin, wide)


def test_a_shared_layer_is_sparse_under_both_names(tmp_path, pretended_gpu):
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(16, 16)
            self.second = self.first

    model = prune(Shared().bfloat16())
    twin = Shared()
    assert load_packed(twin, packed(tmp_path, model), device="cpu", sparse=True) == ("first",)
    assert twin.second is twin.first
    assert torch.equal(twin.second.weight, model.first.weight)


class Pair(nn.Module):
    def __init__(self, tied, kind=nn.Linear):
        super().__init__()
        self.first = nn.Linear(64, 64, bias=False)
        self.second = nn.Linear(64, 64, bias=False) if kind is nn.Linear else kind(64, 64)
        if tied:
            self.second.weight = self.first.weight


@pytest.mark.parametrize("kind, names", [(nn.Linear, ("first", "second")), (nn.Embedding, ("first",))])
def test_weights_that_only_the_file_ties_are_both_loaded(tmp_path, pretended_gpu, kind, names):
    model = prune(Pair(tied=True).bfloat16())
    twin = Pair(tied=False, kind=kind)
    assert load_packed(twin, packed(tmp_path, model), device="cpu", sparse=True) == names
    for layer in (twin.first, twin.second):
        assert torch.equal(layer.weight, model.first.weight)


def test_sparse_layers_replace_the_dense_ones_of_a_model_one_by_one(tmp_path, pretended_gpu, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_ENTRIES", 2**16)
    model = prune(nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(8))).bfloat16())
    file, layer = packed(tmp_path, model), 2 * 1024 * 1024
    with LiveBytes() as live:
        live.count(parameter.detach() for parameter in model.parameters())
        assert len(load_packed(model, file, device="cpu", sparse=True)) == 8
    assert 8 * layer < live.peak < 10.5 * layer


def test_sparse_layers_need_a_gpu(tmp_path):
    with pytest.raises(ValueError, match="sparse=True needs a GPU with sparse tensor cores, device=cpu is none"):
        load_packed(net(), packed(tmp_path, net()), sparse=True)


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")
def test_a_packed_model_runs_sparse_on_the_gpu(tmp_path):
    config = hf.LlamaConfig(
        hidden_size=1024, intermediate_size=2816, num_hidden_layers=4, num_attention_heads=8, vocab_size=256
    )
    torch.manual_seed(0)
    model = prune(hf.LlamaForCausalLM(config).bfloat16(), skip=("lm_head",)).eval()
    file = packed(tmp_path, model)
    with EmptyOnMeta():
        twin = hf.LlamaForCausalLM(config).eval()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    names = load_packed(twin, file, device="cuda", sparse=True)
    peak = torch.cuda.max_memory_allocated() - before
    assert len(names) == 28
    assert peak < file.stored_bytes + 4 * 1024 * 2816 * 2, f"{peak / file.stored_bytes:.2f} of the file"
    ids = torch.randint(256, (2, 16), device="cuda")
    with torch.no_grad():
        found = twin(ids).logits
        expected = model.cuda()(ids).logits
    assert float((found - expected).norm() / expected.norm()) < 2e-2
    for name in names:
        assert torch.equal(twin.get_submodule(name).weight, model.get_submodule(name).weight), name


def test_writing_and_loading_take_the_memory_of_one_layer(tmp_path):
    """Besides the dense model: no second copy of it, not even a packed one."""
    model = prune(nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(8))))
    dims = find_packable(model).dims
    layer = 4 * 1024 * 1024
    with LiveBytes() as writing:
        writing.count(parameter.detach() for parameter in model.parameters())
        write_packed(tmp_path / "p", model.state_dict(), dims)
    assert 8.5 * layer < writing.peak < 13 * layer
    file = PackedFile(tmp_path / "p")
    with LiveBytes() as loading:
        loading.count(parameter.detach() for parameter in model.parameters())
        load_packed(model, file)
    # What was there before is freed as its successor comes.
    assert 8 * layer < loading.peak < 13 * layer


def test_layers_that_servers_run_as_one_are_packed_together_or_not_at_all():
    config = hf.LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=64
    )
    torch.manual_seed(0)
    model = prune(
        hf.LlamaForCausalLM(config), skip=("model.layers.0.self_attn.v_proj", "model.layers.1.mlp.gate_proj", "lm_head")
    )
    packable = find_packable(model)
    fused = [f"model.layers.0.self_attn.{name}.weight" for name in ("q_proj", "k_proj")] + [
        "model.layers.1.mlp.up_proj.weight"
    ]
    assert all("servers run it as one layer" in packable.dense[name] for name in fused)
    assert len(packable.dims) == 14 - 5
    named = find_packable(model, targets=["model.layers.0.self_attn.q_proj"])
    assert list(named.dims) == ["model.layers.0.self_attn.q_proj.weight"]
