"""The callback on a GPU."""

from __future__ import annotations

import json

import pytest
import torch
from converted_runs import HIDDEN, prox, states
from tiny_runs import TinyModule, quiet_trainer, tiny_loader

from prox24_lightning import ConvertAndBenchmark
from prox24_lightning.convert import SemiStructuredLinear
from prox24_lightning.mask import is_24

pytestmark = pytest.mark.filterwarnings("ignore:The .*dataloader.* does not have many workers")


@pytest.fixture
def gpu():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    torch.manual_seed(0)


def gpu_fit(tmp_path, *, module=None, steps=6, **arguments):
    final = ConvertAndBenchmark(**{"token_counts": (3, 64), "rounds": 3, **arguments})
    module = TinyModule(width=64) if module is None else module
    trainer = quiet_trainer(accelerator="gpu", max_steps=steps, callbacks=[prox(), final], default_root_dir=tmp_path)
    trainer.fit(module, tiny_loader())
    return final, module


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")
def test_a_run_on_a_gpu(gpu, tmp_path):
    final, module = gpu_fit(tmp_path, only_if_faster=False, run_mode="eager")
    report = final.report
    assert report.error is None
    assert report.notes == ()
    assert report.names("sparse") == (HIDDEN,)
    assert [variant.name for variant in report.model] == ["dense", "all_sparse"]
    assert report.model[1].output_error < 2e-2
    assert json.loads((tmp_path / "benchmark.json").read_text())["model_scope"] == "model"
    assert type(module.model[2]) is torch.nn.Linear
    assert next(module.parameters()).device.type == "cpu"
    gpu_fit(tmp_path, module=module)
    assert is_24(module.model[2].weight), "a second fit of the same model"


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")
def test_only_what_is_faster_on_a_gpu(gpu, tmp_path):
    final, _ = gpu_fit(tmp_path)
    for shape in final.report.shapes:
        assert shape.sparse == all(result.speedup("graph") >= 1 for result in shape.tokens) or "whole" in shape.decision


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")
def test_in_place_on_a_gpu(gpu, tmp_path):
    final, module = gpu_fit(tmp_path, in_place=True, only_if_faster=False)
    assert final.report.error is None
    assert isinstance(module.model[2], SemiStructuredLinear)
    assert module.model[0].weight.is_cuda
    with torch.no_grad():
        assert module(torch.randn(5, 8, device="cuda", dtype=torch.bfloat16)).shape == (5, 4)


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")
def test_out_of_memory_on_a_gpu_is_an_entry(gpu, tmp_path):
    final, _ = gpu_fit(tmp_path, token_counts=(2**40,))
    why = states(final.report)[HIDDEN][1]
    assert why.startswith("could not be measured: ")
    assert final.report.error is None
