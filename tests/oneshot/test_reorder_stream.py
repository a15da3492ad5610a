"""prune_layerwise(reorder_inputs="stream"): one order of the residual stream for all blocks."""

import copy

import pytest
import torch
from tiny_blocks import KilledError, killed_in, seeded
from tiny_blocks import prune as prune_chain
from tiny_reordered import IDS, IMAGES, conv_net, gpt2, llama

from prox24_lightning.mask import is_24
from prox24_lightning.oneshot import prune as prune_module
from prox24_lightning.oneshot import prune_block
from prox24_lightning.oneshot.config import PruneConfig
from prox24_lightning.solvers.input_order.search import pruned_saliency
from prox24_lightning.solvers.input_order.stream import StreamOrderSearch
from prox24_lightning.weights.free_order import FreeOrder

CPU = torch.device("cpu")
BATCHES = [{"input_ids": IDS.roll(places, 1)} for places in range(4)]


def prune(model, data=BATCHES, **kwargs):
    return prune_chain(model, data, **{"reorder_inputs": "stream", "refine_steps": 20, **kwargs})


def unequal():
    """Embeddings are tied, and channels count for more or less."""
    model, run = llama(tie_word_embeddings=True)
    with torch.no_grad():
        model.model.embed_tokens.weight *= torch.linspace(0.1, 2, 32).exp()
    return model, run


@pytest.mark.parametrize("make", [unequal, gpt2])
def test_the_reordered_dense_model_computes_the_same(monkeypatch, make):
    monkeypatch.setattr(prune_block, "solve_input_group", lambda *args, **options: [])
    model, run = make()
    dense = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        before = run()
        with pytest.raises(ValueError, match="calls none"):
            prune(model)
        torch.testing.assert_close(run(), before, rtol=1e-4, atol=1e-5)
    kept = {name for name, value in model.state_dict().items() if torch.equal(value, dense[name])}
    assert not any("embed_tokens" in name or "wte" in name or "wpe" in name for name in kept)


def test_readers_of_the_stream_lose_less():
    losses = {}
    for wanted in (True, "stream"):
        model, _ = unequal()
        report = prune(model, reorder_inputs=wanted, dense_target=0.5, steps=20)
        assert all(is_24(model.get_parameter(row.name)) for row in report.layers)
        losses[wanted] = sum(row.final_loss for row in report.layers if "down" not in row.name and "o_" not in row.name)
        for name, mask in report.masks.items():
            assert not model.get_parameter(name)[~mask].any()
    assert losses["stream"] < 0.95 * losses[True]
    notes = {row.name: row.note for row in report.layers}
    assert "residual stream reordered (-" in notes["model.layers.1.self_attn.q_proj.weight"]
    assert notes["model.layers.1.mlp.down_proj.weight"].startswith("inputs reordered (-")
    assert report.settings["reorder_inputs"] == "stream"


def test_a_killed_run_goes_on_to_the_same_model(tmp_path):
    (whole, _), (killed, _), (resumed, _) = unequal(), unequal(), unequal()
    prune(whole, dense_target=0.5)
    handle = killed_in(killed.model.layers[1].mlp.down_proj, after=40)
    with pytest.raises(KilledError):
        prune(killed, work_dir=tmp_path, dense_target=0.5)
    handle.remove()
    assert (tmp_path / "stream_order.json").exists()
    prune(resumed, work_dir=tmp_path, dense_target=0.5)
    for (name, one), two in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(one, two), name


@pytest.mark.parametrize(
    ("model", "data", "options", "reason"),
    [
        (lambda: conv_net()[0], [IMAGES], {}, "no chain of blocks"),
        (seeded, None, {}, "no norm or embedding"),
        (lambda: llama()[0], BATCHES, {"geometry": "column"}, "no layer that becomes 2:4"),
        (lambda: llama()[0].model, BATCHES, {}, "changes output 0"),
    ],
)
def test_what_cannot_be_proved_keeps_its_order(caplog, model, data, options, reason):
    model = model()
    with caplog.at_level("INFO"):
        report = prune(model, data, **options)
    assert report.layers
    assert "the order of the residual stream is fixed" in caplog.text
    assert reason in caplog.text


def test_a_model_that_does_not_lie_on_the_device_keeps_its_order(monkeypatch, caplog):
    class Elsewhere:
        blocks, home, device = type("Blocks", (), {"whole": False}), torch.device("cpu"), torch.device("cuda", 0)

    with caplog.at_level("INFO"):
        assert prune_module.proved_stream(llama()[0], Elsewhere, None, [], {}) is None
    assert "the model lies on cpu, and blocks are solved on cuda:0" in caplog.text


def test_rows_of_large_models_are_drawn():
    layers = [torch.nn.Linear(16, 64, bias=False) for _ in range(2)]
    free = FreeOrder(tuple(layers), torch.arange(16)[:, None], 1, ())
    search = StreamOrderSearch(free, layers, CPU, limit=16 * 32)
    for layer in layers:
        with torch.no_grad():
            layer.weight *= torch.linspace(0, 3, 16).exp()
        search.add(layer, torch.eye(16), "layer")
    assert [len(rows) for rows in search._found] == [16, 16]
    found = search.best()
    values = layers[0].weight.detach().square()
    assert found.change < -0.05
    assert pruned_saliency(values[:, found.order]) < pruned_saliency(values)


def test_layers_count_alike_whatever_their_size():
    orders = []
    for factor in (1, 1024):
        torch.manual_seed(0)
        layers = [torch.nn.Linear(16, 32, bias=False) for _ in range(2)]
        with torch.no_grad():
            layers[0].weight *= factor
        search = StreamOrderSearch(FreeOrder(tuple(layers), torch.arange(16)[:, None], 1, ()), layers, CPU)
        for layer in layers:
            search.add(layer, torch.eye(16), "layer")
        orders.append(search.best().order)
    assert torch.equal(*orders)


def test_another_word_is_refused():
    with pytest.raises(ValueError, match="reorder_inputs='blocks' is unknown"):
        PruneConfig(reorder_inputs="blocks")
