"""Whole models, dense and converted, for :mod:`benchmarks.convert`: LLaMA's shapes, random 2:4 weights, bfloat16.

Each model runs as transformers has it; with its small operations compiled by torch (norms, rotary embedding, what
stands between the projections); and so with attention by torch's flash kernel, which takes grouped keys as they are
where transformers repeats them and hands over a mask. The last is nearest to how models are served.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.result_files import write_result
from prox24_lightning.convert import SemiStructuredLinear, convert_model
from prox24_lightning.convert.autotune.kernel_table import KernelTable
from prox24_lightning.convert.measurement import relative_error, release_memory, time_calls
from prox24_lightning.mask import mask_24
from prox24_lightning.utils.devices.cuda_graphs import capture
from prox24_lightning.utils.errors import describe

MODELS: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4},
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
}
_KEY_VALUE_HEADS = {"tiny": 2, "1B": 8, "8B": 8}
_VOCABULARY = {"tiny": 64, "1B": 128256, "8B": 128256}
_CONTEXT = 256
_LONGEST = 8192
_FEW = 256  # up to so many tokens a layer waits for its weight
_BYTES, _PRODUCTS = 0.5625, 0.5  # what sparsity leaves of them
_GROUPED = "benchmark_grouped_keys"  # a name with "flash" in it would send transformers to the hub


def build(name: str, device: torch.device, layers: int | None = None) -> nn.Module:
    """A LLaMA of random 2:4 weights in bfloat16, of ``layers`` layers; its head and embedding are dense."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=_VOCABULARY[name],
        num_key_value_heads=_KEY_VALUE_HEADS[name],
        max_position_embeddings=_LONGEST,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
        **MODELS[name] | ({} if layers is None else {"num_hidden_layers": layers}),
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            model = LlamaForCausalLM(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)
    for layer in decoder_layers(model).values():
        layer.weight.mul_(mask_24(layer.weight))
    return model


def decoder_layers(model: nn.Module) -> dict[str, nn.Linear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.startswith("model.layers")}


def decode_step(model: nn.Module, batch: int, device: torch.device) -> Callable[[], Tensor]:
    """One token each of ``batch`` sequences, half a static cache of context behind them."""
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=_CONTEXT)
    half = _CONTEXT // 2
    ids = torch.randint(model.config.vocab_size, (batch, 1), device=device)
    mask = torch.zeros(batch, 1, 1, _CONTEXT, dtype=torch.bool, device=device)
    mask[..., : half + 1] = True
    position = torch.full((1,), half, device=device)

    def step() -> Tensor:
        for layer in cache.layers:  # newer versions of transformers count the tokens there, and every call adds one
            if isinstance(counted := getattr(layer, "cumulative_length", None), Tensor):
                counted.fill_(half)
        given = {"past_key_values": cache, "cache_position": position, "position_ids": position[None]}
        logits: Tensor = model(ids, attention_mask=mask, use_cache=True, **given).logits
        return logits

    return step


def prefill(model: nn.Module, tokens: int, device: torch.device) -> Callable[[], Tensor]:
    """A prompt of ``tokens`` tokens, the logits of its last one."""
    ids = torch.randint(model.config.vocab_size, (1, tokens), device=device)

    def read() -> Tensor:
        logits: Tensor = model(ids, use_cache=False, logits_to_keep=1).logits
        return logits

    return read


@contextmanager
def small_operations_compiled(model: nn.Module) -> Iterator[None]:
    """Norms, rotary embedding and the parts between the projections of an MLP go through ``torch.compile``."""
    from transformers.models.llama import modeling_llama

    rotary = modeling_llama.apply_rotary_pos_emb
    kinds = modeling_llama.LlamaRMSNorm, modeling_llama.LlamaMLP
    parts = [module for module in model.modules() if isinstance(module, kinds)]
    torch._dynamo.reset()
    try:
        for part in parts:
            part.compile(dynamic=False)
        modeling_llama.apply_rotary_pos_emb = torch.compile(rotary, dynamic=False)
        yield
    finally:
        modeling_llama.apply_rotary_pos_emb = rotary
        for part in parts:
            part._compiled_call_impl = None


