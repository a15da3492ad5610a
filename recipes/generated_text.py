"""Text that a language model writes itself: training text that reminds it of what the user's own does not hold.

    python -m recipes.generated_text --output runs/generated.npy
    prox24 fit --config configs/causal_lm.yaml --data.generated runs/generated.npy

Each sequence begins with a token drawn uniformly and goes on by sampling at temperature 1, as in arXiv 2305.17888.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonargparse import auto_cli
from rich.progress import Progress
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList
from typing_extensions import override

from prox24_lightning.io.pretrained import Pretrained
from prox24_lightning.utils.files import replacing
from recipes.causal_lm import SMOLLM2


class _Advance(StoppingCriteria):
    """Stops nothing; moves the bar by one token."""

    def __init__(self, bar: Progress, task: Any) -> None:
        self._bar, self._task = bar, task

    @override
    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        self._bar.advance(self._task)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@torch.no_grad()
def generate_sequences(
    model: Any, count: int, length: int, *, batch_size: int = 1600, seed: int = 0, progress: bool = True
) -> np.ndarray:
    """Return ``count`` sequences that ``model`` samples: uint16 or int32 (count, length).

    A document may end in a sequence, and another begin.

    Args:
        model: a causal language model of transformers, in evaluation mode, on its device.
        count: sequences.
        length: tokens a sequence, at least 2.
        batch_size: sequences sampled at a time; keys and values of all their tokens are kept.
        seed: of the tokens that are drawn.
        progress: show a bar.

    Raises:
        ValueError: if ``count`` or ``batch_size`` is below 1 or ``length`` below 2.
    """
    if count < 1 or length < 2 or batch_size < 1:
        raise ValueError(
            f"count={count}, length={length}, batch_size={batch_size}: at least 1 sequence of 2 tokens, 1 at a time"
        )
    vocabulary = model.get_input_embeddings().num_embeddings
    dtype = np.uint16 if vocabulary <= 2**16 else np.int32
    found = np.empty((count, length), dtype)
    generator = torch.Generator().manual_seed(seed)
    gpus = [model.device] if model.device.type == "cuda" else []
    own, model.generation_config = model.generation_config, GenerationConfig()  # a penalty of repetition, say
    with Progress(disable=not progress, transient=True) as bar, torch.random.fork_rng(devices=gpus), ExitStack() as end:
        end.callback(setattr, model, "generation_config", own)
        torch.manual_seed(seed)
        task = bar.add_task("writing text", total=-(-count // batch_size) * (length - 1))
        for at in range(0, count, batch_size):
            first = torch.randint(vocabulary, (min(batch_size, count - at), 1), generator=generator).to(model.device)
            ids = model.generate(
                first,
                attention_mask=torch.ones_like(first),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=length - 1,
                eos_token_id=None,
                pad_token_id=0,
                use_cache=True,
                stopping_criteria=StoppingCriteriaList([_Advance(bar, task)]),
            )
            found[at : at + len(first)] = ids.cpu().numpy()
    return found


def main(
    model: Pretrained = SMOLLM2,
    output: Path = Path("runs/generated.npy"),
    sequences: int = 3200,
    length: int = 512,
    batch_size: int = 1600,
    seed: int = 0,
    device: str | None = None,
) -> None:
    """Let the model write, in bfloat16, and keep the tokens.

    Args:
        model: which causal language model; the dense one.
        output: file of the tokens, with the ending ``.npy``.
        sequences: how many.
        length: tokens a sequence.
        batch_size: sequences at a time.
        seed: of what is drawn.
        device: null is cuda if there is one, else cpu.
    """
    model.check_length(length)
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    network = model.model().to(place, torch.bfloat16).eval()
    tokens = generate_sequences(network, sequences, length, batch_size=batch_size, seed=seed)
    output.parent.mkdir(parents=True, exist_ok=True)
    with replacing(output.with_suffix(".npy")) as temporary:
        np.save(temporary, tokens)
    print(f"{output.with_suffix('.npy')}: {sequences} sequences of {length} tokens")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
