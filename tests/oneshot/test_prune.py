import copy
import io
import json

import pytest
import torch
from rich.console import Console
from tiny_blocks import WIDTH, KilledError, Model, batches, killed_in, prune, seeded
from torch import nn

from prox24_lightning.calibration.blocks import find_blocks
from prox24_lightning.mask import is_24
from prox24_lightning.oneshot import LayerRecord, LayerwiseReport
from prox24_lightning.weights.selection import select_weights


def test_every_layer_of_the_blocks_is_24_and_nothing_else_moved():
    model = seeded()
    before = copy.deepcopy(model)
    report = prune(model)
    names = {f"layers.{i}.{layer}.weight" for i in range(3) for layer in ("left", "right", "out")}
    assert set(report.masks) == names == {layer.name for layer in report.layers}
    assert "tensor(" not in repr(report)
    for name, parameter in model.named_parameters():
        if name in names:
            assert is_24(parameter)
            assert not parameter[~report.masks[name]].any()
        else:
            assert torch.equal(parameter, before.get_parameter(name))
    assert {weight.name for weight in report.skipped} == {"embed.weight", "head.weight"}


def test_hessians_are_those_of_the_pruned_model():
    """The reported loss of every layer is reproduced from the finished model's own inputs."""
    model = seeded()
    dense = copy.deepcopy(model)
    report = prune(model, refine=None, method="wanda")
    for layer in report.layers:
        module = model.get_submodule(layer.name.removesuffix(".weight"))
        seen = []
        handle = module.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].flatten(0, 1)))
        with torch.no_grad():
            for batch in batches():
                model(batch)
        handle.remove()
        rows = torch.cat(seen).detach()
        wanted = dense.get_parameter(layer.name)
        lost = (rows @ (module.weight - wanted).T).square().sum() / (rows @ wanted.T).square().sum()
        assert layer.loss == pytest.approx(lost.item(), rel=1e-3)
        assert layer.tokens == len(rows)


def test_a_model_in_float64_is_solved_in_float64():
    """Its 2:4 weights are the least-squares solution on their masks to more digits than float32 has."""
    model = seeded(blocks=1).double()
    dense = copy.deepcopy(model)
    data = [batch.double() for batch in batches()]
    report = prune(model, data, method="magnitude", tolerance=1e-12, damping=0.0, dense_target=0.0)
    layer, wanted = model.layers[0].left, dense.layers[0].left.weight
    seen = []
    layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        for batch in data:
            model(batch)
    rows = torch.cat(seen)
    gradient = (layer.weight - wanted) @ (rows.T @ rows / len(rows))
    assert float(gradient[report.masks["layers.0.left.weight"]].detach().abs().max()) < 1e-9


def test_layers_with_one_input_are_solved_together_and_as_if_alone():
    together, alone = seeded(blocks=1), seeded(blocks=1)
    prune(together)
    prune(alone, targets=["layers.0.left"])
    torch.testing.assert_close(together.layers[0].left.weight, alone.layers[0].left.weight, rtol=1e-4, atol=1e-5)


def test_blocks_that_return_tuples_give_the_same():
    plain, tuples = seeded(), seeded(returns="tuple")
    prune(plain)
    prune(tuples)
    for one, two in zip(plain.parameters(), tuples.parameters(), strict=True):
        assert torch.equal(one, two)


def test_arguments_of_every_block_are_its_own():
    """Block 2 is called with shift=0.2; with block 0's arguments its inputs' Hessian would differ."""
    model = seeded()
    report = prune(model, refine=None, method="magnitude")
    with torch.no_grad():
        x = torch.cat([model.embed(batch) for batch in batches()])
        x = model.layers[0](x, torch.tensor(0.0))
        x = model.layers[1](x, torch.tensor(0.1))
        x = model.layers[2](x, torch.tensor(0.2))
    hidden = x.detach()
    assert torch.allclose(model(torch.cat(batches())), model.head(hidden), atol=1e-5)
    assert len(report.layers) == 9


