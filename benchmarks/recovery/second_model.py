"""A second language model, of another architecture: GPT-2 with a tokenizer of its own, trained here from scratch.

    python -m benchmarks.recovery.second_model --compile true
    python -m benchmarks.recovery --name recovery/second_model --compile true \
        --model '{name: runs/second_model, package: false, file: null}' --training recipes.source_text.PythonSources \
        --training.libraries '[scipy, sympy, sklearn, pandas, networkx]'

Where SmolLM2 has RMSNorm, rotary positions, SwiGLU and shared keys and values, this one has LayerNorm, learned
positions, GELU, biases, and queries, keys and values in one layer whose weight is stored transposed. The second command
fine-tunes it on libraries that the first one has not read.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from jsonargparse import auto_cli
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import TQDMProgressBar
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from typing_extensions import override

from benchmarks.recovery.language_model import default_precision
from benchmarks.result_files import write_result
from prox24_lightning.io.pretrained import Pretrained
from prox24_lightning.io.texts import Split, TextSource
from recipes.calibration_text import PythonDocs
from recipes.causal_lm import CausalLM
from recipes.source_text import PythonSources
from recipes.text_tokens import Sequences, TextTokens
from recipes.token_corpus import cut

READ = (
    *("torch", "transformers", "jax", "jaxlib", "flax", "optax", "orbax", "numpyro", "equinox", "diffrax"),
    *("numba", "cupy", "statsmodels", "botorch", "gpytorch", "timm", "torchvision", "torchaudio", "torch_geometric"),
    *("peft", "accelerate", "sentence_transformers", "tensorboard", "onnx", "onnxscript", "skimage", "seaborn"),
    *("patsy", "setuptools", "fontTools", "aiohttp", "huggingface_hub", "Cython", "mpmath", "llvmlite", "plotly"),
)
"""Libraries to train on, as far as they are installed."""

_END = "<|endoftext|>"
_DOCUMENTS_OF_TOKENIZER = 8
"""The tokenizer is trained on one in so many documents."""
_CHECKS = 8


class Documents(TextSource):
    """The training text of ``source``, read once, when it is asked for."""

    def __init__(self, source: TextSource) -> None:
        self.source = source

    @cached_property
    def documents(self) -> list[str]:
        return list(self.source.texts("calibration"))

    @override
    def texts(self, split: Split) -> Iterable[str]:
        return self.documents

    @override
    def describe(self) -> str:
        return self.source.describe()


class Epochs(TextTokens):
    """Text that is read as often as a run of ``sequences`` sequences needs, each time in another order."""

    sequences = 0

    @override
    def training_sequences(self) -> Sequences:
        rows, order = cut(self.tokens("training"), self.length, seed=self.seed, label="the training text")
        orders = [order]
        while sum(map(len, orders)) < self.sequences:
            seed = self.seed + len(orders)
            orders.append(cut(self.tokens("training"), self.length, seed=seed, label="the training text")[1])
        return Sequences(rows, np.concatenate(orders))


class Losses(Callback):
    """The losses at each validation, and the mean of the training loss since the last one."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self._training: list[torch.Tensor] = []

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any) -> None:
        self._training.append(outputs["loss"].detach())

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        training = float(torch.stack(self._training).mean())
        self._training.clear()
        scores = {name: float(value) for name, value in trainer.callback_metrics.items() if "_loss_" in name}
        self.rows.append({"step": trainer.global_step, "training loss": training, **scores})


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of ``vocabulary`` tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[_END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=_END, eos_token=_END)


def main(
    output: Path = Path("runs/second_model"),
    results: Path = Path("benchmarks/results"),
    training: TextSource = PythonSources(READ, standard_library=False),  # noqa: B008
    width: int = 512,
    depth: int = 8,
    heads: int = 8,
    vocabulary: int = 8192,
    tokenizer: Pretrained | None = None,
    length: int = 1024,
    steps: int = 2500,
    batch_size: int = 64,
    lr: float = 1.5e-3,
    warmup_steps: int = 100,
    weight_decay: float = 0.1,
    eval_sequences: int = 64,
    evaluation: dict[str, TextSource] | None = None,
    seed: int = 0,
    compile: bool = False,
    precision: str | None = None,
) -> None:
    """Train the model, save it as a folder, and write the table of its losses.

    Args:
        output: folder of the model; one that is there already is kept, and nothing is trained.
        results: folder of the result file.
        training: text to train on; read several times if the run is longer.
        width: size of the residual stream.
        depth: blocks.
        heads: attention heads a block.
        vocabulary: tokens of the tokenizer that is trained on the text.
        tokenizer: a model whose tokenizer is taken instead; null trains one.
        length: tokens a sequence.
        steps: optimizer steps.
        batch_size: sequences a step.
        lr: peak learning rate of AdamW.
        warmup_steps: linear warm-up before the cosine.
        weight_decay: of matrices.
        eval_sequences: sequences scored of each held-out text.
        evaluation: held-out texts by name; null is those of ``benchmarks.recovery``.
        seed: of weights and data order.
        compile: compile blocks and loss; pays on a GPU.
        precision: of the Trainer; null is bf16-mixed with a GPU, else 32-true.
    """
    if (output / "config.json").exists():
        print(f"{output} is there")
        return
    seed_everything(seed, workers=True, verbose=False)
    text = Documents(training)
    if tokenizer is None:
        found = train_tokenizer(text.documents[::_DOCUMENTS_OF_TOKENIZER], vocabulary)
    else:
        found = tokenizer.tokenizer()
    config = GPT2Config(
        vocab_size=len(found),
        n_positions=length,
        n_embd=width,
        n_layer=depth,
        n_head=heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=found.bos_token_id,
        eos_token_id=found.eos_token_id,
    )
    with TemporaryDirectory() as start:
        GPT2LMHeadModel(config).save_pretrained(start)
        found.save_pretrained(start)
        model = Pretrained(start)
        module = CausalLM(model, lr=lr, weight_decay=weight_decay, warmup_steps=warmup_steps, compile=compile)
        held_out = evaluation or {"docs": PythonDocs(), "libraries": PythonSources()}
        data = Epochs(model, text, held_out, length, batch_size, eval_sequences, seed)
        data.sequences = steps * batch_size
        losses = Losses()
        trainer = Trainer(
            max_steps=steps,
            accelerator="auto",
            devices=1,
            precision=precision or default_precision(),
            gradient_clip_val=1.0,
            callbacks=[losses, TQDMProgressBar(refresh_rate=max(1, steps // 100))],
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            val_check_interval=max(1, steps // _CHECKS),
            check_val_every_n_epoch=None,
        )
        trainer.fit(module, datamodule=data)
        tokens = len(data.tokens("training"))
    parameters = sum(parameter.numel() for parameter in module.model.parameters())
    note = (
        f"GPT-2, {parameters / 1e6:.1f} million parameters ({depth} blocks of width {width}, {len(found)} tokens), "
        f"{steps} steps of {batch_size} x {length} tokens, {steps * batch_size * length / tokens:.1f} times over "
        f"{tokens / 1e6:.1f} million tokens of {training.describe()}; AdamW, cosine from {lr}."
    )
    write_result(
        results, "recovery/second_model_training", "A second model, trained from scratch", losses.rows, note=note
    )
    module.model.config.use_cache = True
    module.model.save_pretrained(output)
    found.save_pretrained(output)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
