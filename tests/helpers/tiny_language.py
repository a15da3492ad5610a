"""A tiny language, its tokenizer and a tiny Llama, so that no test needs the hub."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from prox24_lightning.io.texts import TextSource

WORDS = [f"w{number}" for number in range(60)]
DOCUMENT = 31
"""Tokens a document, the end of the text included."""


class Chains(TextSource):
    """Documents in which a word leads to one of four others: something that a model can learn.

    Args:
        documents: how many.
    """

    def __init__(self, documents: int = 100) -> None:
        self.documents = documents

    def texts(self, split):
        draw = random.Random(split)
        return [" ".join(self._chain(draw)) for _ in range(self.documents)]

    def describe(self):
        return f"{self.documents} chains of words"

    def _chain(self, draw):
        word = draw.randrange(len(WORDS))
        for _ in range(DOCUMENT - 1):
            yield WORDS[word]
            word = (7 * word + draw.randrange(4)) % len(WORDS)


def tiny_tokenizer():
    vocabulary = {word: number for number, word in enumerate(["<unk>", "</s>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")


def save_tiny_llama(folder: Path) -> str:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=64,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)
