"""Write a pruned Hugging Face model: dense with zeros, its masks beside it, and a card with the exact protocol."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from prox24_lightning.mask import MASKS_FILE, StoredMask, hash_weight, write_masks
from prox24_lightning.oneshot.pruning_report import LayerwiseReport
from prox24_lightning.utils.files import DENSE_FILES, PACKED_FILES, filling, write_text
from prox24_lightning.utils.markdown import markdown_table
from prox24_lightning.utils.names import counted
from prox24_lightning.weights.names import clean_name


class _SavesItself(Protocol):
    def save_pretrained(self, save_directory: str) -> Any: ...


def save_pruned(
    folder: str | Path,
    model: Any,
    report: LayerwiseReport,
    *,
    companions: Sequence[_SavesItself] = (),
    protocol: Mapping[str, Any] | None = None,
) -> Path:
    """Write ``model`` so that ``from_pretrained`` reads it like any other, with masks, report and card.

    Args:
        folder: made if it does not exist; weights of a model that it held are removed, dense and packed ones.
        model: a Hugging Face model (anything with ``save_pretrained``), already pruned.
        report: what :func:`~prox24_lightning.oneshot.prune_layerwise` returned.
        companions: tokenizer, image processor or whatever else belongs into the folder.
        protocol: data, split, tokens, sequence length, seed and the like, for the card.

    Returns:
        the folder, which holds the weights (dense, zeros stored), ``masks.safetensors`` (one bit a weight),
        ``layerwise.json`` and ``README.md``.
    """
    folder = Path(folder)
    forget_quantization(model)
    weights = {clean_name(name): parameter for name, parameter in model.named_parameters(remove_duplicate=False)}
    stored = {
        name: StoredMask(mask, report.dims[name], hash_weight(weights[name])) for name, mask in report.masks.items()
    }
    info = {"settings": report.settings, "protocol": {key: str(value) for key, value in (protocol or {}).items()}}
    with filling(folder, instead_of=(*DENSE_FILES, *PACKED_FILES)) as temporary:
        model.save_pretrained(str(temporary))
        for companion in companions:
            companion.save_pretrained(str(temporary))
        write_masks(temporary / MASKS_FILE, stored, info)
        report.to_json(temporary / "layerwise.json")
        write_text(temporary / "README.md", _card(model, report, protocol or {}))
    return folder


def forget_quantization(model: Any) -> None:
    """Make a model whose weights are plain tensors by now say so, also where they came from a GGUF file: one that still
    says "quantized" would refuse to be saved, and its config would send from_pretrained to the wrong loader. One that
    came from a packed folder has a ``save_pretrained`` of its own, and transformers would undo how it was loaded."""
    if getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer, model.is_quantized = None, False
        for name in ("save_pretrained", "push_to_hub", "_weight_conversions"):
            vars(model).pop(name, None)
    config = getattr(model, "config", None)
    if config is not None and getattr(config, "quantization_config", None) is not None:
        del config.quantization_config


def _card(model: Any, report: LayerwiseReport, protocol: Mapping[str, Any]) -> str:
    sparse = sum(mask.numel() for mask in report.masks.values())
    whole = sum(parameter.numel() for parameter in model.parameters())
    sides = {"row": "inputs", "column": "outputs", "block": "inputs, and likewise along the outputs"}
    side = sides[report.settings.get("geometry", "row")]
    measured = {"mean relative local loss": f"{report.mean_loss:.5f}", "seconds": f"{report.seconds:.1f}"}
    lines = [
        "---",
        "library_name: transformers",
        "tags: [sparse, '2:4', pruned]",
        "---",
        "",
        f"# {type(model).__name__}, 2:4 sparse",
        "",
        f"In {counted(len(report.masks), 'weight')} ({sparse:,} of {whole:,} parameters) at most two of every four "
        f"consecutive entries along the {side} are not zero.",
        "Pruned layer by layer without training (arXiv 2501.18015). Weights are stored dense, with zeros; "
        f"`{MASKS_FILE}` holds the masks at one bit a weight. In this folder:",
        "",
        f'```python\nimport transformers\n\nmodel = transformers.{type(model).__name__}.from_pretrained(".")\n```',
        "",
        "`prox24 convert THIS_FOLDER OUT` packs it at about half the size, for sparse tensor cores.",
        "",
        markdown_table(("protocol", "value"), {**protocol, **report.settings, **measured}.items()),
        "",
        markdown_table(
            ("layer", "shape", "relative local loss"),
            ((layer.name, " x ".join(map(str, layer.shape)), f"{layer.final_loss:.5f}") for layer in report.layers),
        ),
        "",
    ]
    return "\n".join(lines)
