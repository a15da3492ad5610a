"""``prox24 bench MODEL``: a 2:4 model dense against converted, on this machine's GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from prox24_lightning.cli.exit_codes import errors_as_exit, sigterm_as_exit
from prox24_lightning.cli.generation_rows import GenerateCalls, with_generation
from prox24_lightning.cli.layer_dtype import LayerDtype, layer_dtype
from prox24_lightning.cli.measured import Measured, say_what_comes
from prox24_lightning.convert.benchmark.example_inputs import model_inputs, own_example
from prox24_lightning.convert.benchmark.generation_report import Host
from prox24_lightning.convert.benchmark.language_report import LanguageReport, Workload
from prox24_lightning.convert.benchmark.report import Report, RunMode
from prox24_lightning.convert.benchmark.run import run_benchmark
from prox24_lightning.convert.benchmark.settings import ExampleInputs, Settings
from prox24_lightning.convert.benchmark.time_language_model import time_language_model
from prox24_lightning.convert.eligibility import find_target
from prox24_lightning.io.pretrained import Head, check_positions, has_rotary, is_causal_lm, positions
from prox24_lightning.io.sources import Source, load_source
from prox24_lightning.io.texts import PlainText, PythonTopics, TextSource, perplexity, token_sequences
from prox24_lightning.utils.environment import describe_environment
from prox24_lightning.utils.errors import describe
from prox24_lightning.utils.files import check_output
from prox24_lightning.utils.long_work import watched
from prox24_lightning.weights.rounding import RoundedForm

TOKEN_COUNTS = (1, 16, 64, 1024, 4096)


def bench(
    model: str,
    output: Path | None = None,
    overwrite: bool = False,
    package: bool = False,
    file: str | None = None,
    head: Head = "auto",
    weights: RoundedForm | None = None,
    dtype: LayerDtype = "auto",
    revision: str | None = None,
    download: bool = False,
    run_config: Path | None = None,
    token_counts: list[int] | None = None,
    prefill: int = 1024,
    context: int = 512,
    batches: list[int] | None = None,
    text: str | None = None,
    sequences: int = 16,
    length: int = 512,
    run_mode: RunMode = "graph",
    convert_all: bool = False,
    keep_dense: bool = False,
    generate: int = 128,
    hosts: list[Host] | None = None,
    rounds: int = 20,
    max_error: float = 0.05,
) -> None:
    """Time a 2:4 model dense and converted in one process on the GPU, and compare their outputs.

    Every layer that can run sparse is timed at the token counts. A language model is then timed as a whole: prefill of
    one prompt and decoding at each batch size, in eager mode and replayed from CUDA graphs; whole calls of generate();
    peak memory, the share of the chip's measured limits, the error of the logits and the perplexity. With --output it
    writes bench.json, bench.md, and for a language model bench.png.

    Each measurement is announced on stderr. If the run is stopped (Ctrl-C, or SIGTERM of a time limit) or fails, the
    finished measurements are still printed and written. Exit code 0: all measured. 2: an error, such as no GPU or a
    model with nothing to convert. 130 and 143: stopped.

    Args:
        model: Hugging Face name or folder, packed folder or file, checkpoint (.ckpt, .pt, .safetensors), or config
            (.yaml).
        output: folder for the results; null writes no file.
        overwrite: write into a folder that holds files already.
        package: the model lies inside the installed package of that name.
        file: a GGUF file in the folder, or a sub-folder that holds the model.
        head: auto class of transformers that loads a Hugging Face model; auto takes the class that its config names.
        weights: fp8_e4m3 or int8 time layers that are rounded to 8 bits, with dense float8 and 16 bits beside them;
            null times 16 bits alone.
        dtype: in which the model is loaded, and its layers run; auto is the model's own, bfloat16 for a model in
            another dtype than these.
        revision: branch, tag or commit of a model of the hub; null is the main branch.
        download: fetch a model of the hub that is not in its cache; false opens no connection.
        run_config: config of the run that wrote a checkpoint, to make its module; null reads the weights alone.
        token_counts: rows of input at which layers are timed, and at none of which a converted one may be slower; null:
            those of the workloads (batches and prefill), without a language model 1, 16, 64, 1024, 4096.
        prefill: tokens of the prompt.
        context: tokens in the cache while decoding.
        batches: sequences decoded at a time; null: 1 and 8.
        text: for the perplexity: a UTF-8 file, a folder of text files, a .jsonl file with a field "text", or a data set
            of the hub (with --download); null takes the help topics of Python.
        sequences: number of sequences for the perplexity; 0 for none.
        length: tokens of each.
        run_mode: the times that decide what is converted: eager calls, or calls replayed from a CUDA graph.
        convert_all: convert what can be, faster or not.
        keep_dense: keep the dense weights too, for the numbers of tokens at which cuBLAS is faster.
        generate: tokens that whole calls of generate() make after a prompt of ``context`` tokens, in transformers (with
            a static cache, and with accelerate_generation) and, where it is installed, in vLLM; 0 for no such calls.
        hosts: which of them: accelerate_generation, transformers (its own loop, which it compiles for minutes), vllm;
            null takes all that are installed.
        rounds: repetitions of each measurement; of calls of generate() at most 5.
        max_error: largest relative error of a layer's output that is acceptable in 8 bits; the report ends with the
            fastest form within it.
    """
    with errors_as_exit("bench"):
        settings = Settings(
            token_counts=tuple(token_counts or TOKEN_COUNTS),
            only_if_faster=not convert_all,
            run_mode=run_mode,
            keep_dense=keep_dense,
            rounds=rounds,
            weights=weights,
            max_error=max_error,
        )
        workloads = [Workload("prefill", 1, prefill), *(Workload("decode", n, context) for n in batches or (1, 8))]
        if (
            min(prefill, context, length, *(workload.batch for workload in workloads)) < 1
            or min(sequences, generate) < 0
        ):
            raise ValueError("prefill, context, batches and length must be 1 or more, sequences and generate 0 or more")
        calls = GenerateCalls.of(batches or (1, 8), context, generate, rounds, hosts)
        if output is not None:
            check_output(output, overwrite=overwrite)
        target = find_target()
        if target is None:
            raise ValueError(
                "there is no CUDA GPU here, so nothing can be timed: neither layers nor generate() nor vLLM; prox24 "
                "doctor lists what could run sparse"
            )
        if target.problem is not None:
            raise ValueError(f"nothing runs sparse on this GPU: {target.problem}")
        data = PythonTopics() if text is None else PlainText(text, download=download)
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
        beyond = _beyond_positions(source, prefill, context, length if sequences else 1, generate)
        settings = replace(settings, dtype=layer_dtype(source.model, dtype))
        if token_counts is None and _is_language_model(source):
            settings = replace(settings, token_counts=tuple(sorted({workload.tokens for workload in workloads})))
        facts = {"model": source.description, **describe_environment()}
        score, about = _score(source, data, sequences, length) if _is_language_model(source) else (None, None)

        def described(report: Report) -> Report:
            report = replace(report, machine={**facts, **report.machine})
            return report.with_note(beyond) if beyond else report

        with sigterm_as_exit(), watched(say_what_comes()), Measured(output) as measured:
            report = run_benchmark(
                source.model, settings, inputs=_example(source), keep=lambda part: measured.keep(described(part))
            )
            if not report.shapes:
                raise ValueError(f"no layer of {model} can run sparse here; prox24 doctor gives the reasons")
            measured.keep(described(report))
            names = (*report.names("sparse"), *report.dense_fp8_names)
            if _is_language_model(source) and names:
                _time_language(measured, source.model, names, workloads, settings, score, about)
                if generate:
                    measured.keep(with_generation(measured.report, source, names, settings, calls, measured.keep))
            elif _is_language_model(source):
                measured.note(
                    "No layer is as fast sparse at all of these numbers of tokens, so the model stays as it is. If it "
                    "is used at some of them only, name those (--token_counts); --keep_dense lets cuBLAS take the "
                    "others."
                )
        if names:
            print(f"next: prox24 convert {model} OUT writes it packed")


def _example(source: Source) -> ExampleInputs | None:
    """Return inputs for the whole model: a LightningModule's own, or of the sizes that a transformers config names."""
    if source.pretrained is not None and not _is_language_model(source):
        return model_inputs(source.model)
    return own_example(source.model) if source.callable else None


