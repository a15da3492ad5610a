"""Make ``model.generate(...)`` of transformers as fast as the kernels: decoding is replayed from a CUDA graph.

Between two tokens transformers' loop keeps the GPU waiting for the host. :func:`accelerate_generation` keeps
``generate`` and its arguments and exchanges the loop inside: the prompt is read with a growing cache (flash attention,
no mask), then one CUDA graph for each batch size makes token after token on a cache of fixed size.
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from prox24_lightning.integrations.transformers.decode_attention import NAME, attention_forward

log = logging.getLogger(__name__)

CAPACITY_STEP = 512
"""Caches hold a multiple of so many tokens, so that prompts of different lengths share one graph."""
STEPS_BETWEEN_CHECKS = 16
"""Tokens that are made before the host looks whether all sequences have ended."""


def accelerate_generation(model: Any, *, compile: bool = True, graphs: int = 2) -> AcceleratedGeneration:
    """Let ``model.generate(...)`` replay CUDA graphs while it decodes; its arguments and results stay the same.

    Greedy search and sampling are accelerated, with any logits processor, left padding and end-of-sequence tokens. Beam
    search, assisted decoding, streamers, returned dictionaries, caches of the caller's and custom stopping criteria run
    as before. The first call for a batch size captures a graph (and compiles norms, rotary embedding and activations).

    Args:
        model: a decoder-only model of transformers whose layers all attend to the whole context, dense or converted. On
            a CPU the loop works without graphs.
        compile: compile the small operations between the projections with ``torch.compile``.
        graphs: how many batch sizes keep their graph and cache; the least recently used goes first.

    Returns:
        what ``remove()`` undoes.

    Raises:
        ValueError: for a model that cannot be decoded this way, with the reason.
    """
    if (reason := why_not(model)) is not None:
        raise ValueError(f"generation of {type(model).__name__} cannot be accelerated: {reason}")
    return AcceleratedGeneration(model, compile=compile, graphs=graphs)


def why_not(model: Any) -> str | None:
    """Why decoding of ``model`` cannot be captured; None if it can."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "generate"):
        return "it is no model of transformers with generate()"
    if config.is_encoder_decoder:
        return "it is an encoder-decoder"
    text = config.get_text_config(decoder=True)
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"} or (getattr(text, "sliding_window", None) and getattr(text, "use_sliding_window", True)):
        return f"its layers attend to parts of the context ({', '.join(sorted(kinds))})"
    if not getattr(model, "_supports_attention_backend", False):
        return "its attention does not go through transformers' attention interface"
    if len({parameter.device for parameter in model.parameters()}) > 1:
        return "it lies on several devices"
    return None


