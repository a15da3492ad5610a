import copy

import pytest
import torch
from tiny_blocks import KilledError, batches, killed_in, prune, seeded
from tiny_reordered import IDS, IMAGES, conv_net, llama

from prox24_lightning.mask import is_24
from prox24_lightning.oneshot import prune_block, prune_layerwise
from prox24_lightning.oneshot.config import PruneConfig


def reordered_dense(monkeypatch, model, data, **kwargs):
    """Reorder as a pruning run does, and solve nothing."""
    monkeypatch.setattr(prune_block, "solve_input_group", lambda *args, **options: [])
    with pytest.raises(ValueError, match="calls none"):
        prune(model, data, reorder_inputs=True, **kwargs)


@pytest.mark.parametrize("case", ["blocks", "llama", "convolutions"])
def test_the_reordered_dense_model_computes_the_same(monkeypatch, case):
    if case == "blocks":
        model, data = seeded(), batches()
        run = lambda: model(data[0])  # noqa: E731
    else:
        (model, run), data = (llama(), [IDS]) if case == "llama" else (conv_net(), [IMAGES])
    dense = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        before = run()
        reordered_dense(monkeypatch, model, data)
        changed = [name for name, value in model.state_dict().items() if not torch.equal(value, dense[name])]
        torch.testing.assert_close(run(), before, rtol=1e-4, atol=1e-5)
    consumers = {"blocks": "out", "llama": "down_proj", "convolutions": "second"}
    assert any(consumers[case] in name for name in changed)


@pytest.mark.parametrize("dense_target", [0.0, 0.5])
def test_losses_are_lower_where_the_order_is_free(dense_target):
    reports = {}
    for wanted in (False, True):
        model = seeded()
        reports[wanted] = prune(model, reorder_inputs=wanted, dense_target=dense_target, steps=50)
        assert all(is_24(model.get_parameter(layer.name)) for layer in reports[wanted].layers)
    losses = {
        wanted: sum(row.final_loss for row in report.layers if ".out." in row.name)
        for wanted, report in reports.items()
    }
    assert losses[True] < 0.95 * losses[False]
    notes = {row.name: row.note for row in reports[True].layers}
    assert "inputs reordered (-" in notes["layers.0.out.weight"]
    assert not notes["layers.0.left.weight"]
    assert reports[True].settings["reorder_inputs"]
    assert "reorder_inputs" not in PruneConfig().settings()


def test_masks_belong_to_the_weights_in_their_new_order():
    model = seeded()
    report = prune(model, reorder_inputs=True)
    for name, mask in report.masks.items():
        assert not model.get_parameter(name)[~mask].any()


def test_column_groups_have_no_use_for_it():
    model = seeded()
    report = prune(model, reorder_inputs=True, geometry="column")
    assert not any("reordered" in row.note for row in report.layers)


def test_a_killed_run_goes_on_to_the_same_model(tmp_path):
    whole, killed, resumed = seeded(), seeded(), seeded()
    options = {"reorder_inputs": True, "dense_target": 0.5}
    prune(whole, **options)
    handle = killed_in(killed.layers[2].out, after=8)
    with pytest.raises(KilledError):
        prune(killed, work_dir=tmp_path, **options)
    handle.remove()
    assert 1 <= len(list(tmp_path.glob("block_*"))) <= 2
    report = prune(resumed, work_dir=tmp_path, **options)
    for one, two in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(one, two)
    assert "inputs reordered" in report.layers[2].note


def test_a_shared_layer_stays_as_it_is():
    model = seeded()
    for layer in model.layers:
        layer.right = model.layers[0].right
    before = model.layers[0].right.weight.clone()
    report = prune(model, reorder_inputs=True, targets=["*.out"])
    assert torch.equal(model.layers[0].right.weight, before)
    assert len(report.layers) == 3


def test_a_forward_that_fails_under_the_probe_only_costs_the_order(monkeypatch, caplog):
    def failing(*args):
        raise RuntimeError("odd forward")

    monkeypatch.setattr("prox24_lightning.solvers.input_order.choose.find_free_orders", failing)
    with caplog.at_level("INFO"):
        report = prune(seeded(), reorder_inputs=True)
    assert len(report.layers) == 9
    assert "odd forward" in caplog.text


def test_dtype_of_half_precision_models_is_kept():
    model = seeded().to(torch.bfloat16)
    prune_layerwise(model, [x.bfloat16() for x in batches()], progress=False, steps=10, reorder_inputs=True)
    assert model.layers[0].out.weight.dtype == torch.bfloat16


def test_a_resumed_run_moves_norms_and_biases_too(tmp_path):
    (whole, _), (resumed, _) = conv_net(), conv_net()
    prune(whole, [IMAGES], reorder_inputs=True, work_dir=tmp_path)
    prune(resumed, [IMAGES], reorder_inputs=True, work_dir=tmp_path)
    for (name, one), two in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(one, two), name
