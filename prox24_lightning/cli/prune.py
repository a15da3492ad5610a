"""``prox24 prune``: a pretrained model in, a 2:4 model out, layer by layer on a little calibration text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from torch import Tensor, nn

from prox24_lightning.calibration.blocks import find_blocks
from prox24_lightning.cli.exit_codes import errors_as_exit
from prox24_lightning.convert.layer_times import layer_times
from prox24_lightning.io.documents import Split
from prox24_lightning.io.own_text import OwnText
from prox24_lightning.io.pretrained import Pretrained, is_causal_lm
from prox24_lightning.io.texts import TextSource, perplexity, token_sequences
from prox24_lightning.oneshot import prune_layerwise
from prox24_lightning.oneshot.config import PruneConfig, own_or_dense_target
from prox24_lightning.oneshot.save import save_pruned
from prox24_lightning.solvers import Method, Refine
from prox24_lightning.solvers.config import SolverConfig
from prox24_lightning.solvers.input_order.choose import ReorderInputs
from prox24_lightning.sparsify.zeros import weights_24
from prox24_lightning.utils.files import check_output
from prox24_lightning.utils.names import counted
from prox24_lightning.weights.groups import Geometry
from prox24_lightning.weights.names import clean_name
from prox24_lightning.weights.rounding import RoundedForm
from prox24_lightning.weights.selection import select_weights

_TOKENS = 4096
"""Rows of a layer's input at which its times count for the budget."""


def prune(
    model: Pretrained,
    text: str | None = None,
    eval_text: str | None = None,
    data: TextSource | None = None,
    output: Path = Path("runs/pruned"),
    overwrite: bool = False,
    download: bool = False,
    method: Method = "prox",
    refine: Refine | None = "masked_gradient",
    geometry: Geometry = "row",
    targets: list[str] | None = None,
    skip: list[str] | None = None,
    blocks: str | None = None,
    budget: float = 0.0,
    dense_target: float | None = None,
    reorder_inputs: ReorderInputs = False,
    reconstruct_steps: int = 0,
    steps: int | None = None,
    sequences: int = 128,
    length: int = 1024,
    batch_size: int = 8,
    eval_sequences: int = 64,
    seed: int = 0,
    device: str | None = None,
    offload: str = "device",
    work_dir: Path | None = None,
    matmul_precision: Literal["highest", "high"] = "highest",
    weights: RoundedForm | None = None,
) -> None:
    """Prune a Hugging Face model to 2:4 in one shot and save it.

    Exit code 0: pruned and saved. 2: an error.

    Args:
        model: which model, and how to load it; the word MODEL is its name.
        text: calibration text: a UTF-8 file (documents end at empty lines), a folder of text files, a .jsonl file with
            a field "text", or a data set of the hub (owner/name or owner/name:configuration, with --download).
        eval_text: the same for the perplexity; null holds a fifth of the documents of the calibration text out.
        data: class of a source of both texts, in place of text and eval_text.
        output: folder of the pruned model, its masks, report and card.
        overwrite: write into an output folder that holds files already.
        download: fetch a model or data set of the hub that is not in its cache.
        method: how masks are chosen; keep keeps the zeros of a model that is 2:4 already.
        refine: how the kept weights are refitted with the mask fixed; null for not at all.
        geometry: groups of four along inputs (row), outputs (column), or both in every 4 x 4 block (block).
        targets: patterns of names; null takes every linear layer of the blocks.
        skip: patterns of names that stay dense.
        blocks: name of the list of blocks; null finds it.
        budget: share of the speed-up that is given back for layers that stay dense, where that lowers the model's loss
            most. Times are those of this GPU's kernel table at 4096 tokens, else multiply-adds.
        dense_target: 0 keeps each layer's own outputs, 1 aims at the dense model's; null is 0.5, and 0 with keep.
        reorder_inputs: choose which inputs share a group of four, where the layers before can return them in another
            order; the dense model computes the same. stream also orders the residual stream.
        reconstruct_steps: gradient steps that refine the weights of each block together towards the dense model's
            output, at the rounded values with weights.
        steps: steps of the prox methods; null takes each method's default.
        sequences: number of calibration sequences.
        length: tokens a sequence.
        batch_size: sequences a batch.
        eval_sequences: sequences of held-out text for the perplexity before and after; 0 for none.
        seed: of the choice of texts.
        device: where blocks are solved; null is cuda if there is one, else cpu.
        offload: where hidden states are kept: device, cpu, or a folder.
        work_dir: folder for finished blocks, from which a killed run resumes; null keeps nothing.
        matmul_precision: high allows TF32 on GPUs that have it.
        weights: round the values to 8 bits, each layer making up for its errors; `prox24 convert OUTPUT FOLDER
            --weights` of the same form then packs them without a further change.
    """
    with errors_as_exit("prune"):
        check_output(output, overwrite=overwrite)
        model = replace(model, download=model.download or download)
        console = Console()
        torch.set_float32_matmul_precision(matmul_precision)
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        options: dict[str, Any] = {
            "targets": targets,
            "skip": skip,
            "geometry": geometry,
            "blocks": blocks,
            "budget": budget,
            "dense_target": own_or_dense_target(method, dense_target),
            "reorder_inputs": reorder_inputs,
            "reconstruct_steps": reconstruct_steps,
            "offload": offload,
            "work_dir": work_dir,
        }
        PruneConfig(SolverConfig(method, refine, steps, weights=weights), **options)
        # Texts first: a missing or short one costs no loading of weights.
        source = text_source(text, eval_text, data, download=download)
        model.check_length(length)
        tokenizer = model.tokenizer()
        ids, held_out = calibration_and_evaluation(tokenizer, source, sequences, eval_sequences, length, seed)
        network = model.model()
        if held_out is not None and not is_causal_lm(network):
            raise ValueError(f"a {type(network).__name__} has no next-token perplexity: add --eval_sequences 0")
        # Names too, before anything is computed.
        find_blocks(network, blocks)
        chosen = select_weights(network, targets=targets, skip=skip, geometry=geometry).chosen
        if method != "keep" and (sparse := weights_24(chosen)):
            console.print(
                f"{len(sparse)} of {counted(len(chosen), 'weight')} are 2:4 already and get new masks; --method keep "
                "keeps the zeros that are there",
                style="yellow",
            )
        # One block at a time goes to the device; a whole model there is faster, if it fits.
        if place.type != "cpu" and offload == "device":
            network.to(place)
        scores: dict[str, float] = {}
        if held_out is not None:
            scores["perplexity, dense"] = perplexity(network, held_out, batch_size)
            console.print(f"held-out perplexity, dense: {scores['perplexity, dense']:.3f}")
        report = prune_layerwise(
            network,
            [{"input_ids": part} for part in ids.split(batch_size)],
            method=method,
            refine=refine,
            steps=steps,
            weights=weights,
            layer_times=_layer_times(network, place) if budget else None,
            device=place,
            **options,
        )
        console.print(report.table())
        if held_out is not None:
            scores["perplexity, 2:4"] = perplexity(network, held_out, batch_size)
            console.print(f"held-out perplexity, 2:4: {scores['perplexity, 2:4']:.3f}")
        protocol = {
            "model": model.describe(),
            "data": source.describe(),
            "calibration": f"{sequences} sequences of {length} tokens",
            "evaluation": f"{eval_sequences} sequences of {length} tokens{_apart(source)}"
            if eval_sequences
            else "none",
            "seed": seed,
            **{key: f"{value:.3f}" for key, value in scores.items()},
        }
        save_pruned(output, network, report, companions=[tokenizer], protocol=protocol)
        report.plot(output / "layerwise.png")
        console.print(
            f"saved to {output}: load it with from_pretrained; masks, report and card lie beside it",
            f"next: prox24 doctor {output} says what it gains, prox24 convert {output} {output}_packed packs it, and "
            'Prox24(strategy="keep") fine-tunes it',
            sep="\n",
            markup=False,
            highlight=False,
        )


