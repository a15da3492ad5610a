"""Decoder blocks of 8 bits in fewer launches: residual, norm and the rounding of tokens are one, so are SiLU and its.

A block of LLaMA's shape (norm, attention, norm, gated MLP with SiLU) leaves the sum of its output and the residual to
the norm behind it. Which blocks have this shape is not taken from their class: each is run both ways on the first
token that is decoded, and stays as it is where the results differ by more than rounding.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from typing import Any, TypeVar

from torch import Tensor, nn

from prox24_lightning.convert.kernels.round_tokens.kernel import Rounding
from prox24_lightning.convert.layers.semi_structured_linear import SemiStructuredLinear
from prox24_lightning.integrations.transformers.decoding.join_layers import KINDS, has_hooks
from prox24_lightning.integrations.transformers.decoding.rounded_inputs import add_norm, silu_multiply
from prox24_lightning.integrations.transformers.decoding.siblings import SiblingGroup, SiblingProjections

log = logging.getLogger(__name__)

T = TypeVar("T")

_PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_MLP_PARTS = {"gate_proj", "up_proj", "down_proj", "act_fn"}
_BLOCK_TOLERANCE = 0.03  # of what a block adds; rounding to float8 in another order changes less than a hundredth
_ROUNDING = 2.0**-8  # of a block's output in bfloat16
_STEP_TOLERANCE = 0.3  # of the logits: rounding grows from block to block, and other values differ by more than all


class FusedBlocks:
    """The blocks of a model that :meth:`run` runs in fewer launches."""

    def __init__(self, blocks: Sequence[_Block] = (), last: _LastNorm | None = None) -> None:
        self._blocks = list(blocks)
        self._last = last

    def __len__(self) -> int:
        return len(self._blocks)

    def run(self, call: Callable[[], T]) -> T:
        """Return ``call()`` with fused blocks; without them, and from then on, if only that works."""
        problem = None
        try:
            with self._attached():
                return call()
        except Exception as error:
            if not self._blocks:
                raise
            problem = error
        found = call()
        _warn(f"decoder blocks run part by part: {problem}")
        self._blocks, self._last = [], None
        return found

    @contextmanager
    def _attached(self) -> Iterator[None]:
        parts = [*self._blocks, *([self._last] if self._last else [])]
        try:
            for part in parts:
                part.attach()
            yield
        finally:
            for part in parts:
                part.detach()


def fuse_blocks(model: nn.Module, siblings: SiblingProjections, step: Callable[[], Tensor], tokens: int) -> FusedBlocks:
    """Return the blocks of a model that run in fewer launches, each compared with the block as it is.

    Args:
        model: a decoder-only model of transformers.
        siblings: its joined projections, which are answering now.
        step: decodes a token and returns the logits; each call does the same.
        tokens: how many are decoded at a time.
    """
    stream = _Stream()
    blocks = [block for layer in model.modules() if (block := _block(layer, siblings, tokens, stream)) is not None]
    if not blocks:
        return FusedBlocks()
    try:
        return _checked(model, blocks, stream, step)
    except Exception as error:  # of Triton's compiler, which is not installed everywhere, or of the model
        _warn(f"decoder blocks run part by part: {error}")
        return FusedBlocks()


class _Stream:
    """What a block leaves to the norm behind it: the residual, beside the update that is handed on."""

    def __init__(self) -> None:
        self._left: tuple[Tensor, Tensor] | None = None

    def leave(self, residual: Tensor, update: Tensor) -> Tensor:
        self._left = residual, update
        return update

    def take(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the residual and the update that ``hidden`` stands for."""
        left, self._left = self._left, None
        return left if left is not None and left[1] is hidden else (hidden, None)


@dataclass(frozen=True, eq=False)
class _Call:
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


