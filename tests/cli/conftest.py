"""A tiny Llama, dense and 2:4, in folders as from_pretrained reads them."""

from __future__ import annotations

import pytest
import torch
from tiny_language import save_tiny_llama, tiny_tokenizer
from transformers import LlamaForCausalLM

from prox24_lightning.mask import mask_24


@pytest.fixture(scope="session")
def dense_folder(tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="session")
def sparse_folder(tmp_path_factory, dense_folder):
    """Every projection is 2:4; embedding and head, which are one, are not."""
    folder = str(tmp_path_factory.mktemp("sparse"))
    model = LlamaForCausalLM.from_pretrained(dense_folder)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj" in name:
                parameter.mul_(mask_24(parameter))
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def prox24(capsys):
    """Run ``prox24 WORDS`` here: exit code, stdout, stderr."""
    from prox24_lightning.cli.main import main

    def run(*words):
        capsys.readouterr()
        code = 0
        try:
            main([str(word) for word in words])
        except SystemExit as stop:
            code = stop.code
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run
