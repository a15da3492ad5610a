"""Make ``model.generate(...)`` of transformers as fast as the kernels: decoding is replayed from a CUDA graph.

Between two tokens transformers' loop keeps the GPU waiting for the host. :func:`accelerate_generation` keeps
``generate`` and its arguments and exchanges the loop inside: the prompt is read with a growing cache (flash attention,
no mask), then one CUDA graph for each batch size makes token after token on a cache of fixed size.
"""

from __future__ import annotations

import inspect
import logging
from collections import OrderedDict
from contextlib import nullcontext
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from prox24_lightning.calibration.calls.random_state import RandomState
from prox24_lightning.integrations.transformers.decoding.captured_decoder import Decoder, SmallOperations
from prox24_lightning.integrations.transformers.decoding.decode_attention import NAME, attention_forward
from prox24_lightning.integrations.transformers.decoding.siblings import SiblingProjections
from prox24_lightning.utils.errors import describe

log = logging.getLogger(__name__)

CAPACITY_STEP = 512
"""Caches hold a multiple of so many tokens, so that prompts of different lengths share one graph."""
_UNDERSTOOD = frozenset(
    {"attention_mask", "position_ids", "past_key_values", "cache_position", "use_cache", "logits_to_keep"}
)
"""Arguments of the model that this loop makes itself; images, token types and the like are left to transformers."""
_CHANGING = frozenset({"dynamic", "longrope"})
STEPS_BETWEEN_CHECKS = 16
"""Tokens that are made before the host looks whether all sequences have ended."""
_PARTS = 64  # of the vocabulary, whose largest scores are found side by side


def accelerate_generation(
    model: Any, *, compile: bool = True, fuse: bool = True, graphs: int = 2
) -> AcceleratedGeneration:
    """Let ``model.generate(...)`` replay CUDA graphs while it decodes; its arguments and results stay the same.

    Greedy search and sampling are accelerated, with any logits processor, left padding and end-of-sequence tokens. Beam
    search, assisted decoding, streamers, returned dictionaries, caches of the caller's, custom stopping criteria and
    padding that is not on the left run as before, and so does, after one warning, what this loop turns out not to know
    (attention with sinks, caps or biases, masks and caches of a model's own). The first call for a batch size captures
    a graph (and compiles norms, rotary embedding and activations).

    Args:
        model: a decoder-only model of transformers whose layers all attend to the whole context, dense or converted. On
            a CPU the loop works without graphs.
        compile: compile the small operations between the projections with ``torch.compile``.
        fuse: make one product of the layers that read the same input (query, key and value; gate and up). Dense
            weights move into one tensor, which the parameters then view; packed ones are copied, which takes as much
            memory again. Layers with hooks, adapters or tied weights run one by one. On a GPU with Triton, blocks of
            LLaMA's shape whose layers have 8 bits also add, normalise and round their tokens by one launch; the blocks
            are compared with what they were first, and tokens are rounded as before, so that those which
            ``generate`` returns differ only where two have nearly the same logit.
        graphs: how many batch sizes keep their graph and cache; the least recently used goes first.

    Returns:
        what ``remove()`` undoes.

    Raises:
        ValueError: for a model that cannot be decoded this way, with the reason.
    """
    if (reason := why_not(model)) is not None:
        raise ValueError(f"generation of {type(model).__name__} cannot be accelerated: {reason}")
    return AcceleratedGeneration(model, compile=compile, fuse=fuse, graphs=graphs)