def text_source(text: str | None, eval_text: str | None, data: TextSource | None, *, download: bool) -> TextSource:
    if data is not None and (text or eval_text):
        raise ValueError("both data and text are given: name one source of text")
    if data is not None:
        return data
    if text is None:
        raise ValueError(
            "text is missing: name a file, a folder or a data set of your own for calibration (--text my.txt), or a "
            "source (--data prox24_lightning.io.texts.PythonTopics)"
        )
    return OwnText(text, eval_text, download=download)


def calibration_and_evaluation(
    tokenizer: Any, source: TextSource, sequences: int, eval_sequences: int, length: int, seed: int
) -> tuple[Tensor, Tensor | None]:
    """Return token ids (sequences, length) for calibration and, if any are asked for, for evaluation."""
    counts: dict[Split, int] = {"calibration": sequences, "evaluation": eval_sequences}
    found = [
        token_sequences(
            tokenizer, source.texts(split), count, length, seed=seed, name=f"the {split} text ({source.describe()})"
        )
        for split, count in counts.items()
        if count or split == "calibration"
    ]
    return found[0], found[1] if eval_sequences else None


def _apart(source: TextSource) -> str:
    """Return what a card says about passages that both texts have."""
    if not isinstance(source, OwnText) or source.evaluation is None:
        return ", disjoint by document"
    return f"; {source.overlap():.1%} of its passages of 30 words stand in the calibration text too"


def _layer_times(network: nn.Module, place: torch.device) -> dict[str, tuple[float, float]] | None:
    """Return times of the linear layers from this GPU's kernel table; None where it does not hold them all."""
    if place.type != "cuda":
        return None
    layers = [(name, module.weight) for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    shapes = {f"{clean_name(name)}.weight": (weight.shape[0], weight.shape[1]) for name, weight in layers}
    chosen = {weight.name for weight in select_weights(network)}
    return layer_times({name: shape for name, shape in shapes.items() if name in chosen}, _TOKENS) or None
