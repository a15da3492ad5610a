"""A small mixture of experts whose weights are one 3-D parameter for all, as in transformers 5."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, INNER, EXPERTS, CHOSEN = 8, 4, 4, 2


class Experts(nn.Module):
    """``transposed``: the matrices are stored as (in, out), as gpt-oss does."""

    def __init__(self, transposed: bool = False) -> None:
        super().__init__()
        self.num_experts, self.hidden_dim, self.intermediate_dim = EXPERTS, WIDTH, INNER
        self.is_transposed = transposed
        shapes = ((2 * INNER, WIDTH), (WIDTH, INNER))
        up, down = (torch.randn(EXPERTS, *(shape[::-1] if transposed else shape)) / 2 for shape in shapes)
        self.gate_up_proj, self.down_proj = nn.Parameter(up), nn.Parameter(down)

    def multiply(self, x: Tensor, weight: Tensor) -> Tensor:
        return x @ weight if self.is_transposed else F.linear(x, weight)

    def forward(self, hidden: Tensor, index: Tensor, shares: Tensor) -> Tensor:
        result = torch.zeros_like(hidden)
        for expert in range(EXPERTS):
            token, place = torch.where(index == expert)
            if len(token):
                gate, up = self.multiply(hidden[token], self.gate_up_proj[expert]).chunk(2, -1)
                out = self.multiply(F.silu(gate) * up, self.down_proj[expert])
                result = result.index_add(0, token, out * shares[token, place, None])
        return result


class Mixture(nn.Module):
    def __init__(self, transposed: bool = False) -> None:
        super().__init__()
        self.router = nn.Parameter(torch.randn(EXPERTS, WIDTH))
        self.proj = nn.Linear(WIDTH, WIDTH)
        self.experts = Experts(transposed)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        shares, index = (x @ self.router.T).softmax(-1).topk(CHOSEN, -1)
        return index, shares

    def forward(self, x: Tensor) -> Tensor:
        flat = self.proj(x).flatten(0, -2)
        return x + self.experts(flat, *self.route(flat)).view_as(x)


class MixtureModel(nn.Module):
    def __init__(self, blocks: int = 2, transposed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Mixture(transposed) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def expert_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.dim() == 3}
