"""``prox24 convert MODEL OUT``: write a 2:4 model packed, at about half the size, or a packed one dense again."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from torch import Tensor, nn

from prox24_lightning.cli.exit_codes import errors_as_exit
from prox24_lightning.convert.form_choice import layers_of_16_bits
from prox24_lightning.convert.input_scales import check_input_quantile, measure_input_scales
from prox24_lightning.convert.packed_model import find_packable
from prox24_lightning.io.own_text import OwnText
from prox24_lightning.io.packed_folder import refuse_dense, save_folder
from prox24_lightning.io.pretrained import Dtype, Head
from prox24_lightning.io.sources import Source, load_source
from prox24_lightning.io.texts import TextSource, token_sequences
from prox24_lightning.oneshot import RoundingReport, round_model
from prox24_lightning.oneshot.rounding.round_model import check_loss_rise, check_tune_steps
from prox24_lightning.oneshot.save import forget_quantization
from prox24_lightning.utils.files import DENSE_FILES, PACKED_FILES, check_output, filling
from prox24_lightning.utils.names import collapse_names, counted
from prox24_lightning.weights.rounding import RoundedForm


def convert(
    model: str,
    out: Path,
    form: Literal["packed", "dense"] = "packed",
    overwrite: bool = False,
    package: bool = False,
    file: str | None = None,
    head: Head = "auto",
    weights: RoundedForm | None = None,
    dtype: Dtype = "auto",
    revision: str | None = None,
    download: bool = False,
    run_config: Path | None = None,
    targets: list[str] | None = None,
    skip: list[str] | None = None,
    text: str | None = None,
    data: TextSource | None = None,
    sequences: int = 128,
    length: int = 1024,
    batch_size: int = 8,
    input_quantile: float | None = None,
    smooth: bool | None = None,
    tune_steps: int = 0,
    max_loss_rise: float | None = None,
    keep_16bit: list[str] | None = None,
    device: str | None = None,
) -> None:
    """Check a 2:4 model, pack its weights one by one and write them, with configs, tokenizer and a card.

    A weight that is not 2:4 stays dense in the file and is listed. One that is 2:4 in most of its groups only is
    damaged, and refused. Exit code 2: an error, and nothing was written.

    Args:
        model: Hugging Face name or folder, packed folder or file, checkpoint (.ckpt, .pt, .safetensors), or config
            (.yaml).
        out: folder to write into. Dense weights there are refused if packed ones are to be written; dense ones take the
            place of all weights that are there.
        form: packed, or dense (with zeros) to turn a packed folder back into an ordinary one.
        overwrite: write into a folder that holds files already.
        package: the model lies inside the installed package of that name.
        file: a GGUF file in the folder, or a sub-folder that holds the model.
        head: auto class of transformers that loads a Hugging Face model; auto takes the class that its config names.
        weights: how the packed weights are stored: fp8_e4m3 or int8 round them to 8 bits with a scale a row; null keeps
            them in the model's dtype. A packed folder of 8 bits that is converted again keeps neither its form nor its
            input scales: convert the 16-bit model instead, or its values are rounded twice.
        dtype: in which the model is loaded, and to which rounded weights expand; auto is the model's own.
        revision: branch, tag or commit of a model of the hub; null is the main branch.
        download: fetch a model of the hub that is not in its cache; false opens no connection.
        run_config: config of the run that wrote a checkpoint, to make its module; null reads the weights alone.
        targets: patterns of weights or modules that must be packed; null packs all that can be.
        skip: patterns of weights or modules that are stored dense.
        text: calibration text for rounded weights of a language model, whose entries then make up for each other's
            errors on their layer's inputs: a UTF-8 file, a folder of text files, a .jsonl file with a field "text", or
            a data set of the hub (with --download); null rounds every entry to its nearest value.
        data: class of a source of text, in place of text.
        sequences: number of calibration sequences.
        length: tokens a sequence.
        batch_size: sequences a batch.
        input_quantile: fix the scale of a rounded layer's inputs at this quantile of the tokens' largest magnitudes in
            the calibration text, 1 for the largest of all; null gives each token its own scale when the layer runs.
        smooth: with calibration text, scale inputs before they and the weights are rounded, where factors move into
            norms and the layers before at no cost: outliers of int8 become harmless; null does so for int8 alone,
            since float8 loses a little by it.
        tune_steps: with calibration text, gradient steps on the rounded weights of all layers together, a batch each,
            that bring the predictions closest to those of 16 bits; the whole model must fit on the device with 20
            bytes for each weight.
        max_loss_rise: with calibration text, leave the layers in 16 bits that cost most for what 8 bits save, until the
            loss rises by no more, in nats (0.007 is 0.7 % of perplexity); null rounds every layer.
        keep_16bit: patterns of layers that are packed in 16 bits; layers that servers run as one have one form.
        device: where layers are rounded; null is cuda if there is one, else cpu.
    """
    with errors_as_exit("convert"):
        console = Console()
        if form == "packed":
            refuse_dense(out)
        check_output(out, overwrite=overwrite)
        if weights and form == "dense":
            raise ValueError(f"--weights {weights} rounds packed weights, and --form dense packs none: leave one out")
        if (text or data) and not weights:
            raise ValueError("--text and --data are for rounded weights: name --weights fp8_e4m3 or int8")
        if input_quantile is not None and not (weights and (text or data)):
            raise ValueError(
                "--input_quantile takes rounded weights and calibration text: name --weights fp8_e4m3 or int8, and "
                "--text or --data"
            )
        if input_quantile is not None:
            check_input_quantile(input_quantile)
        needs_text = {"smooth": smooth, "tune_steps": tune_steps, "max_loss_rise": max_loss_rise is not None}
        for option, given in needs_text.items():
            if given and not (weights and (text or data)):
                raise ValueError(
                    f"--{option} takes rounded weights and calibration text: name --weights fp8_e4m3 or int8, and "
                    "--text or --data"
                )
        check_tune_steps(tune_steps)
        if max_loss_rise is not None:
            check_loss_rise(max_loss_rise)
        if keep_16bit and not weights:
            raise ValueError("--keep_16bit is for rounded weights: name --weights fp8_e4m3 or int8")
        if text and data:
            raise ValueError("both data and text are given: name one source of text")
        if text:
            data = OwnText(text, download=download)
        source = load_source(
            model,
            package=package,
            file=file,
            head=head,
            dtype=dtype,
            revision=revision,
            download=download,
            config=run_config,
        )
        if form == "dense":
            write_dense(out, source)
            console.print(
                f"wrote {model}, dense with zeros, to {out}",
                f"next: prox24 doctor {out if source.pretrained else out / 'model.safetensors'}",
                sep="\n",
                markup=False,
                highlight=False,
            )
            return
        packable = find_packable(source.model, targets=targets, skip=skip)
        if not packable.dims:
            raise ValueError(f"no weight of {model} is 2:4, so nothing would be packed: {_reasons(packable.dense)}")
        fixed: dict[str, float] = {}
        if data is not None and weights:
            ids = _calibration_tokens(source, data, sequences, length)
            matrices = [name for name in packable.dims if source.model.get_parameter(name).dim() == 2]
            kept = layers_of_16_bits([name.removesuffix(".weight") for name in packable.dims], keep_16bit or ())
            names = [name for name in matrices if name.removesuffix(".weight") not in kept]
            if not names:
                raise ValueError("keep_16bit names every layer, so nothing is rounded: leave --weights out")
            batches = ids.split(batch_size)
            options: dict[str, Any] = {"smooth": smooth, "tune_steps": tune_steps, "max_loss_rise": max_loss_rise}
            report = _round(source.model, names, weights, batches, device, **options)
            keep_16bit = sorted({*kept, *report.kept})
            console.print(str(report), markup=False, highlight=False)
            if input_quantile is not None:
                fixed = _input_scales(source.model, names, weights, batches, input_quantile, device)
        written = save_folder(
            out,
            source.model,
            packable,
            source=source.description,
            companions=source.companions,
            weights=weights,
            input_scales=fixed,
            keep_16bit=keep_16bit or (),
        )
        exact = len(written.packed) - sum(entry.form is not None for entry in written.packed.values())
        but = f" but {exact}" if exact else ""
        rounded = f"rounded to {weights}{but}, " if weights else ""
        console.print(
            f"{counted(len(written.packed), 'weight')} {rounded}packed and read back equal; "
            f"{counted(len(packable.dense), 'weight')} stored dense. {_reasons(packable.dense)}",
            f"tensors: {written.dense_bytes:,} bytes dense, {written.stored_bytes:,} bytes packed "
            f"({written.stored_bytes / written.dense_bytes:.4f}); in {out / written.path.name}",
            f"next: prox24 bench {out if source.pretrained else out / written.path.name} on a GPU; {out / 'README.md'} "
            "says how to load it",
            sep="\n",
            markup=False,
            highlight=False,
        )


def _calibration_tokens(source: Source, data: TextSource, sequences: int, length: int) -> Tensor:
    if source.pretrained is None or source.tokenizer is None:
        raise ValueError(
            f"calibration text needs a Hugging Face model with its tokenizer, and {source.description} is none: leave "
            "--text and --data out"
        )
    return token_sequences(source.tokenizer, data.texts("calibration"), sequences, length)


def _round(
    model: nn.Module,
    names: list[str],
    weights: RoundedForm,
    batches: Sequence[Tensor],
    device: str | None,
    *,
    smooth: bool | None,
    tune_steps: int,
    max_loss_rise: float | None,
) -> RoundingReport:
    """Round the 2:4 weights of the model's blocks in place, as the packed file will hold them."""
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return round_model(
        model,
        [{"input_ids": ids} for ids in batches],
        weights,
        targets=names,
        smooth=smooth,
        tune_steps=tune_steps,
        max_loss_rise=max_loss_rise,
        device=place,
        offload="device" if place.type == "cpu" else "cpu",
    )