@pytest.mark.parametrize("dense_target", [0.0, 0.5])
def test_a_killed_run_resumes_at_the_last_finished_block(tmp_path, dense_target):
    options = {"dense_target": dense_target}
    unbroken = seeded()
    whole = prune(unbroken, **options)

    broken = seeded()
    handle = killed_in(broken.layers[2].out, 0)
    with pytest.raises(KilledError):
        prune(broken, work_dir=tmp_path, **options)
    handle.remove()
    assert is_24(broken.layers[1].out.weight)
    assert sorted(path.name for path in tmp_path.glob("block*")) == [f"block_0000{i}.safetensors" for i in range(2)]

    resumed = seeded()
    report = prune(resumed, work_dir=tmp_path, **options)
    for one, two in zip(unbroken.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, two)
    assert [layer.name for layer in report.layers] == [layer.name for layer in whole.layers]
    assert all(torch.equal(whole.masks[name], report.masks[name]) for name in whole.masks)


def test_a_resumed_run_reports_what_finished_blocks_left_dense(tmp_path):
    skipped = []
    for _ in range(2):
        model = seeded()
        model.layers[1].spare = nn.Linear(WIDTH, WIDTH, bias=False)
        model.layers[1].spare.weight.data.fill_(1)
        skipped.append(prune(model, work_dir=tmp_path).skipped)
    assert skipped[0] == skipped[1]
    assert any(weight.name == "layers.1.spare.weight" and "not called" in weight.reason for weight in skipped[1])


def test_a_model_that_is_pruned_in_part_does_not_go_on(tmp_path):
    model = seeded()
    handle = killed_in(model.layers[1].out, 0)
    with pytest.raises(KilledError):
        prune(model, work_dir=tmp_path)
    handle.remove()
    with pytest.raises(ValueError, match=r"dense_weights was .* load the dense model again, use another work_dir"):
        prune(model, work_dir=tmp_path)


def test_blocks_of_other_arguments_are_not_taken_over(tmp_path):
    model = seeded()
    prune(model, work_dir=tmp_path)
    model = seeded()
    model.layers[2].register_forward_pre_hook(
        lambda _, args, kwargs: (args, {**kwargs, "shift": kwargs["shift"] + 1}), with_kwargs=True
    )
    with pytest.raises(ValueError, match="inputs was"):
        prune(model, work_dir=tmp_path)


def test_finished_blocks_are_not_solved_again(tmp_path, monkeypatch):
    prune(seeded(), work_dir=tmp_path)
    monkeypatch.setattr("prox24_lightning.oneshot.prune_block.solve_input_group", None)
    assert len(prune(seeded(), work_dir=tmp_path).layers) == 9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "wanda"}, "method was 'prox' and is now 'wanda'; use another work_dir"),
        ({"data": batches(seed=7)}, "inputs was"),
    ],
)
def test_blocks_of_another_run_are_not_taken_over(tmp_path, changes, message):
    prune(seeded(), work_dir=tmp_path)
    with pytest.raises(ValueError, match=message):
        prune(seeded(), work_dir=tmp_path, **changes)


@pytest.mark.parametrize("wrap", [lambda batch: batch, lambda batch: {"x": batch}])
def test_a_single_batch_is_no_list_of_batches(wrap):
    with pytest.raises(TypeError, match=r"batches must be an iterable of batches; for one batch give \[batch\]"):
        prune(seeded(), wrap(batches()[0]))


@pytest.mark.parametrize("offload", ["cpu", "files"])
def test_where_hidden_states_wait_changes_nothing(tmp_path, offload):
    here, there = seeded(), seeded()
    prune(here)
    prune(there, offload=str(tmp_path) if offload == "files" else offload)
    for one, two in zip(here.parameters(), there.parameters(), strict=True):
        assert torch.equal(one, two)
    assert not list(tmp_path.iterdir()), "files are removed at the end"


def test_skip_and_targets_are_honoured():
    report = prune(seeded(), targets=["layers.*"], skip=["*.out"])
    assert {layer.name.split(".")[2] for layer in report.layers} == {"left", "right"}
    assert any(weight.reason == "skip='*.out'" for weight in report.skipped)


