"""Prune a whole model without training: block after block, each layer solved on the inputs of the pruned model."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prox24_lightning.calibration.blocks import Blocks, find_blocks
from prox24_lightning.calibration.isolation.isolated import isolated
from prox24_lightning.oneshot.block_inputs import BlockInputs, chain_of_blocks
from prox24_lightning.oneshot.budget import reasons_to_stay
from prox24_lightning.oneshot.config import PruneConfig, own_or_dense_target
from prox24_lightning.oneshot.progress import LayerProgress
from prox24_lightning.oneshot.prune_block import BlockPruner, skipped_weight
from prox24_lightning.oneshot.pruning_report import LayerwiseReport
from prox24_lightning.oneshot.stream_order import choose_stream_order, proved_stream
from prox24_lightning.oneshot.work_dir import FinishedBlocks
from prox24_lightning.solvers.budget.price import LayerTimes
from prox24_lightning.solvers.config import Method, Refine, SolverConfig
from prox24_lightning.solvers.input_order.choose import ReorderInputs, holders
from prox24_lightning.utils.checksum import checksum
from prox24_lightning.utils.devices.cuda import exact_device
from prox24_lightning.utils.devices.cuda_graphs import GraphMemory
from prox24_lightning.utils.tensors import without_inference
from prox24_lightning.weights.groups import Geometry
from prox24_lightning.weights.layer_matrix import why_not_solvable
from prox24_lightning.weights.names import clean_name
from prox24_lightning.weights.rounding import RoundedForm
from prox24_lightning.weights.selection import GroupedWeight, SkippedWeight, select_weights


@torch.inference_mode(False)
def prune_layerwise(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    method: Method = "prox",
    refine: Refine | None = "masked_gradient",
    targets: Sequence[str] | None = None,
    skip: Sequence[str] | None = None,
    geometry: Geometry = "row",
    blocks: str | None = None,
    budget: float = 0.0,
    layer_times: LayerTimes | None = None,
    dense_target: float | None = None,
    reorder_inputs: ReorderInputs = False,
    reconstruct_steps: int = 0,
    device: str | torch.device | None = None,
    offload: str = "device",
    work_dir: str | Path | None = None,
    progress: bool = True,
    steps: int | None = None,
    momentum: float = 0.0,
    damping: float | None = None,
    refine_steps: int = 300,
    tolerance: float = 1e-4,
    weights: RoundedForm | None = None,
) -> LayerwiseReport:
    """Make the linear and convolution layers of a model's blocks 2:4, in place and without training.

    The blocks are pruned in the order of execution. Inside a block, layers that see the same input are solved
    together, on a Hessian taken after everything before them is pruned. Only the current block has to be on ``device``;
    the rest of the model stays where it is.

    In a process group every rank calls this with its own copy of the model and the same batches. Each runs its share of
    them and solves its share of each layer's rows; all end with the same model and report. Only the first writes files.

    Args:
        model: any module; Hugging Face models need no adapter. Its parameters change in place, in their own dtype.
        batches: calibration batches: mappings (keyword arguments of the model), tuples or tensors. Read once.
        method, refine, steps, momentum, damping, refine_steps, tolerance, weights: of the solver, see
            :func:`~prox24_lightning.solvers.layer.solve_layer`. With ``weights`` the values of linear layers are those
            of a packed file in that form, which stores the result without a further change, and their inputs are
            rounded as the kernels for that form do; ``method="keep"`` with it rounds a model that is 2:4 already.
            Tokens count at most as the median one does then
            (:func:`~prox24_lightning.calibration.statistics.output_error.bounded_token_weights`).
        targets, skip: patterns of names, see :func:`~prox24_lightning.weights.selection.select_weights`.
        geometry: ``"row"``: groups of four along a layer's inputs, ``"column"``: along its outputs, ``"block"``: along
            both in every 4 x 4 block.
        blocks: name of the list of blocks, where the largest list of like modules is not the right one. Each block
            must receive the output of the one before it; where the blocks of a list that was found do not, the same
            layers are pruned with the whole model as one block.
        budget: share in [0, 1) of the speed-up that may be spent on layers that stay dense. The layers that lower the
            model's loss most are chosen, measured one by one and together
            (:mod:`~prox24_lightning.solvers.budget.portfolio`). The loss is what the model returns as ``loss``, that of
            the next token, or the error of its output.
        layer_times: for the budget, time of each weight's product by its name: (dense, 2:4), from
            :func:`~prox24_lightning.convert.layer_times`; None goes by multiply-adds, so that the budget is a share of
            the weights.
        dense_target: 0 keeps the outputs of the dense weight on the pruned model's inputs; 1 aims at the outputs that
            the layer had in the dense model (error feedback); values between mix the two. Any but 0 costs a second copy
            of the block and of the hidden states. On SmolLM2-135M 0.5 lowers the perplexity by another 14 %.
            None is 0.5, and 0 with ``method="keep"``.
        reorder_inputs: choose which inputs share a group of four, before a block is solved, where that costs nothing at
            run time: hidden units, inputs of an output projection inside a head, channels between convolutions. The
            rows of the layers that compute them move along, so the dense model computes the same; that is proved on the
            first batch, and what cannot be proved stays as it is. ``"stream"`` also chooses the order of the residual
            stream, which all blocks share: embeddings, norms and head move along, and hidden states come in that order.
            It takes one more pass over the batches, and stays as it is where the model does not lie on ``device``.
        reconstruct_steps: gradient steps that refine the weights of each solved block together, so that its output
            comes closest to the dense model's
            (:func:`~prox24_lightning.solvers.block_reconstruction.reconstruct_block`); with ``weights`` they are taken
            at the rounded values. As ``dense_target`` it costs a second copy of the block and of the hidden states.
        device: where blocks are solved; None is where the model is.
        offload: where the hidden states wait: ``"device"``, ``"cpu"`` or a folder, which several runs may share.
        work_dir: folder for finished blocks, for one run at a time; a run that was killed goes on at the first
            unfinished block, given the same dense model, batches and arguments again. A block whose file is damaged is
            solved again.
        progress: show a bar with the time left.

    Returns:
        a report with one record a layer, and the masks.

    Raises:
        TypeError: if ``batches`` is a tensor or a mapping, whose rows or keys would be taken for batches.
        ValueError: for arguments that do not fit the model, and for a layer that cannot be solved (its inputs are not
            finite, say), by name; for a ``work_dir`` that another run uses; for ``budget``, ``reorder_inputs`` and
            ``reconstruct_steps`` on a model that was made within ``torch.inference_mode()``. Blocks that are finished
            stay pruned, and stay in ``work_dir``. After any error the model is on its device, in its mode, with its
            own forwards.
    """
    if isinstance(batches, Tensor | Mapping):
        raise TypeError("batches must be an iterable of batches; for one batch give [batch]")
    config = PruneConfig(
        solver=SolverConfig(method, refine, steps, momentum, damping, refine_steps, tolerance, weights),
        targets=targets,
        skip=skip,
        geometry=geometry,
        blocks=blocks,
        budget=budget,
        dense_target=own_or_dense_target(method, dense_target),
        reorder_inputs=reorder_inputs,
        reconstruct_steps=reconstruct_steps,
        offload=offload,
        work_dir=work_dir,
    )
    begin = time.perf_counter()
    batches = map(without_inference, batches)
    found = find_blocks(model, config.blocks)
    selection = select_weights(model, targets=config.targets, skip=config.skip, geometry=config.geometry)
    report = LayerwiseReport(config.settings(), skipped=list(selection.skipped))
    chosen = inside_blocks(selection.chosen, found, report.skipped)
    if not chosen:
        reasons = "; ".join(sorted({weight.reason for weight in report.skipped})) or "it has no weights"
        remedy = "; call requires_grad_(True) on what is to be pruned" if "frozen (requires_grad" in reasons else ""
        raise ValueError(f"no weight of {type(model).__name__} can be pruned layer-wise: {reasons}{remedy}")
    if config.budget or config.reorder_inputs or config.reconstruct_steps:
        check_ordinary(model)
    if (dense := selection.warning()) is not None:
        warnings.warn(dense, stacklevel=2)
    moved: dict[str, Tensor] = {}
    try:
        with isolated(model), GraphMemory().shared(), LayerProgress(len(chosen), enabled=progress) as bar:
            _prune_blocks(model, batches, config, found, chosen, device, report, bar, moved, layer_times)
    finally:
        for name, buffer in model.named_buffers():
            if clean_name(name) in moved:
                buffer.copy_(moved[clean_name(name)])
    if not report.layers:
        raise ValueError(
            f"the first calibration batch calls none of the {len(chosen)} layers of {type(model).__name__} that can be "
            "pruned; begin with a batch that reaches them, and with the model itself, not a traced or exported one"
        )
    report.seconds += time.perf_counter() - begin
    return report


def check_ordinary(model: nn.Module) -> None:
    """Refuse parameters that were made within ``torch.inference_mode()``, where they must take gradients or change."""
    for name, parameter in model.named_parameters():
        if parameter.is_inference():
            raise ValueError(
                f"{name} was made within torch.inference_mode() and takes no gradients, which budget, reorder_inputs "
                "and reconstruct_steps need: load the model outside of that mode, or give copy.deepcopy(model), made "
                "outside of it"
            )


def _prune_blocks(
    model: nn.Module,
    batches: Iterable[Any],
    config: PruneConfig,
    blocks: Blocks,
    chosen: list[GroupedWeight],
    device: str | torch.device | None,
    report: LayerwiseReport,
    bar: LayerProgress,
    moved: dict[str, Tensor],
    layer_times: LayerTimes | None,
) -> None:
    home = next(model.parameters()).device
    kept = list(batches) if config.budget or config.reorder_inputs == "stream" else []
    blocks, batches = chain_of_blocks(model, blocks, kept or batches, home, config.blocks)
    with ExitStack() as stack:
        work = exact_device(home if device is None else device)
        record = partial(BlockInputs.recorded, model, blocks, home=home, device=work, offload=config.offload)
        recorded = stack.enter_context(ExitStack())
        inputs = recorded.enter_context(record(batches))
        finished = None
        if config.work_dir is not None:
            identity = {
                "model": type(model).__name__,
                "weights": {weight.name: list(weight.parameter.shape) for weight in chosen},
                "dense_weights": checksum(model.parameters()),
                "inputs": inputs.identity(),
                "layer_times": checksum(repr(sorted((layer_times or {}).items()))) if config.budget else None,
            }
            finished = stack.enter_context(FinishedBlocks.open(config.work_dir, {**config.settings(), **identity}))
        notes: dict[nn.Module, str] = {}
        if config.reorder_inputs == "stream" and _reorder_stream(
            model, inputs, kept[0], chosen, finished, bar, moved, notes
        ):
            recorded.close()
            inputs = stack.enter_context(record(kept))
        if config.budget:
            choose = partial(reasons_to_stay, model, inputs, kept, chosen, config.budget, bar, layer_times)
            reasons = choose() if finished is None else finished.once("left_dense", choose)
            report.skipped += [skipped_weight(one, reasons[one.name]) for one in chosen if one.name in reasons]
            chosen = [weight for weight in chosen if weight.name not in reasons]
            bar.shrink(len(reasons))
        twice = config.dense_target or config.reconstruct_steps
        dense_inputs = stack.enter_context(inputs.copied()) if twice else None
        pruner = BlockPruner(config, inputs, dense_inputs, finished, report, bar, holders(model), moved, notes)
        for index in range(len(blocks)):
            pruner.prune(index, [weight for weight in chosen if blocks.owns(index, weight.module_name)])


def _reorder_stream(
    model: nn.Module,
    inputs: BlockInputs,
    batch: Any,
    chosen: Sequence[GroupedWeight],
    finished: FinishedBlocks | None,
    bar: LayerProgress,
    moved: dict[str, Tensor],
    notes: dict[nn.Module, str],
) -> bool:
    """Move the residual stream into the order that loses least; return whether there is one that is better."""
    free = proved_stream(model, inputs, batch, chosen, holders(model))
    if free is None:
        return False

    def choose() -> dict[str, Any]:
        found = choose_stream_order(free, inputs, chosen, bar)
        if found is None:
            return {}
        return {"order": found.order.tolist(), "note": f"residual stream {found.note.removeprefix('inputs ')}"}

    found = choose() if finished is None else finished.once("stream_order", choose)
    if not found:
        return False
    free.move(torch.tensor(found["order"]))
    notes.update(dict.fromkeys(free.consumers, found["note"]))
    buffers = {tensor: clean_name(name) for name, tensor in model.named_buffers()}
    moved.update({buffers[part.tensor]: part.tensor for part in free.tensors if part.tensor in buffers})
    return True


def inside_blocks(
    weights: Sequence[GroupedWeight], blocks: Blocks, skipped: list[SkippedWeight]
) -> list[GroupedWeight]:
    """Return the weights that lie in a block and that the solver can take; add the others to ``skipped``."""
    chosen = []
    for weight in weights:
        reason = why_not_solvable(weight.module, weight.parameter_name)
        if reason is None and not any(blocks.owns(index, weight.module_name) for index in range(len(blocks))):
            reason = "outside the repeated blocks"
        if reason is None:
            chosen.append(weight)
        else:
            skipped.append(skipped_weight(weight, reason))
    return chosen