class AcceleratedGeneration:
    """The exchange of a model's ``generate``; :meth:`remove` takes it back."""

    def __init__(self, model: Any, *, compile: bool, graphs: int) -> None:
        self._model = model
        self._compile = compile
        self._graphs = graphs
        self._decoders: OrderedDict[tuple[Any, ...], _Decoder] = OrderedDict()
        AttentionInterface.register(NAME, attention_forward)
        AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)
        model.generate = MethodType(self._generate, model)

    def remove(self) -> None:
        """Give the model its own ``generate`` back, and free caches and graphs."""
        self._decoders.clear()
        vars(self._model).pop("generate", None)

    def _generate(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        ordinary = type(model).generate
        if (reason := _why_ordinary(model, args, kwargs)) is not None:
            log.info("generate() runs as transformers has it: %s", reason)
            return ordinary(model, *args, **kwargs)
        return ordinary(model, *args, custom_generate=self._decode, **kwargs)

    def _decode(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Tensor:
        """In the place of transformers' ``_sample``: the sequences, prompt included."""
        if any(type(criterion) not in (MaxLengthCriteria, EosTokenCriteria) for criterion in stopping_criteria):
            sample: Tensor = model._sample(
                input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs
            )
            return sample
        mask = model_kwargs.get("attention_mask")
        if mask is not None and bool(mask.all()):
            mask = None
        lengths = input_ids.new_full((len(input_ids),), input_ids.shape[1]) if mask is None else mask.sum(-1)
        cache = DynamicCache(config=model.config)
        positions = None if mask is None else (mask.long().cumsum(-1) - 1).clamp_min(0)
        prompt = {"attention_mask": mask, "position_ids": positions}
        logits = model(input_ids, past_key_values=cache, use_cache=True, **_last_logits(model), **prompt).logits
        longest = stopping_criteria.max_length
        decoder = self._decoder(model, len(input_ids), longest)
        decoder.fill(cache, lengths)
        del cache
        choose = _Choice(generation_config, logits_processor, input_ids, longest)
        tokens = choose(logits[:, -1])
        for step in range(1, longest - input_ids.shape[1]):
            tokens = choose(decoder.logits(tokens))
            if step % STEPS_BETWEEN_CHECKS == 0 and choose.finished():
                break
        return choose.sequences()

    def _decoder(self, model: Any, batch: int, longest: int) -> _Decoder:
        capacity = -(-longest // CAPACITY_STEP) * CAPACITY_STEP
        tensors = [*model.parameters(), *model.buffers()]
        # A graph reads the weights where they lay: converted, moved or cast ones need another.
        weights = hash(tuple((tensor.data_ptr(), tensor.dtype) for tensor in tensors))
        fits = [key for key in self._decoders if key[0] == batch and key[1] >= capacity and key[2] == weights]
        key = min(fits, default=(batch, capacity, weights))
        for stale in [other for other in self._decoders if other[2] != weights or (other[0] == batch and other != key)]:
            del self._decoders[stale]
        if key not in self._decoders:
            while len(self._decoders) >= self._graphs:
                self._decoders.popitem(last=False)
            self._decoders[key] = _Decoder(model, batch, capacity, compile=self._compile)
        self._decoders.move_to_end(key)
        return self._decoders[key]


def _why_ordinary(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Why this call of ``generate`` is left to transformers; None if it is accelerated."""
    for name in ("custom_generate", "assistant_model", "streamer", "past_key_values", "inputs_embeds", "synced_gpus"):
        if kwargs.get(name) is not None:
            return f"{name} was given"
    if len(args) > 2:
        return "arguments without names"
    given = dict(kwargs)
    config = args[1] if len(args) > 1 else given.pop("generation_config", None)
    config, _ = model._prepare_generation_config(config, **given)
    if config.return_dict_in_generate or config.use_cache is False:
        return "more than the sequences is asked for, or no cache"
    if config.get_generation_mode(None) not in ("greedy_search", "sample") or config.num_return_sequences != 1:
        return f"{config.get_generation_mode(None)} is not accelerated"
    if config.token_healing or config.cache_implementation not in (None, "dynamic", "static"):
        return f"cache_implementation={config.cache_implementation!r}"
    return None


class _Choice:
    """The next token of every sequence, as transformers chooses it, kept on the device."""

    def __init__(self, config: Any, processor: Any, prompt: Tensor, longest: int) -> None:
        self._config, self._processor = config, processor
        self._start = self._length = prompt.shape[1]
        self._sequences = prompt.new_zeros(len(prompt), longest)
        self._sequences[:, : self._start] = prompt
        ends = config._eos_token_tensor
        self._ends = None if ends is None else ends.to(prompt.device)
        pad = config._pad_token_tensor
        self._pad = None if pad is None else pad.to(prompt.device)
        self._open = torch.ones(len(prompt), dtype=torch.bool, device=prompt.device)

    def __call__(self, logits: Tensor) -> Tensor:
        """Choose by ``logits`` (batch, vocabulary); returns (batch,)."""
        scores = self._processor(self._sequences[:, : self._length], logits.float())
        if self._config.do_sample:
            tokens = torch.multinomial(scores.softmax(-1), 1).squeeze(1)
        else:
            tokens = scores.argmax(-1)
        if self._ends is not None:
            tokens = torch.where(self._open, tokens, self._pad) if self._pad is not None else tokens
            self._open = self._open & ~torch.isin(tokens, self._ends)
        self._sequences[:, self._length] = tokens
        self._length += 1
        return tokens

    def finished(self) -> bool:
        """Whether every sequence has ended; waits for the device."""
        return self._ends is not None and not bool(self._open.any())

    def sequences(self) -> Tensor:
        """Prompt and tokens, up to the last end."""
        if self._ends is None:
            return self._sequences[:, : self._length]
        made = self._sequences[:, self._start : self._length]
        ended = torch.isin(made, self._ends).long()
        first = torch.where(ended.any(-1), ended.argmax(-1) + 1, made.shape[1])
        return self._sequences[:, : self._start + int(first.max())]


class _FixedCache:
    """Keys and values of every layer in tensors of fixed size, written at each sequence's own position."""

    def __init__(self, batch: int, capacity: int, device: torch.device) -> None:
        self.capacity = capacity
        self.position = torch.zeros(batch, dtype=torch.long, device=device)
        self._rows = torch.arange(batch, device=device)
        self._layers: list[tuple[Tensor, Tensor]] = []

    def fill(self, cache: Any, lengths: Tensor) -> None:
        """Take the tokens of a prompt, without the padding on their left."""
        if not self._layers:
            for layer in cache.layers:
                self._layers.append(tuple(self._empty(part) for part in (layer.keys, layer.values)))  # type: ignore[arg-type]
        for mine, layer in zip(self._layers, cache.layers, strict=True):
            for kept, part in zip(mine, (layer.keys, layer.values), strict=True):
                for row, length in enumerate(lengths.tolist()):
                    kept[row, :length] = part[row, :, part.shape[2] - length :].transpose(0, 1)
        self.position.copy_(lengths)

    def _empty(self, part: Tensor) -> Tensor:
        batch, heads, _, features = part.shape
        return part.new_zeros(batch, self.capacity, heads, features)

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As transformers' caches: (batch, heads, 1, features) in, all positions out."""
        for kept, new in zip(self._layers[layer_idx], (keys, values), strict=True):
            kept[self._rows, self.position] = new[:, :, 0]
        kept_keys, kept_values = self._layers[layer_idx]
        return kept_keys.transpose(1, 2), kept_values.transpose(1, 2)

    def get_seq_length(self, *args: Any) -> int:
        """Positions are handed to the model, so that none has to be counted here."""
        return 0


class _Decoder:
    """One token for each of ``batch`` sequences, again and again: a CUDA graph where there is a GPU."""

    def __init__(self, model: Any, batch: int, capacity: int, *, compile: bool) -> None:
        self._model = model
        self._compile = compile
        self._cache = _FixedCache(batch, capacity, model.device)
        self._token = torch.zeros(batch, 1, dtype=torch.long, device=model.device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits: Tensor | None = None

    def fill(self, cache: Any, lengths: Tensor) -> None:
        self._cache.fill(cache, lengths)

    def logits(self, tokens: Tensor) -> Tensor:
        """The logits (batch, vocabulary) after ``tokens`` (batch,), valid until the next call."""
        self._token.copy_(tokens.unsqueeze(1))
        if not self._token.is_cuda:
            with _decoding(self._model, compile=False):
                return self._step()
        if self._graph is None:
            self._capture()
        if self._graph is None or self._logits is None:
            raise RuntimeError("decoding was not captured")
        self._graph.replay()
        return self._logits

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
        before = self._cache.position.clone()
        stream = torch.cuda.Stream()
        with _decoding(self._model, compile=self._compile):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):  # compiles, plans, and what libraries allocate at their first call
                    self._step()
                    self._cache.position.copy_(before)
            torch.cuda.current_stream().wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._logits = self._step()
        self._cache.position.copy_(before)


@contextmanager
def _decoding(model: Any, *, compile: bool) -> Iterator[None]:
    """Attention over a fixed cache, and, with ``compile``, the small operations compiled; both undone afterwards."""
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        if compile:
            with _small_operations_compiled(model):
                yield
        else:
            yield
    finally:
        model.set_attn_implementation(before)


@contextmanager
def _small_operations_compiled(model: nn.Module) -> Iterator[None]:
    """Norms, the parts of an MLP between its projections and the rotary embedding go through ``torch.compile``."""
    parts = [module for module in model.modules() if type(module).__name__.endswith(("Norm", "MLP"))]
    homes = {type(module).__module__ for module in parts}
    rotary = [
        (sys.modules[home], sys.modules[home].apply_rotary_pos_emb)
        for home in homes
        if hasattr(sys.modules[home], "apply_rotary_pos_emb")
    ]
    parts = [module for module in parts if module._compiled_call_impl is None]
    try:
        for part in parts:
            part.compile(dynamic=False)
        for home, function in rotary:
            home.apply_rotary_pos_emb = torch.compile(function, dynamic=False)  # type: ignore[attr-defined]
        yield
    finally:
        for home, function in rotary:
            home.apply_rotary_pos_emb = function  # type: ignore[attr-defined]
        for part in parts:
            part._compiled_call_impl = None


def _last_logits(model: Any) -> dict[str, int]:
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
