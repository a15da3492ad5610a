"""Parameters as an optimizer takes them: embeddings, which 2:4 leaves as they are, with a rate of their own."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from prox24_lightning.weights.heads import output_heads


def parameter_groups(
    model: nn.Module, *, lr: float, weight_decay: float = 0.01, embedding_lr: float = 0.1
) -> list[dict[str, Any]]:
    """Return the parameters that train, as groups for ``torch.optim.AdamW`` and the like.

    Pruned weights need a larger rate to recover than a dense model takes. Embeddings are not pruned and have nothing to
    recover, and Adam moves each of their rows by about the rate in every step, however small its gradient: with a tied
    head, whose softmax has a gradient for every token, a text moves the rows of the tokens that are not in it. So what
    the model knew of other texts is lost.

    Args:
        model: any module.
        lr: the rate.
        weight_decay: of parameters with two dimensions and more; biases and normalisation weights get none.
        embedding_lr: rate of embeddings and of the output head over the same tokens, tied or not, relative to ``lr``: 0
            keeps them as they are, 1 makes no difference.

    Returns:
        groups of matrices, of vectors, and of embeddings; empty ones are left out.

    Raises:
        ValueError: if ``embedding_lr`` is negative or not finite.
    """
    if not 0 <= embedding_lr < math.inf:
        raise ValueError(
            f"embedding_lr={embedding_lr} must be finite and not negative: it is relative to lr, and 0 trains none"
        )
    apart = _embeddings(model) if embedding_lr != 1 else set()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rest = [parameter for parameter in trained if parameter not in apart]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in rest if p.dim() >= 2], "lr": lr, "weight_decay": weight_decay},
        {"params": [p for p in rest if p.dim() < 2], "lr": lr, "weight_decay": 0.0},
        {"params": [p for p in trained if p in apart], "lr": embedding_lr * lr, "weight_decay": weight_decay},
    ]
    return [group for group in groups if group["params"]]


def _embeddings(model: nn.Module) -> set[Tensor]:
    """Return the weights of embeddings, and of output heads that have as many rows and columns as one of them."""
    modules = [module for module in model.modules() if isinstance(module, (nn.Embedding, nn.EmbeddingBag))]
    tables = {parameter for module in modules for parameter in module.parameters()}  # parametrized ones too
    shapes = {module.weight.shape for module in modules}
    heads = (weight for head in output_heads(model) for weight in head.parameters(recurse=False))
    return tables | {weight for weight in heads if weight.shape in shapes}