def _is_language_model(source: Source) -> bool:
    return source.pretrained is not None and is_causal_lm(source.model)


def _beyond_positions(source: Source, prefill: int, context: int, length: int, generate: int) -> str:
    """Return a note where sequences are longer than the model has positions; empty where none is.

    Raises:
        ValueError: where positions are a table, which longer sequences would read past its end.
    """
    if not _is_language_model(source):
        return ""
    config = source.model.config
    name, longest = positions(config)
    largest = max(prefill, context + generate, length)
    if longest is None or largest <= longest:
        return ""
    if not has_rotary(config):
        check_positions(config, {"prefill": prefill, "length": length})
        raise ValueError(
            f"context={context} and generate={generate} together are more than the {longest} positions of the model "
            f"({name} in its config): give less"
        )
    return (
        f"{largest} tokens are more than the {longest} positions of the model ({name}): times hold, perplexity may not."
    )


def _time_language(
    measured: Measured,
    model: nn.Module,
    names: tuple[str, ...],
    workloads: list[Workload],
    settings: Settings,
    score: Callable[[nn.Module], float] | None,
    about: str | None,
) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    report = measured.report

    def keep(language: LanguageReport) -> None:
        measured.keep(replace(report, language=language))

    try:
        found = time_language_model(
            model,
            names,
            workloads,
            settings,
            device,
            score=score,
            text=about,
            dense_fp8=report.dense_fp8_names,
            keep=keep,
        )
    except (RuntimeError, ValueError, IndexError) as error:  # what has been measured stays
        further = "" if measured.report.language is None else " further"
        measured.note(f"Language model not timed{further}: {describe(error)}")
    else:
        keep(found)


def _score(
    source: Source, data: TextSource, sequences: int, length: int
) -> tuple[Callable[[nn.Module], float] | None, str | None]:
    """Return a function that computes the perplexity of a model, and its text; None without a tokenizer."""
    if source.tokenizer is None or not sequences:
        return None, None
    texts = data.texts("evaluation")
    ids = token_sequences(source.tokenizer, texts, sequences, length, name=f"the text ({data.describe()})")
    return lambda model: perplexity(model, ids), f"{data.describe()}, {sequences} x {length} tokens"