def test_budget_leaves_the_most_sensitive_layers_dense():
    model = seeded()
    with torch.no_grad():
        # Nearly rank one: what 2:4 takes away cannot be made up by other inputs.
        model.layers[1].left.weight.copy_(torch.eye(24, WIDTH) * 1e-3 + torch.randn(24, WIDTH) * 1e-6)
        model.layers[1].left.weight[:, ::4] = 1.0
        model.layers[1].left.weight[:, 1::4] = 1.0
        model.layers[1].left.weight[:, 2::4] = -1.0
        model.layers[1].left.weight[:, 3::4] = -1.0
    everything = prune(copy.deepcopy(model), method="wanda", refine=None)
    worst = max(everything.layers, key=lambda layer: layer.loss).name
    report = prune(model, budget=0.12)
    dense = [weight.name for weight in report.skipped if weight.reason.startswith("budget")]
    assert dense == [worst]
    assert not is_24(model.get_parameter(worst))
    assert len(report.layers) == 8


def test_dense_target_brings_the_models_output_closer():
    dense = seeded(blocks=6)
    outputs = {}
    for share in (0.0, 1.0):
        model = seeded(blocks=6)
        prune(model, batches(20), method="sparsegpt", dense_target=share)
        with torch.no_grad():
            outputs[share] = sum(float((model(x) - dense(x)).square().sum()) for x in batches(20))
    assert outputs[1.0] < outputs[0.0]


def test_a_model_without_a_list_of_blocks_is_one_block():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.LazyLinear(4))
    model(torch.randn(1, 4, 6, 6))
    report = prune(model, [torch.randn(8, 4, 6, 6)])
    assert [layer.name for layer in report.layers] == ["0.weight", "2.weight", "4.weight"]
    for weight in select_weights(model):
        assert is_24(weight.parameter, dim=weight.dim)


def test_column_geometry_groups_along_outputs():
    model = seeded()
    report = prune(model, geometry="column")
    for layer in report.layers:
        assert is_24(model.get_parameter(layer.name), dim=0)


def test_a_bfloat16_model_stays_bfloat16():
    model = seeded().bfloat16()
    prune(model, [batch.bfloat16() for batch in batches()])
    assert model.layers[0].left.weight.dtype == torch.bfloat16
    assert is_24(model.layers[2].out.weight)


def test_training_mode_and_parameters_come_back_as_they_were():
    model = seeded()
    model.train()
    model.layers[1].eval()
    prune(model)
    assert model.training
    assert not model.layers[1].training
    assert model.layers[0].training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert "forward" not in vars(model.layers[0])


@pytest.mark.parametrize("dense_target", [0.0, 0.5])
def test_a_layer_with_infinite_inputs_is_named_and_finished_blocks_stay(tmp_path, dense_target):
    model = seeded()
    with torch.no_grad():
        model.layers[0].out.bias[0] = 1e38
    with pytest.raises(
        ValueError, match=r"layers.1.left \+ layers.1.right: the layer's inputs hold values that are not"
    ):
        prune(model, work_dir=tmp_path, dense_target=dense_target)
    assert is_24(model.layers[0].out.weight)
    assert (tmp_path / "block_00000.safetensors").exists()


@pytest.mark.parametrize("dense_target", [0.0, 0.5])
def test_unusual_layers_are_noted(dense_target):
    few = prune(seeded(), [torch.randn(1, 3, 8)], dense_target=dense_target)
    assert few.layers[0].note == "fewer tokens (3) than inputs (16)"
    silent = seeded()
    with torch.no_grad():
        silent.embed.weight.zero_()
        silent.embed.bias.zero_()
    report = prune(silent, dense_target=dense_target)
    assert report.layers[0].note == "inputs are all zero: mask by magnitude"


def test_a_layer_that_is_never_called_stays_dense_and_says_so():
    model = seeded()
    model.layers[1].spare = nn.Linear(WIDTH, WIDTH)
    before = model.layers[1].spare.weight.clone()
    report = prune(model)
    assert torch.equal(model.layers[1].spare.weight, before)
    assert any(w.name == "layers.1.spare.weight" and "not called" in w.reason for w in report.skipped)


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x):
        # The first entry says where a token goes; 0 goes nowhere.
        result = x.clone()
        for number, expert in enumerate(self.experts, start=1):
            chosen = (x[:, 0] == number).nonzero().squeeze(1)
            result[chosen] = x[chosen] + expert(x[chosen])
        return result


