"""One-shot pruning to rounded values, and rounding of a model that is 2:4 already."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from tiny_blocks import batches, prune, seeded
from torch import nn

from prox24_lightning.calibration.rounded_inputs import rounded_inputs, rounded_like_tokens
from prox24_lightning.calibration.statistics.hessian import HessianAccumulator
from prox24_lightning.convert.format.packed_weight import pack_24, unpack_24
from prox24_lightning.mask import is_24
from prox24_lightning.weights.rounding import round_weight


def error(model, reference):
    with torch.no_grad():
        return sum(float((model(x) - reference(x)).square().sum()) for x in batches())


def rounded_plainly(model, names, form):
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name in names:
            weight = model.get_parameter(name)
            weight.copy_(round_weight(weight, form))
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights", ["fp8_e4m3", "int8"])
def test_packing_the_pruned_model_changes_nothing_more(weights, dtype, tmp_path):
    model = seeded().to(dtype)
    report = prune(model, [x.to(dtype) for x in batches()], weights=weights, dense_target=0.5)
    for layer in report.layers:
        weight = model.get_parameter(layer.name)
        assert is_24(weight)
        assert torch.equal(unpack_24(pack_24(weight, form=weights)), weight)
        assert layer.final_loss == layer.rounded_loss
    assert report.settings["weights"] == weights
    report.to_json(tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text())["layers"][0]["rounded_loss"] > 0


@pytest.mark.parametrize("dense_target", [0.0, 1.0])
def test_keep_rounds_a_sparse_model_better_than_each_weight_by_itself(dense_target):
    model = seeded()
    names = [layer.name for layer in prune(model, method="wanda").layers]
    sparse = copy.deepcopy(model)
    report = prune(model, method="keep", refine=None, weights="fp8_e4m3", dense_target=dense_target)
    assert [layer.name for layer in report.layers] == names
    for name in names:
        assert not model.get_parameter(name)[sparse.get_parameter(name) == 0].any()
        assert torch.equal(round_weight(model.get_parameter(name), "fp8_e4m3"), model.get_parameter(name))
    assert error(model, sparse) < error(rounded_plainly(sparse, names, "fp8_e4m3"), sparse)


@pytest.mark.parametrize("weights", ["fp8_e4m3", "int8"])
def test_tokens_of_huge_norm_are_not_paid_for_by_the_others(weights):
    model = seeded()
    data = batches()
    for x in data:
        x[:, 0] = 300 + x[:, 0]
    prune(model, data, method="wanda")
    sparse = copy.deepcopy(model)
    prune(model, data, method="keep", weights=weights)
    errors, plain = 0.0, 0.0
    with torch.no_grad():
        for name in ("left", "right"):
            before, after = (whole.get_parameter(f"layers.0.{name}.weight") for whole in (sparse, model))
            for x in data:
                hidden = model.embed(x[:, 1:])
                errors += float((hidden @ (after - before).T).square().sum())
                plain += float((hidden @ (round_weight(before, weights) - before).T).square().sum())
    assert errors < 0.9 * plain


def test_keep_aims_at_the_outputs_of_the_layers_own_weights_unless_told():
    model = seeded()
    prune(model, method="wanda", refine=None)
    options = {"method": "keep", "weights": "int8", "refine": None, "dense_target": None}
    assert prune(copy.deepcopy(model), **options).settings["dense_target"] == 0
    assert prune(seeded(), method="wanda", refine=None, dense_target=None).settings["dense_target"] == 0.5


def test_keep_refuses_a_dense_model_by_the_layers_name():
    with pytest.raises(ValueError, match=r"layers\.0\.left.*: method='keep' keeps the zeros of a 2:4 weight"):
        prune(seeded(), method="keep", weights="int8")


def test_a_part_of_a_reconstruction_step_is_refused():
    with pytest.raises(ValueError, match=r"reconstruct_steps=1.5 must be a whole number"):
        prune(seeded(), reconstruct_steps=1.5)


def test_a_finished_block_keeps_its_rounded_loss(tmp_path):
    models = seeded(), seeded()
    reports = [prune(model, weights="int8", work_dir=tmp_path / "work") for model in models]
    assert [layer.rounded_loss for layer in reports[0].layers] == [layer.rounded_loss for layer in reports[1].layers]
    assert all(torch.equal(*pair) for pair in zip(*(model.parameters() for model in models), strict=True))


def test_the_solver_sees_the_inputs_rounded_as_the_kernels_round_them(monkeypatch):
    seen = []
    count = HessianAccumulator.add
    monkeypatch.setattr(
        HessianAccumulator, "add", lambda self, *rows, **more: seen.append(rows) or count(self, *rows, **more)
    )
    model = seeded()
    prune(model, method="wanda", refine=None)
    seen.clear()
    prune(model, method="keep", refine=None, weights="int8", dense_target=1.0)
    assert seen
    for rows, dense_rows, _ in seen:
        torch.testing.assert_close(rounded_like_tokens(rows, "int8"), rows)
        assert not torch.allclose(rounded_like_tokens(dense_rows, "int8"), dense_rows)
    assert torch.equal(rounded_like_tokens(rows[0], "int8"), rows[0])  # a token without a batch

    # What reaches a later block has passed the earlier one with its inputs rounded.
    reached = []
    model.layers[2].left.register_forward_pre_hook(lambda _, args: reached.append(args[0].flatten(0, 1)))
    with torch.no_grad(), rounded_inputs(linear_layers(model), "int8"):
        model(batches()[0])
    wanted = rounded_like_tokens(reached[0], "int8")
    assert any(rows.shape == wanted.shape and torch.equal(rows, wanted) for rows, _, _ in seen)


@pytest.mark.parametrize("weights", [None, "fp8_e4m3"])
def test_reconstruction_brings_the_whole_model_nearer_to_the_dense_one(weights):
    dense, models = seeded(), {}
    for steps in (0, 60):
        model = models[steps] = seeded()
        report = prune(model, method="wanda", weights=weights, dense_target=0.5, reconstruct_steps=steps)
        for layer in report.layers:
            weight = model.get_parameter(layer.name)
            assert is_24(weight)
            assert weights is None or torch.equal(round_weight(weight, weights), weight)
    with rounded_inputs(linear_layers(models[0]), weights), rounded_inputs(linear_layers(models[60]), weights):
        assert error(models[60], dense) < 0.8 * error(models[0], dense)


def test_reconstruction_rounds_a_transposed_weight_by_its_outputs():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=64, n_positions=32)).eval()
    tokens = [torch.randint(64, (2, 16)) for _ in range(2)]
    report = prune(model, tokens, method="wanda", weights="int8", dense_target=0.5, reconstruct_steps=4)
    assert len(report.layers) == 4
    for layer in report.layers:
        weight = model.get_parameter(layer.name).T
        assert torch.equal(round_weight(weight, "int8"), weight), layer.name


def linear_layers(model):
    return [module for name, module in model.named_modules() if "layers" in name and isinstance(module, nn.Linear)]