@dataclass(eq=False)
class _Norm:
    """An RMS norm and how the product behind it wants its tokens."""

    weight: Tensor
    epsilon: float
    rounding: Rounding | None

    def __call__(self, residual: Tensor, update: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        return add_norm(residual, update, self.weight, self.epsilon, self.rounding)


@dataclass(eq=False)
class _Replaced:
    """A module whose forward is another one for a while, and is not compiled."""

    module: nn.Module
    stream: _Stream
    compiled: Any = field(default=None, init=False)

    def attach(self) -> None:
        self.compiled, self.module._compiled_call_impl = self.module._compiled_call_impl, None
        vars(self.module)["forward"] = self.forward

    def detach(self) -> None:
        vars(self.module).pop("forward", None)
        self.module._compiled_call_impl = self.compiled

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        raise NotImplementedError


@dataclass(eq=False)
class _Block(_Replaced):
    """A decoder block; ``open`` leaves the last sum to the norm behind it."""

    before: _Norm
    after: _Norm
    attention: SiblingGroup | None
    gates: SemiStructuredLinear
    down: SemiStructuredLinear
    down_rounding: Rounding
    tokens: int
    open: bool = False

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        residual, update = self.stream.take(hidden_states)
        normed, residual, rounded = self.before(residual, update)
        if self.attention is not None and rounded is not None:
            self.attention.offer(normed, rounded)
        attend: Any = self.module.self_attn
        update = attend(hidden_states=normed, **kwargs)[0]
        _, residual, rounded = self.after(residual, update)
        assert rounded is not None
        both = self.gates.multiply_rounded(rounded, self.tokens)
        update = self.down.multiply_rounded(silu_multiply(both, self.down_rounding), self.tokens).view_as(residual)
        return self.stream.leave(residual, update) if self.open else residual + update


@dataclass(eq=False)
class _LastNorm(_Replaced):
    """The norm behind the last block."""

    norm: _Norm

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        residual, update = self.stream.take(hidden_states)
        return self.norm(residual, update)[0]


def _block(layer: Any, siblings: SiblingProjections, tokens: int, stream: _Stream) -> _Block | None:
    """Return a block of this shape whose gated MLP has 8 bits; None for any other module."""
    if (
        set(layer._modules) != _PARTS
        or set(layer.mlp._modules) != _MLP_PARTS
        or any(map(has_hooks, (layer, layer.mlp)))
    ):
        return None
    gates, down = siblings.group_of(layer.mlp.gate_proj), layer.mlp.down_proj
    if gates is None or gates.members != (layer.mlp.gate_proj, layer.mlp.up_proj) or has_hooks(down):
        return None
    if type(down) not in KINDS or "SiLU" not in type(layer.mlp.act_fn).__name__:
        return None
    attention = next((group for part in layer.self_attn.children() if (group := siblings.group_of(part))), None)
    whole, wanted = gates.whole, _rounding(gates.whole, tokens)
    down_wanted = _rounding(down, tokens)
    if not isinstance(whole, SemiStructuredLinear) or wanted is None or down_wanted is None:
        return None
    before = _norm(layer.input_layernorm, None if attention is None else _rounding(attention.whole, tokens))
    after = _norm(layer.post_attention_layernorm, wanted)
    if before is None or after is None or {before.weight.dtype, after.weight.dtype} != {whole.dtype}:
        return None
    return _Block(layer, stream, before, after, attention, whole, down, down_wanted, tokens)


def _norm(module: Any, rounding: Rounding | None) -> _Norm | None:
    """Return an RMS norm; None for another module."""
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not type(module).__name__.endswith("RMSNorm") or not isinstance(epsilon, float) or has_hooks(module):
        return None
    names = [name for name, _ in module.named_parameters()]
    return _Norm(module.weight.detach(), epsilon, rounding) if names == ["weight"] else None


def _rounding(layer: Any, tokens: int) -> Rounding | None:
    return layer.rounding(tokens) if isinstance(layer, SemiStructuredLinear) else None


def _checked(model: nn.Module, blocks: Sequence[_Block], stream: _Stream, step: Callable[[], Tensor]) -> FusedBlocks:
    """Compare each block with the block as it is, and all of them with the whole model."""
    inside = {id(part) for block in blocks for part in block.module.modules()}
    norms = [
        _LastNorm(module, stream, norm)
        for module in model.modules()
        if id(module) not in inside and (norm := _norm(module, None)) is not None
    ]
    every: list[_Block | _LastNorm] = [*blocks, *norms]
    calls: list[_Call] = []
    hooks = [
        part.module.register_forward_hook(lambda *given: calls.append(_Call(*given)), with_kwargs=True)
        for part in every
    ]
    try:
        expected = step().clone()
    finally:
        for handle in hooks:
            handle.remove()
    parts = {id(part.module): part for part in every}
    times = Counter(id(call.module) for call in calls)
    fused = [call for call in calls if times[id(call.module)] == 1 and _allows(parts[id(call.module)], call)]
    last: _LastNorm | None = None
    for one, other in pairwise(fused):
        part, behind = parts[id(one.module)], parts[id(other.module)]
        if isinstance(part, _Block) and other.args[0] is one.output:
            part.open = True
            last = behind if isinstance(behind, _LastNorm) else last
    kept = [part for call in fused if isinstance(part := parts[id(call.module)], _Block)]
    found = FusedBlocks(kept, last)
    with found._attached():
        logits = step()
    if kept and not float((logits - expected).float().norm()) <= _STEP_TOLERANCE * float(expected.float().norm()):
        log.info("decoder blocks of %s run part by part: fused, the logits are others", type(model).__name__)
        return FusedBlocks()
    return found


def _allows(part: _Block | _LastNorm, call: _Call) -> bool:
    """Whether a call of a module is one that its part answers, and a block's with the same result."""
    if len(call.args) != 1 or not all(isinstance(tensor, Tensor) for tensor in (*call.args, call.output)):
        return False
    if isinstance(part, _LastNorm):
        return True
    hidden, expected = call.args[0].float(), call.output.float()
    difference = part.forward(call.args[0], **call.kwargs).float() - expected
    same = difference.norm() <= _BLOCK_TOLERANCE * (expected - hidden).norm() + _ROUNDING * expected.norm()
    if not same:
        log.info("a %s runs part by part: fused, its result is another", type(call.module).__name__)
    return bool(same)


@cache
def _warn(text: str) -> None:
    """Warn once a process: each batch size has a graph of its own."""
    log.warning("%s", text)