def why_not(model: Any) -> str | None:
    """Return why decoding of ``model`` cannot be captured; None if it can."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "generate"):
        return "it is no model of transformers with generate()"
    if config.is_encoder_decoder:
        return "it is an encoder-decoder"
    text = config.get_text_config(decoder=True)
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    sliding = getattr(text, "sliding_window", None) and getattr(text, "use_sliding_window", True)
    if kinds != {"full_attention"} or sliding:
        return f"its layers attend to parts of the context ({', '.join(sorted(kinds))})"
    if changing := _rotary_kinds(text) & _CHANGING:
        return f"its rotary embedding changes with the number of tokens ({', '.join(sorted(changing))})"
    if not getattr(model, "_supports_attention_backend", False):
        return "its attention does not go through transformers' attention interface"
    if len({parameter.device for parameter in model.parameters()}) > 1:
        return "it lies on several devices"
    return None


def _rotary_kinds(config: Any) -> set[str]:
    """The kinds of rotary embedding in a config, which may have one for each kind of layer."""
    given = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    each = [given, *(part for part in given.values() if isinstance(part, dict))]
    return {str(part.get("rope_type", part.get("type"))) for part in each}


class AcceleratedGeneration:
    """The exchange of a model's ``generate``; :meth:`remove` takes it back."""

    def __init__(self, model: Any, *, compile: bool, fuse: bool, graphs: int) -> None:
        self._model = model
        # A CPU has no launches to save.
        self._operations = SmallOperations(model, enabled=compile and model.device.type == "cuda")
        self._siblings = SiblingProjections(enabled=fuse)
        self._graphs = graphs
        self._given_up: str | None = None
        self._decoders: OrderedDict[tuple[Any, ...], Decoder] = OrderedDict()
        AttentionInterface.register(NAME, attention_forward)
        AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)
        model.generate = MethodType(self._generate, model)

    def remove(self) -> None:
        """Give the model its own ``generate`` back, and free caches, graphs and joined weights."""
        self._decoders.clear()
        self._siblings.release()
        vars(self._model).pop("generate", None)

    def _generate(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        ordinary = type(model).generate
        if (reason := self._given_up or _why_ordinary(model, args, kwargs)) is not None:
            log.info("generate() runs as transformers has it: %s", reason)
            return ordinary(model, *args, **kwargs)
        # Caches outlive the call, and the mode it is made in; kernels and captures go to the current device.
        device = torch.cuda.device(model.device) if model.device.type == "cuda" else nullcontext()
        with torch.inference_mode(False), torch.no_grad(), device:
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
        """Return the sequences, prompt included, in the place of transformers' ``_sample``."""
        mask = model_kwargs.get("attention_mask")
        others = {name for name, value in model_kwargs.items() if value is not None} - _UNDERSTOOD
        known = not others and all(
            type(criterion) in (MaxLengthCriteria, EosTokenCriteria) for criterion in stopping_criteria
        )
        padding = None if mask is None else (mask != 0).long()  # masks of numbers too
        # The cache is filled without padding, which has to be on the left.
        if not known or (padding is not None and bool((padding[:, 1:] < padding[:, :-1]).any())):
            return self._sample(model, input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs)
        before = RandomState.now(model.device)
        try:
            return self._accelerated(model, input_ids, padding, logits_processor, stopping_criteria, generation_config)
        except Exception as error:  # what transformers' own loop can do ends no generation
            self._decoders.clear()
            problem = describe(error)
            memory = isinstance(error, torch.OutOfMemoryError)
        before.restore(model.device)
        found = self._sample(model, input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs)
        # Now it is known that transformers can.
        log.warning("generate() of %s runs as transformers has it: %s", type(model).__name__, problem)
        self._given_up = None if memory else problem
        return found

    @staticmethod
    def _sample(model: Any, *arguments: Any) -> Tensor:
        *given, model_kwargs = arguments
        found: Tensor = model._sample(*given, **model_kwargs)
        return found

    def _accelerated(
        self,
        model: Any,
        input_ids: Tensor,
        mask: Tensor | None,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
    ) -> Tensor:
        if mask is not None and bool(mask.all()):
            mask = None
        batch, tokens = input_ids.shape
        # Asked for now: behind the prompt the host would wait for the device.
        lengths = [tokens] * batch if mask is None else mask.sum(-1).tolist()
        positions = None if mask is None else (mask.long().cumsum(-1) - 1).clamp_min(0)
        logits, cache = self._prompt(model, input_ids, attention_mask=mask, position_ids=positions)
        longest = stopping_criteria.max_length
        choose = _Choice(generation_config, logits_processor, input_ids, longest)
        chosen = choose(logits[:, -1])
        if longest - tokens > 1:
            decoder = self._decoder(model, batch, longest)
            decoder.fill(cache, lengths)
            del cache
            for step in range(1, longest - tokens):
                chosen = choose(decoder.logits(chosen))
                if step % STEPS_BETWEEN_CHECKS == 0 and choose.finished():
                    break
        return choose.sequences()

    def _prompt(self, model: Any, input_ids: Tensor, **given: Any) -> tuple[Tensor, Any]:
        """Return the logits of a prompt and its cache; layers that read one input are one product here too."""

        def call() -> tuple[Tensor, Any]:
            cache = DynamicCache(config=model.config)  # a new one: what fails half way has filled it
            return model(input_ids, past_key_values=cache, use_cache=True, **given, **_last_logits(model)).logits, cache

        def compiled() -> tuple[Tensor, Any]:
            try:
                with self._operations.compiled(dynamic=True):
                    return call()
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # of the compiler: what it could not do runs as it is
                if not self._operations.enabled:
                    raise
                log.warning("the small operations of %s are not compiled: %s", type(model).__name__, error)
                self._operations.enabled = False
            return call()

        self._siblings.refresh(model)
        return self._siblings.run(compiled)

    def _decoder(self, model: Any, batch: int, longest: int) -> Decoder:
        capacity = -(-longest // CAPACITY_STEP) * CAPACITY_STEP
        # A graph reads the weights where they lay: converted, moved or cast ones need another.
        weights = self._siblings.refresh(model)
        fits = [key for key in self._decoders if key[0] == batch and key[1] >= capacity and key[2] == weights]
        key = min(fits, default=(batch, capacity, weights))
        for stale in [other for other in self._decoders if other[2] != weights or (other[0] == batch and other != key)]:
            del self._decoders[stale]
        if key not in self._decoders:
            while len(self._decoders) >= self._graphs:
                self._decoders.popitem(last=False)
            self._decoders[key] = Decoder(model, batch, capacity, self._operations, self._siblings)
        self._decoders.move_to_end(key)
        return self._decoders[key]


def _why_ordinary(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Why this call of ``generate`` is left to transformers; None if it is accelerated."""
    caller = ("custom_generate", "assistant_model", "streamer", "past_key_values", "inputs_embeds", "position_ids")
    for name in (*caller, "synced_gpus"):
        if kwargs.get(name) is not None:
            return f"{name} was given"
    if len(args) > 2:
        return "arguments without names"
    given = dict(kwargs)
    config = args[1] if len(args) > 1 else given.pop("generation_config", None)
    config, _ = model._prepare_generation_config(config, **given)
    if config.return_dict_in_generate or config.use_cache is False:
        return "more than the sequences is asked for, or no cache"
    mode = config.get_generation_mode(None).value
    if mode not in ("greedy_search", "sample") or config.num_return_sequences not in (None, 1):
        return f"{mode} is not accelerated"
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
        draw = self._config.do_sample
        tokens = torch.multinomial(scores.softmax(-1), 1).squeeze(1) if draw else _largest(scores)
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


def _largest(scores: Tensor) -> Tensor:
    """Return ``scores.argmax(-1)`` of (batch, vocabulary), for which torch gives a sequence one block of a GPU."""
    batch, vocabulary = scores.shape
    if vocabulary % _PARTS:
        return scores.argmax(-1)
    most, place = scores.reshape(batch, _PARTS, -1).max(-1)
    part = most.argmax(-1, keepdim=True)
    return (part * (vocabulary // _PARTS) + place.gather(1, part)).squeeze(1)


def _last_logits(model: Any) -> dict[str, int]:
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