@contextmanager
def flash_attention(model: nn.Module) -> Iterator[None]:
    """Attention by torch's flash kernel: over the tokens of the cache that are filled, or causal over a prompt."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(_GROUPED, _flash)
    AttentionMaskInterface.register(_GROUPED, lambda *_args, **_kwargs: None)
    before = model.config._attn_implementation
    model.set_attn_implementation(_GROUPED)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _flash(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
) -> tuple[Tensor, None]:
    """As transformers calls it: (batch, heads, tokens, features) in, (batch, tokens, heads, features) out."""
    prompt = query.shape[2] > 1
    seen = key.shape[2] if prompt else _CONTEXT // 2 + 1
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        found = F.scaled_dot_product_attention(
            query,
            key[:, :, :seen],
            value[:, :, :seen],
            is_causal=prompt,
            scale=settings.get("scaling"),
            enable_gqa=True,
        )
    return found.transpose(1, 2), None


_Times = dict[tuple[str, str], tuple[float, float, str, Tensor]]


def _all_timed(model: nn.Module, calls: Mapping[str, Callable[[], Tensor]], rounds: int) -> _Times:
    """(operations, workload) -> eager ms, graph ms, what went wrong, logits."""
    found = {("as they are", what): _timed(call, rounds) for what, call in calls.items()}
    try:
        with small_operations_compiled(model):
            found |= {("compiled", what): _timed(call, rounds) for what, call in calls.items()}
            with flash_attention(model):
                name = "compiled, flash attention"
                return found | {(name, what): _timed(call, rounds) for what, call in calls.items()}
    except RuntimeError as error:  # of the compiler: the other times are worth keeping
        print(f"small operations not compiled: {describe(error)}", flush=True)
        return found


def model_rows(name: str, prompt: int, rounds: int, device: torch.device) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    model = build(name, device)
    layers = decoder_layers(model)
    dense_bytes = sum(layer.weight.nbytes for layer in layers.values())
    shapes = [(layer.out_features, layer.in_features) for layer in layers.values()]
    prefilled = f"prefill of {prompt} tokens"
    counts = {"decode, batch 1": 1, "decode, batch 8": 8, prefilled: prompt}
    calls = {what: decode_step(model, counts[what], device) for what in counts if what != prefilled}
    calls[prefilled] = prefill(model, prompt, device)
    before = _all_timed(model, calls, rounds)
    memory = torch.cuda.memory_allocated(device)
    layers.clear()
    done = convert_model(model, list(decoder_layers(model)), token_counts=tuple(counts.values()))
    release_memory()
    converted = [module for module in model.modules() if isinstance(module, SemiStructuredLinear)]
    kept_dense = sum(layer.weight.nbytes for layer in decoder_layers(model).values())
    packed = sum(module.stored_bytes for module in converted)
    after = _all_timed(model, calls, rounds)
    rows = []
    for operations, what in [key for key in after if key in before]:
        eager, graph, problem, logits = after[operations, what]
        dense_eager, dense_graph, dense_problem, dense_logits = before[operations, what]
        linear, limit = _limits(done.tables, shapes, counts[what], dense_graph)
        rows.append(
            {
                "model": name,
                "what": what,
                "small operations": operations,
                "dense eager ms": dense_eager,
                "ours eager ms": eager,
                "dense graph ms": dense_graph,
                "ours graph ms": graph,
                "x eager": dense_eager / eager,
                "x graph": dense_graph / graph,
                "bar at 8B": 1.25 if what == prefilled else 1.35,
                "linear layers, part of dense": linear,
                "x at most": limit,
                "error of the logits": relative_error(dense_logits, logits),
                "converted layers": len(converted),
                "dense layers": len(done.dense),
                "memory of the converted layers": packed / (dense_bytes - kept_dense) if converted else math.nan,
                "memory of the model": torch.cuda.memory_allocated(device) / memory,
                "problem": problem or dense_problem,
            }
        )
    for verdict in done.dense:
        print(name, verdict.name, verdict.shape, verdict.why, flush=True)
    return rows


def _limits(
    tables: tuple[KernelTable, ...], shapes: list[tuple[int, int]], tokens: int, whole_ms: float
) -> tuple[float, float]:
    """The layers' part of the dense model's time, by their times alone; and Amdahl's limit for the whole.

    The limit is that of layers which take as much less time as there are fewer bytes (few tokens) or products.
    """
    alone = {table.shape: row.dense_us for table in tables for row in table.rows if row.tokens == tokens}
    linear_ms = sum((alone[shape] or math.nan) for shape in shapes) / 1000
    left = _BYTES if tokens <= _FEW else _PRODUCTS
    return linear_ms / whole_ms, whole_ms / (whole_ms - linear_ms * (1 - left))


def _timed(call: Callable[[], Tensor], rounds: int) -> tuple[float, float, str, Tensor]:
    logits = call().clone()
    eager = time_calls({"": call}, rounds=rounds)[""].median_us / 1000
    try:
        graph = time_calls({"": capture(call).replay}, rounds=rounds)[""].median_us / 1000
    except RuntimeError as error:
        return eager, math.nan, describe(error), logits
    return eager, graph, "", logits


def save_models(folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
    note = (
        "Random 2:4 weights in LLaMA's shapes, bfloat16; x: dense over ours, both with the same small operations "
        "(norms, rotary embedding, activations): as transformers has them, compiled by torch, or compiled and "
        "attention by torch's flash kernel over grouped keys. Linear layers: their times alone over the dense "
        "model's, from graphs; x at most: Amdahl's limit, were they as much faster as "
        f"there are fewer bytes ({_BYTES}, decoding) or products ({_PRODUCTS}, prefill). Memory: parts of dense."
    )
    write_result(folder, name, "Whole models, dense and converted", rows, part="models", note=note)
