"""One token for each sequence, again and again: the CUDA graph that fills a cache of fixed size."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from prox24_lightning.integrations.transformers.decoding.cache import FixedCache
from prox24_lightning.integrations.transformers.decoding.decode_attention import NAME, UnknownAttentionError
from prox24_lightning.integrations.transformers.decoding.fused_blocks import FusedBlocks, fuse_blocks
from prox24_lightning.integrations.transformers.decoding.rotary import in_one_launch
from prox24_lightning.integrations.transformers.decoding.siblings import SiblingProjections
from prox24_lightning.utils.devices.cuda_graphs import capture

log = logging.getLogger(__name__)

_WARM_UPS = 2  # compile, plan, and allocate what libraries do at their first call; a cache has room for two tokens
_RECOMPILES = 64  # of a small operation; dynamo gives up after 8, and each batch size and class of layers takes one


class Decoder:
    """One token for each of ``batch`` sequences, again and again: a CUDA graph where there is a GPU.

    Args:
        model: a decoder-only model of transformers.
        batch: sequences.
        capacity: tokens that a sequence may have, prompt included.
        operations: the small operations that run compiled.
        siblings: the projections that run as one.
    """

    def __init__(
        self, model: Any, batch: int, capacity: int, operations: SmallOperations, siblings: SiblingProjections
    ) -> None:
        self._model = model
        self._operations = operations
        self._siblings = siblings
        self._cache = FixedCache(batch, capacity, model.device)
        self._token = torch.zeros(batch, 1, dtype=torch.long, device=model.device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits: Tensor | None = None
        self._captures = model.device.type == "cuda"

    def fill(self, cache: Any, lengths: Sequence[int]) -> None:
        """Begin with the tokens of a prompt: ``cache`` as the model filled it, ``lengths`` of each without padding."""
        self._cache.fill(cache, lengths)

    def logits(self, tokens: Tensor) -> Tensor:
        """The logits (batch, vocabulary) after ``tokens`` (batch,), valid until the next call."""
        self._token.copy_(tokens.unsqueeze(1))
        if self._captures and self._graph is None:
            self._capture()
        if self._graph is not None and self._logits is not None:
            self._graph.replay()
            return self._logits
        with self._fixed_attention():
            return self._siblings.run(self._step)

    def _step(self) -> Tensor:
        filled = (self._cache.position + 1).int().view(-1, 1, 1, 1)
        logits: Tensor = self._model(
            self._token,
            attention_mask=filled,
            position_ids=self._cache.position.unsqueeze(1),
            past_key_values=self._cache,
            use_cache=True,
        ).logits
        self._cache.position.add_(1)
        return logits[:, -1]

    def _capture(self) -> None:
        try:
            with self._fixed_attention():
                blocks = self._siblings.run(self._fused_blocks)
                with self._operations.compiled(dynamic=False):
                    self._graph = self._siblings.run(lambda: blocks.run(self._captured_step))
        except UnknownAttentionError:
            raise
        except Exception as error:  # models may do on the host whatever they like: any of it can end the capture
            self._captures = False
            log.warning("decoding was not captured as a CUDA graph and runs call by call: %s", error)

    def _fused_blocks(self) -> FusedBlocks:
        """Find the blocks that run in fewer launches; the cache stays as it is."""
        before = self._cache.position.clone()

        def step() -> Tensor:
            try:
                return self._step()
            finally:
                self._cache.position.copy_(before)

        return fuse_blocks(self._model, self._siblings, step, len(before))

    def _captured_step(self) -> torch.cuda.CUDAGraph:
        def step() -> None:
            self._logits = self._step()

        before = self._cache.position.clone()
        try:
            return capture(step, warm_ups=_WARM_UPS)
        finally:
            self._cache.position.copy_(before)

    @contextmanager
    def _fixed_attention(self) -> Iterator[None]:
        # Not by set_attn_implementation: parts of a model may have a config of their own, of the same class.
        before = [(config, config._attn_implementation) for config in _configs(self._model)]
        try:
            for config, _ in before:
                config._attn_implementation = NAME
            yield
        finally:
            for config, implementation in before:
                config._attn_implementation = implementation


def _configs(model: nn.Module) -> list[Any]:
    """Every config that a module of ``model`` holds and its parts, a whole before its parts."""
    found: dict[int, Any] = {}

    def add(config: Any) -> None:
        if isinstance(config, PretrainedConfig) and id(config) not in found:
            found[id(config)] = config
            for name in config.sub_configs:
                add(getattr(config, name, None))

    for module in model.modules():
        add(getattr(module, "config", None))
    return list(found.values())


class SmallOperations:
    """What stands between the projections of a model (norms, activations, the rotary embedding), compiled for a while.

    Args:
        model: nothing of it is changed but inside of :meth:`compiled`.
        enabled: False compiles nothing; an attribute, so that a compiler that fails is asked once.
    """

    def __init__(self, model: nn.Module, *, enabled: bool) -> None:
        self.enabled = enabled
        parts = [module for module in model.modules() if type(module).__name__.endswith(("Norm", "MLP"))]
        self._parts = [part for part in parts if part._compiled_call_impl is None]
        homes = (sys.modules[home] for home in sorted({type(part).__module__ for part in parts}))
        self._rotary = [(home, home.apply_rotary_pos_emb) for home in homes if hasattr(home, "apply_rotary_pos_emb")]
        self._made: dict[bool, tuple[list[Callable[..., Any]], list[Callable[..., Any]]]] = {}

    @contextmanager
    def compiled(self, *, dynamic: bool) -> Iterator[None]:
        """Inside, they run compiled: for one shape, or with ``dynamic`` for any number of tokens."""
        if not self.enabled:
            yield
            return
        if dynamic not in self._made:
            self._made[dynamic] = (
                [torch.compile(part._call_impl, dynamic=dynamic) for part in self._parts],
                [self._rotated(function, dynamic) for _, function in self._rotary],
            )
        calls, rotary = self._made[dynamic]
        try:
            for part, call in zip(self._parts, calls, strict=True):
                part._compiled_call_impl = call
            for (home, _), function in zip(self._rotary, rotary, strict=True):
                home.apply_rotary_pos_emb = function  # type: ignore[attr-defined]
            with torch._dynamo.config.patch(recompile_limit=max(_RECOMPILES, torch._dynamo.config.recompile_limit)):
                yield
        finally:
            for part in self._parts:
                part._compiled_call_impl = None
            for home, function in self._rotary:
                home.apply_rotary_pos_emb = function  # type: ignore[attr-defined]

    def _rotated(self, function: Callable[..., Any], dynamic: bool) -> Callable[..., Any]:
        compiled = torch.compile(function, dynamic=dynamic)
        return compiled if dynamic else in_one_launch(function, compiled)
