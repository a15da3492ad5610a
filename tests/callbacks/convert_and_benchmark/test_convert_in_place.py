"""Conversion of the model itself at the end of a fit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from converted_runs import HIDDEN, prox
from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from tiny_runs import TinyModule, quiet_trainer, tiny_loader

from prox24_lightning import ConvertAndBenchmark
from prox24_lightning.callbacks import convert_and_benchmark
from prox24_lightning.convert import SemiStructuredLinear, Target, convert
from prox24_lightning.convert.autotune.kernel_table import table_by_rule
from prox24_lightning.convert.benchmark.report import LayerOutcome
from prox24_lightning.convert.benchmark.run import empty_report
from prox24_lightning.convert.format.packed_weight import unpack_24
from prox24_lightning.mask import is_24

pytestmark = pytest.mark.filterwarnings("ignore:The .*dataloader.* does not have many workers")


def test_in_place_on_two_ranks_is_refused_before_the_first_batch():
    class TwoRanks:
        world_size = 2

    with pytest.raises(MisconfigurationException, match="would convert the model of one of 2 processes only"):
        ConvertAndBenchmark(in_place=True).setup(TwoRanks(), TinyModule(), "fit")


@pytest.mark.parametrize("keep_dense", [False, True])
def test_in_place_takes_the_memory_of_the_dense_weights(tmp_path, monkeypatch, keep_dense):
    """Optimizer and Prox24 still hold the parameters of the layers that were replaced."""

    def chosen(model, settings, **_):
        return replace(empty_report(settings), layers=(LayerOutcome(HIDDEN, "Linear", (16, 16), "sparse", ""),))

    monkeypatch.setattr(convert_and_benchmark, "run_benchmark", chosen)
    monkeypatch.setattr(convert, "target_of", lambda device: Target("pretended", (9, 0), "cusparselt"))
    monkeypatch.setattr(convert, "stored_table", lambda shape, *_, **__: table_by_rule(shape, (9, 0)))
    module, sparsifier = TinyModule(), prox()
    final = ConvertAndBenchmark(in_place=True, keep_dense=keep_dense, verbose=False)
    weights = {name: weight for name, weight in module.named_parameters() if name.endswith("weight")}
    trainer = quiet_trainer(max_steps=6, callbacks=[sparsifier, final], default_root_dir=tmp_path)
    trainer.fit(module, tiny_loader())
    assert final.report.error is None
    assert isinstance(module.model[2], SemiStructuredLinear)
    assert is_24(module.model[2].weight)
    assert sparsifier.weights[0].parameter is weights[f"{HIDDEN}.weight"]
    held = {name: weight.untyped_storage().nbytes() for name, weight in weights.items()}
    assert held[f"{HIDDEN}.weight"] == 0
    assert all(size for name, size in held.items() if name != f"{HIDDEN}.weight")
    assert torch.equal(module.model[2].weight, unpack_24(module.model[2].packed_weight))
    with pytest.raises(ValueError, match=r"model\.2\.weight is empty: its layer was converted in place"):
        sparsifier.save_masks(tmp_path / "masks.safetensors")


def test_in_place_leaves_the_model_as_it_was_where_the_conversion_fails(tmp_path, monkeypatch):
    def chosen(model, settings, **_):
        layers = tuple(LayerOutcome(name, "Linear", (16, 16), "sparse", "") for name in (HIDDEN, "model.0"))
        return replace(empty_report(settings), layers=layers)

    def one_then_broken(model, names, **arguments):
        convert.convert_model(model, [HIDDEN], **arguments)
        assert isinstance(model.model[2], SemiStructuredLinear)
        raise RuntimeError("kernel went away")

    monkeypatch.setattr(convert_and_benchmark, "run_benchmark", chosen)
    monkeypatch.setattr(convert_and_benchmark, "convert_model", one_then_broken)
    monkeypatch.setattr(convert, "target_of", lambda device: Target("pretended", (9, 0), "cusparselt"))
    monkeypatch.setattr(convert, "stored_table", lambda shape, *_, **__: table_by_rule(shape, (9, 0)))
    module = TinyModule()
    module.register_buffer("scale", torch.ones(3))
    seen = {}

    class Seen(Callback):
        def on_train_end(self, trainer, pl_module):
            seen.update({name: tensor.clone() for name, tensor in pl_module.state_dict().items()})

    parameters, layer = dict(module.named_parameters()), module.model[2]
    final = ConvertAndBenchmark(in_place=True, verbose=False)
    trainer = quiet_trainer(max_steps=6, callbacks=[prox(), Seen(), final], default_root_dir=tmp_path)
    with pytest.warns(UserWarning, match="kernel went away"):
        trainer.fit(module, tiny_loader())
    assert module.model[2] is layer
    assert all(parameter is parameters[name] for name, parameter in module.named_parameters())
    assert module.state_dict().keys() == seen.keys()
    for name, tensor in module.state_dict().items():
        assert tensor.dtype == seen[name].dtype
        assert torch.equal(tensor, seen[name]), name
    module(torch.randn(2, 8)).sum().backward()