def test_experts_without_tokens_in_the_first_batch_are_solved_on_their_own_tokens():
    torch.manual_seed(0)
    tokens = torch.randn(60, 8)
    tokens[:, 0] = torch.arange(60) % 3
    model = nn.Module()
    model.layers = nn.ModuleList([Experts()])
    model.forward = lambda x: model.layers[0](x)
    report = prune(model, [tokens[tokens[:, 0] == 0], tokens[tokens[:, 0] == 1], tokens[tokens[:, 0] > 0]])
    assert [layer.tokens for layer in report.layers] == [40, 20]


class Twice(Model):
    def forward(self, x):
        return super().forward(x) + self.layers[0](self.embed(x)).mean()


@pytest.mark.parametrize(
    ("model", "kwargs", "message"),
    [
        (seeded(), {"budget": 1.0}, r"budget=1.0 must lie in \[0, 1\)"),
        (seeded(), {"dense_target": 2.0}, r"dense_target=2.0 must lie in \[0, 1\]"),
        (seeded(), {"data": []}, "there are no calibration batches"),
        (seeded(), {"blocks": "decoder"}, "blocks='decoder' is not a list of modules of Model; it has layers"),
        (seeded(returns="dict"), {}, "block layers.0 returns dict; its hidden state must be a tensor"),
        (Twice(), {}, "block layers.0 is called twice in one forward pass"),
        (seeded().requires_grad_(False), {}, r"no weight of Model can be pruned layer-wise: frozen"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_changes(model, kwargs, message):
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        prune(model, **kwargs)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_largest_list_of_like_modules_is_found():
    model = seeded()
    model.small = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    model.mixed = nn.ModuleList([nn.Linear(500, 500), nn.ReLU()])
    assert find_blocks(model).names == ("layers.0", "layers.1", "layers.2")
    assert find_blocks(model, "small").names == ("small.0", "small.1")


def test_the_table_of_a_large_model_fits_80_columns_and_keeps_names_and_reasons():
    parts = ("self_attn.q_proj", "mlp.down_proj", "block_sparse_moe.experts.3.w1")
    layers = [
        LayerRecord(
            f"model.layers.{block}.{part}.weight",
            f"model.layers.{block}",
            (14336, 16384),
            262144 + block,
            *(0.012345, 0.012345, 0.9876, 1234.5),
            "fewer tokens (256) than inputs (512)" if "down" in part else "",
            0.01,
        )
        for block in (0, 11)
        for part in parts
    ]
    out = io.StringIO()
    Console(file=out, width=80).print(LayerwiseReport({}, layers).table())
    text = out.getvalue()
    assert "names begin with model.layers." in text
    for start, end in [("0.self_attn.q_proj",) * 2, ("11.mlp.down_proj",) * 2, ("11.", "experts.3.w1")]:
        assert any(line.strip().startswith(start) and end in line.split()[0] for line in text.splitlines())
    assert text.count("0.01235") == 12
    assert text.count("14336 x 16384") == text.count("1234.5") == 6
    assert "model.layers.*.mlp.down_proj x 2: fewer tokens (256) than inputs (512)" in text


def test_the_report_becomes_a_table_json_and_a_plot(tmp_path):
    report = prune(seeded())
    assert report.table().row_count == 9
    report.to_json(tmp_path / "report.json")
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["settings"]["method"] == "prox"
    assert content["layers"][0]["shape"] == [24, WIDTH]
    report.plot(tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_a_sequence_of_blocks_counts_where_it_is_nearly_the_whole_model():
    def block():
        return nn.Sequential(nn.Linear(16, 16), nn.ReLU())

    trunk = nn.Sequential(block(), block(), block())
    model = nn.Sequential(trunk, nn.Linear(16, 2))
    assert find_blocks(model).names == ("0.0", "0.1", "0.2")
    assert find_blocks(trunk).names == ("0", "1", "2")
    assert [layer.block for layer in prune(trunk, [torch.randn(40, 16)]).layers] == ["0", "1", "2"]
    stages = nn.ModuleDict({"first": nn.Sequential(block(), block()), "last": nn.Sequential(block(), block())})
    assert find_blocks(stages).whole, "half of the model is one stage of it, not its blocks"
