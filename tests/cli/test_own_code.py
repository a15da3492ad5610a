"""Models whose class lies in Python files beside their weights (``trust_remote_code``)."""

from __future__ import annotations

import json
import sys

import pytest
import torch
import transformers as hf
from transformers import dynamic_module_utils

from prox24_lightning import register_with_transformers
from prox24_lightning.convert import find_packable
from prox24_lightning.io.packed_folder import save_folder
from prox24_lightning.mask import mask_24

CONFIG = """
from transformers import PretrainedConfig
class MineConfig(PretrainedConfig):
    model_type = "mine"
    def __init__(self, hidden_size=16, **others):
        self.hidden_size = hidden_size
        super().__init__(**others)
"""
MODEL = """
from torch import nn
from transformers import PreTrainedModel
from .configuration_mine import MineConfig
class Mine(PreTrainedModel):
    config_class = MineConfig
    def __init__(self, config):
        super().__init__(config)
        self.up = nn.Linear(config.hidden_size, 32)
        self.post_init()
    def forward(self, x):
        return self.up(x)
"""


@pytest.fixture
def own_code(tmp_path, monkeypatch):
    """A folder with a model of its own code, dense with zeros, and the model."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "configuration_mine.py").write_text(CONFIG)
    (folder / "modeling_mine.py").write_text(MODEL)
    places = {"AutoConfig": "configuration_mine.MineConfig", "AutoModel": "modeling_mine.Mine"}
    entries = {"model_type": "mine", "architectures": ["Mine"], "hidden_size": 16, "auto_map": places}
    (folder / "config.json").write_text(json.dumps(entries))
    config = hf.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    model = hf.AutoModel.from_config(config, trust_remote_code=True)
    with torch.no_grad():
        model.up.weight.mul_(mask_24(model.up.weight))
    model.save_pretrained(folder)
    return folder, model


def test_a_packed_folder_brings_the_code_along(own_code, tmp_path):
    register_with_transformers()
    _, model = own_code
    packed, again = tmp_path / "packed", tmp_path / "again"
    save_folder(packed, model, find_packable(model), source="a test")
    loaded = hf.AutoModel.from_pretrained(packed, trust_remote_code=True)
    assert type(loaded).__name__ == "Mine"
    assert torch.equal(loaded.up.weight, model.up.weight)
    loaded.save_pretrained(again)
    files = {path.name: path.read_bytes() for path in packed.iterdir()}
    assert {"configuration_mine.py", "modeling_mine.py", "packed.safetensors"} <= set(files)
    assert {path.name: path.read_bytes() for path in again.iterdir()} == files


@pytest.mark.parametrize(
    "words", [["doctor"], ["doctor", "--head", "base"], ["prune", "--data", "prox24_lightning.io.texts.PythonTopics"]]
)
def test_commands_run_no_code_of_a_model_and_ask_nothing(own_code, prox24, words, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("a command asks nothing"))
    command, *options = words
    code, _, err = prox24(command, own_code[0], *options)
    assert code == 2
    assert "mine brings Python code of its own, which the commands do not run: load it in Python with" in err
