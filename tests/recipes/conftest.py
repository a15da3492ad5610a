"""A tiny encoder and a tiny language model on disk, so that no test needs the hub."""

from __future__ import annotations

import pytest
from tiny_language import save_tiny_llama
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory) -> str:
    """A BERT of one layer, 16 wide, with a vocabulary of a few words."""
    folder = tmp_path_factory.mktemp("encoder")
    words = ["[PAD]", "[UNK]", "the", "a", "of", "return", "class", "event", "message", "test", "to", "and", "is"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory) -> str:
    """A Llama of two layers, 16 wide, with a vocabulary of 62 words."""
    return save_tiny_llama(tmp_path_factory.mktemp("llama"))
