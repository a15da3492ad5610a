"""The same in ``transformers.Trainer``: ``python -m recipes.hugging_face`` trains a byte-level Llama offline.

A dense run comes first; the second one goes on from its weights, becomes 2:4, and learns from the dense model.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from jsonargparse import auto_cli
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from prox24_lightning import DistillationTrainerCallback, Prox24TrainerCallback, SparsityMonitorTrainerCallback
from recipes.stdlib_text import stdlib_documents, stdlib_held_out


class ByteBlocks(Dataset):
    """Blocks of ``length`` bytes of the texts, one after the other, as inputs and labels."""

    def __init__(self, texts: Sequence[str], length: int) -> None:
        data = torch.frombuffer(bytearray("\n\n".join(texts).encode()), dtype=torch.uint8).long()
        self.blocks = data[: len(data) // length * length].view(-1, length)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.blocks[index], "labels": self.blocks[index]}


def tiny_llama(width: int, depth: int) -> LlamaForCausalLM:
    """Return a Llama over bytes, with new weights."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=depth,
        num_attention_heads=4,
        max_position_embeddings=1024,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def main(
    output: str = "runs/hugging_face",
    dense_steps: int = 300,
    sparse_steps: int = 300,
    batch_size: int = 16,
    length: int = 128,
    width: int = 128,
    depth: int = 4,
    lr: float = 1e-3,
    seed: int = 0,
) -> dict[str, float]:
    """Train dense, then sparse from there; return both losses on held-out text, in nats a byte.

    Args:
        output: folder of logs, checkpoints, ``sparsity.png``, and the two models.
        dense_steps: optimizer steps of the dense run.
        sparse_steps: optimizer steps of the run that becomes 2:4.
        batch_size: blocks a step.
        length: bytes a block.
        width: hidden size of the model; must divide by 16.
        depth: number of its blocks.
        lr: peak learning rate of the dense run; the sparse one has a third of it.
        seed: of weights and order.
    """
    torch.manual_seed(seed)
    held_out = stdlib_held_out(0.05)
    train = ByteBlocks([text.text for text in stdlib_documents() if text.name not in held_out], length)
    test = ByteBlocks([text.text for text in stdlib_documents() if text.name in held_out], length)
    test.blocks = test.blocks[:512]

    def arguments(name: str, steps: int, rate: float) -> TrainingArguments:
        return TrainingArguments(
            f"{output}/{name}",
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            learning_rate=rate,
            lr_scheduler_type="cosine",
            warmup_steps=min(20, steps // 4),
            logging_steps=max(1, steps // 20),
            save_strategy="no",
            report_to=[],
            seed=seed,
        )

    trainer = Trainer(tiny_llama(width, depth), arguments("dense", dense_steps, lr), train_dataset=train)
    trainer.train()
    dense = trainer.evaluate(test)["eval_loss"]
    trainer.save_model(f"{output}/dense")

    prox24 = Prox24TrainerCallback()
    model = copy.deepcopy(trainer.model)
    trainer = Trainer(model, arguments("sparse", sparse_steps, lr / 3), train_dataset=train, callbacks=[prox24])
    # These work with the trainer, and so are added to it.
    trainer.add_callback(DistillationTrainerCallback(trainer))
    trainer.add_callback(SparsityMonitorTrainerCallback(trainer, max(1, sparse_steps // 20)))
    trainer.train()
    sparse = trainer.evaluate(test)["eval_loss"]
    trainer.save_model(f"{output}/sparse")
    print(f"held-out loss: dense {dense:.3f}, 2:4 {sparse:.3f} nats a byte; next: prox24 doctor {output}/sparse")
    return {"dense": dense, "sparse": sparse}


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
