"""``prox24 doctor MODEL``: which layers can run on sparse tensor cores, why others cannot, and the gain."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from prox24_lightning.cli.exit_codes import errors_as_exit
from prox24_lightning.cli.layer_dtype import LayerDtype, layer_dtype
from prox24_lightning.convert.autotune.disk_cache import Machine
from prox24_lightning.convert.benchmark.recommend import DENSE_FP8, packed_name
from prox24_lightning.convert.benchmark.render import STATES
from prox24_lightning.convert.doctor import Diagnosis, Gain, LayerDiagnosis, Potential, diagnose
from prox24_lightning.convert.eligibility import Target, find_target
from prox24_lightning.convert.form_choice import form_problem
from prox24_lightning.convert.measured_gain import measured_fp8_gain, measured_gain
from prox24_lightning.convert.sections import Section, grouped, print_tables
from prox24_lightning.io.packed_folder import is_packed_folder, is_packed_module
from prox24_lightning.io.pretrained import Head, is_causal_lm
from prox24_lightning.io.sources import Source, load_source
from prox24_lightning.utils.environment import describe_environment
from prox24_lightning.utils.files import PACKED_FILE, check_folder, write_text
from prox24_lightning.weights.rounding import LARGEST


def doctor(
    model: str,
    package: bool = False,
    file: str | None = None,
    head: Head = "auto",
    dtype: LayerDtype = "auto",
    revision: str | None = None,
    download: bool = False,
    run_config: Path | None = None,
    token_counts: list[int] | None = None,
    json: str | None = None,
) -> None:
    """List every layer with the reason why it can or cannot run sparse, and the expected gain.

    Exit code 0: at least one layer can run sparse on this machine's GPU or, where there is none, on a suitable one.
    1: no layer can. 2: an error.

    Args:
        model: Hugging Face name or folder, packed folder or file, checkpoint (.ckpt, .pt, .safetensors), or config
            (.yaml).
        package: the model lies inside the installed package of that name.
        file: a GGUF file in the folder, or a sub-folder that holds the model.
        head: auto class of transformers that loads a Hugging Face model; auto takes the class that its config names.
        dtype: in which the model is loaded, and its layers run; auto is the model's own, bfloat16 for a model in
            another dtype than these.
        revision: branch, tag or commit of a model of the hub; null is the main branch.
        download: fetch a model of the hub that is not in its cache; false opens no connection.
        run_config: config of the run that wrote a checkpoint, to make its module; null reads the weights alone.
        token_counts: rows of a layer's input at which gains are given; null: 1, 16, 64, 1024, 4096.
        json: file for the diagnosis as JSON; - prints it, and the table to stderr.
    """
    with errors_as_exit("doctor"):
        counts = token_counts or [1, 16, 64, 1024, 4096]
        if any(count < 1 for count in counts):
            raise ValueError(f"token_counts={counts} must be whole numbers from 1 up")
        if json not in (None, "-"):
            check_folder(Path(json).parent)
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
        target, kind = find_target(), layer_dtype(source.model, dtype)
        found = diagnose(
            source.model,
            dtype=kind,
            target=target,
            token_counts=counts,
            gain=_known_gain(target, kind),
            form_gains=_known_form_gains(target, kind),
            machine={"model": source.description, **describe_environment()},
        )
        console = Console(stderr=json == "-")
        print_diagnosis(found, console)
        console.print(_next(found, model, source), markup=False, highlight=False, soft_wrap=True)
        if json == "-":
            sys.stdout.write(found.to_json())
        elif json is not None:
            Path(json).parent.mkdir(parents=True, exist_ok=True)
            write_text(json, found.to_json())
    raise SystemExit(0 if found.able else 1)


def _known_gain(target: Target | None, dtype: torch.dtype) -> Gain | None:
    if target is None or target.problem is not None:
        return None
    return measured_gain(Machine.here(torch.cuda.current_device()), dtype)


def _known_form_gains(target: Target | None, dtype: torch.dtype) -> dict[str, Gain]:
    """Return the gains of the forms of 8 bits that the GPU multiplies."""
    if target is None or target.problem is not None:
        return {}
    machine = Machine.here(torch.cuda.current_device())
    gains = {
        packed_name(form): measured_gain(machine, dtype, form=form)
        for form in LARGEST
        if not form_problem(form, target)
    }
    return gains if form_problem("fp8_e4m3", target) else {DENSE_FP8: measured_fp8_gain(machine, dtype), **gains}


def print_diagnosis(found: Diagnosis, console: Console) -> None:
    """Print two tables: the layers with their reasons, and the gains of those that can be sparse."""
    able = found.able
    tables: list[Section] = [
        (
            "Layers",
            ("layers", "kind", "(out, in)", "state", "why"),
            grouped([(x.name, (x.kind, str(x.shape), _state(x), x.why)) for x in found.layers]),
        )
    ]
    counts = found.token_counts
    header = ("layers", "(out, in)", *(f"{count} tokens" for count in counts))
    if able:
        rows = [(x.name, (str(x.shape), *_gains(x, counts))) for x in able]
        whole = ("all linear layers together", "", *_gains(found, counts))
        tables.append(("Gain: dense time over sparse time", header, [*grouped(rows), whole]))
    more = [layer for layer in found.layers if layer.once_pruned]
    if found.once_pruned is not None:
        rows = [(x.name, (str(x.shape), *_gains(x, counts))) for x in more]
        whole = ("all linear layers together", "", *_gains(found.once_pruned, counts))
        tables.append(("Gain once pruned to 2:4: dense time over sparse time", header, [*grouped(rows), whole]))
    if found.forms and (able or more):
        tables.append(_forms_section(found))
    notes = [
        f"{len(able)} of {len(found.layers)} layers can run sparse: {found.sparse_share:.1%} of the weights of all "
        "linear layers. Together: by Amdahl's law on those weights; attention, norms and the host are not counted."
    ]
    if found.once_pruned is not None:
        notes.append(
            f"Once pruned, {found.once_pruned.layers} layers run sparse{'' if found.on_gpu else ' on a suitable GPU'}: "
            f"{found.once_pruned.share:.1%} of these weights."
        )
    if any(gain is None for gains in found.forms.values() for gain in gains.values()):
        notes.append(
            "Dense float8 needs no 2:4: compare before you choose. prox24 bench measures what is missing here, with "
            "--weights fp8_e4m3 or int8 also 2:4 in 8 bits."
        )
    if able or more:
        notes.append(
            "Gains are those of kernels in CUDA graphs, as vLLM and prox24_lightning.accelerate_generation run them; "
            "in eager calls of few tokens dense and sparse layers wait for the host alike."
        )
    if any(value is None for layer in (*able, *more) for value in layer.expected.values()):
        notes.append('"<=": not measured here (prox24 bench does, on the GPU): the limit of equally good kernels.')
    print_tables(tables, [*notes, *found.notes], console)


def _is_packed(model: str) -> bool:
    path = Path(model)
    return is_packed_folder(path) or is_packed_module(path) or (path.is_file() and path.name == PACKED_FILE)


def _next(found: Diagnosis, model: str, source: Source) -> str:
    """Return what to do now: prune what is dense, time what is 2:4, pack it where nothing can be timed."""
    if found.able and found.on_gpu:
        return f"next: prox24 bench {model}"
    if found.able and _is_packed(model):
        return f"next: prox24 bench {model} times it on a GPU"
    if found.able:
        return f"next: prox24 convert {model} OUT packs it; prox24 bench OUT times it on a GPU"
    if found.once_pruned is not None:
        one_shot = source.pretrained is not None and is_causal_lm(source.model)
        return f"next: {f'prox24 prune {model} --text my.txt, or ' if one_shot else ''}Prox24 in a training run"
    return "next: nothing here runs sparse; the reasons stand above"


def _state(layer: LayerDiagnosis) -> str:
    return "fits once pruned" if layer.once_pruned else STATES[layer.state]


def _gains(found: LayerDiagnosis | Potential | Diagnosis, counts: Sequence[int]) -> list[str]:
    return [_gain(found.expected[count], found.limit[count]) for count in counts]


def _forms_section(found: Diagnosis) -> Section:
    """Return the gains in 8 bits: dense float8, which any model gets without 2:4, has rows of its own."""
    counts = found.token_counts
    rows = [
        (layer.name, (str(layer.shape), form, *(_measured(gains[count]) for count in counts)))
        for form in found.forms
        for layer in found.layers
        for gains in [layer.forms.get(form)]
        if gains
    ]
    whole = [
        ("all linear layers together", "", form, *(_measured(gains[count]) for count in counts))
        for form, gains in found.forms.items()
    ]
    header = ("layers", "(out, in)", "weights", *(f"{count} tokens" for count in counts))
    return "Gain in 8 bits: time dense in 16 bits over its own", header, [*grouped(rows), *whole]


def _measured(gain: float | None) -> str:
    return "not measured" if gain is None else f"{gain:.2f}"


def _gain(expected: float | None, limit: float) -> str:
    return f"<= {limit:.2f}" if expected is None else f"{expected:.2f}"