def _input_scales(
    model: Any,
    names: list[str],
    weights: RoundedForm,
    batches: Sequence[Tensor],
    quantile: float,
    device: str | None,
) -> dict[str, float]:
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    home = next(model.parameters()).device
    layers = {name.rpartition(".")[0]: model.get_submodule(name.rpartition(".")[0]) for name in names}
    model.to(place)
    try:
        runs = (partial(model, input_ids=ids.to(place), use_cache=False) for ids in batches)
        return measure_input_scales(layers, runs, weights, quantile=quantile)
    finally:
        model.to(home)


def write_dense(out: Path, source: Source) -> None:
    """Write a model dense, zeros and all, in place of all weights that are in ``out``."""
    model: Any = source.model
    forget_quantization(model)
    with filling(out, instead_of=(*DENSE_FILES, *PACKED_FILES)) as temporary:
        if hasattr(model, "save_pretrained"):
            model.save_pretrained(str(temporary))
            for companion in source.companions:
                companion.save_pretrained(str(temporary))
        else:
            _save_state(temporary / "model.safetensors", model)


def _save_state(path: Path, model: nn.Module) -> None:
    from safetensors.torch import save_model

    save_model(model, str(path))


def _reasons(dense: dict[str, str]) -> str:
    groups: dict[str, list[str]] = {}
    for name, why in dense.items():
        groups.setdefault(why.partition(": ")[0], []).append(name)  # not ":" alone, as in 2:4
    return "; ".join(
        f"{why}: {counted(len(names), 'weight')}" if why.startswith("skip=") else f"{collapse_names(names)}: {why}"
        for why, names in groups.items()
    )
