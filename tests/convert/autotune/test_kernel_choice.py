"""Which kernel runs when: the table, the choice, the cache on disk, the child that searches. No GPU needed."""

from __future__ import annotations

import io
import json
import sys
from contextlib import nullcontext
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from rich.progress import Progress

from prox24_lightning.convert.autotune import cusparselt_algorithms as algorithm_search
from prox24_lightning.convert.autotune import disk_cache as kernel_cache
from prox24_lightning.convert.autotune import tune as kernel_search
from prox24_lightning.convert.autotune.cusparselt_algorithms import Job
from prox24_lightning.convert.autotune.disk_cache import Place
from prox24_lightning.convert.autotune.kernel_table import (
    BUCKETS,
    DENSE,
    KernelTable,
    Row,
    Times,
    choose,
    completed,
    table_by_rule,
)
from prox24_lightning.convert.autotune.progress import TuningProgress
from prox24_lightning.convert.kernel_report import in_words, print_kernels
from prox24_lightning.convert.kernels import nvrtc
from prox24_lightning.convert.kernels.cusparselt import library as cusparselt
from prox24_lightning.convert.kernels.few_tokens import kernel as few_tokens
from prox24_lightning.convert.kernels.few_tokens.kernel import TILINGS, Tiling
from prox24_lightning.convert.kernels.registry import Kernel, kernel_for, own_kernels, parse_table
from prox24_lightning.convert.kernels.warpgroup import kernel as warpgroup
from prox24_lightning.convert.kernels.warpgroup.kernel import Blocking
from prox24_lightning.convert.layers import linear_op
from prox24_lightning.convert.measurement import Timing

SHAPE = (4096, 1024)
PLACE = Place("some GPU", "580.1", "2.11", "800", "abc")
FEW = str(Kernel.few(TILINGS[0]))


def times(tokens: int, dense: float, **kernels: float) -> Times:
    return Times(tokens, dense, {{"few": FEW, "plan": "cusparselt:7"}[name]: us for name, us in kernels.items()})


@pytest.mark.parametrize("text", ["dense", "expand", "cusparselt", "cusparselt:17", FEW, "warpgroup:64,2,1,4,6"])
def test_a_kernel_is_its_text(text):
    assert str(Kernel.parse(text)) == text


def test_a_call_goes_by_the_next_count_above_its_own():
    table = f"8={FEW} 64=cusparselt:3 1024=cusparselt"
    assert parse_table(table)[0] == (8, 64, 1024)
    found = [str(kernel_for(table, tokens)) for tokens in (1, 8, 9, 64, 65, 1024, 5000)]
    assert found == [FEW, FEW, "cusparselt:3", "cusparselt:3", *["cusparselt"] * 3]


def test_only_so_many_numbers_of_tokens_stay_prepared(monkeypatch):
    monkeypatch.setattr(linear_op, "prepare", lambda *arguments: arguments)
    for tokens in range(1, 5001):
        linear_op._prepared("8=dense", torch.float16, 64, 64, tokens, 0)
    kept = linear_op._prepared.cache_info().currsize
    linear_op._prepared.cache_clear()
    assert kept == linear_op._PREPARED < 5000


def test_the_fastest_packed_kernel_is_chosen():
    table = choose(SHAPE, [times(1024, 10, plan=7), times(1, 10, few=5, plan=9)])
    assert table.text == f"1={FEW} 1024=cusparselt:7"
    assert [row.speedup for row in table.rows] == [2, 10 / 7]
    assert table.decision((1, 1024)) is None


def test_the_dense_weight_is_used_only_if_it_is_kept():
    measured = [times(1, 10, few=5), times(256, 10, plan=12)]
    without, kept = (choose(SHAPE, measured, keep_dense=keep) for keep in (False, True))
    assert str(without.rows[1].kernel) == "cusparselt:7"
    assert kept.rows[1].kernel == DENSE
    assert kept.rows[1].speedup == 1
    assert without.decision((1, 256)) == (
        "slower (0.83 x at 256 tokens; keep_dense=True would use cuBLAS there): stays dense"
    )
    assert without.decision((1,)) is None, "slower only at a number of tokens that does not matter"
    assert kept.decision((1, 256)) is None
    assert "no packed kernel is faster" in kept.decision((256,))


def test_neighbours_with_one_kernel_share_an_entry():
    table = choose(SHAPE, [times(1, 10, few=5), times(8, 10, few=5), times(64, 10, plan=5), times(128, 9, plan=5)])
    assert table.text == f"8={FEW} 128=cusparselt:7"


def test_nothing_measured_is_an_error_with_its_reason():
    with pytest.raises(ValueError, match=r"no packed kernel runs for \(4096, 1024\) at 64 tokens: out of luck"):
        choose(SHAPE, [Times(64, 10.0, {}, ("out of luck",))])
    assert choose(SHAPE, [Times(64, 10.0, {}, ("out of luck",))], keep_dense=True).rows[0].kernel == DENSE


def test_by_rule_few_tokens_are_ours_and_many_the_librarys():
    def ways(capability):
        table = table_by_rule(SHAPE, capability)
        return [kernel_for(table.text, tokens).way for tokens in (1, 8, 32, 200, 100_000)]

    assert ways((9, 0)) == [*["warpgroup"] * 4, "cusparselt"]
    assert ways((8, 0)) == ["few", "few", "few", "cusparselt", "cusparselt"]
    without_compiler = table_by_rule(SHAPE, (9, 0), "torch", own=False)
    assert [row.kernel.way for row in without_compiler.rows] == ["torch"]
    old = table_by_rule(SHAPE, (7, 5), "expand")
    assert old.text == f"{BUCKETS[-1]}=expand"


def test_rules_fill_what_was_not_measured():
    measured = (Row(64, DENSE, 1.0, 1.0),)
    table = KernelTable(SHAPE, completed(measured, table_by_rule(SHAPE, (9, 0)).rows))
    assert [row.tokens for row in table.rows] == sorted({row.tokens for row in table.rows})
    assert kernel_for(table.text, 64) == DENSE
    assert kernel_for(table.text, 1).way == "warpgroup"


def test_the_table_for_people():
    table = choose(SHAPE, [times(1, 10, few=5), replace(times(256, 10, plan=12), notes=("algorithm 3 died",))])
    console = Console(width=240, record=True, file=io.StringIO())
    print_kernels([table], console)
    lines = [line for line in console.export_text().splitlines() if "(4096, 1024)" in line]
    assert "own kernel, tiling 0,1,1,1,16,1,2,2,2" in lines[0]
    assert "5.00" in lines[0]
    assert "2.00" in lines[0]
    assert "cuSPARSELt, algorithm 7" in lines[1]
    assert "slower than dense" in lines[1]
    assert "algorithm 3 died" in lines[1]
    assert in_words(Kernel("cusparselt")) == "cuSPARSELt, algorithm by default"


def test_tilings_fit_the_tokens_and_the_gpu():
    for tokens in (1, 8, 9, 16, 32, 64):
        found = few_tokens.tilings(tokens, (9, 0))
        assert found
        assert len({tiling.tokens for tiling in found}) == 1
        assert found[0].tokens >= tokens
    assert all(tiling.cluster == 1 for tiling in few_tokens.tilings(1, (8, 0)))
    assert few_tokens.tilings(1, (7, 5)) == ()
    for tiling in TILINGS:
        assert tiling.shared_bytes <= 227 * 1024
        assert tiling.threads <= 1024
        assert tiling.resident * tiling.threads <= 2048
        assert tiling.depth % tiling.span == 0


def test_a_tiling_says_its_macros():
    tiling = Tiling(1, 2, 8, 4, 2, 1, 2, 4, 1)
    names = ["STAGED", "MT", "NT", "WR", "WK", "CS", "SPAN", "DEPTH", "RESIDENT"]
    assert tiling.macros == dict(zip(names, (1, 2, 8, 4, 2, 1, 2, 4, 1), strict=True))
    assert all(f"{name}" in nvrtc.source("few_tokens.cu") for name in names)
    assert (tiling.tokens, tiling.rows, tiling.threads) == (64, 128, 256)


def test_blockings_fit_the_gpu():
    for tokens in (1, 16, 17, 64, 100, 256, 512):
        found = warpgroup.blockings(tokens, (9, 0))
        assert found
        assert max(blocking.tokens for blocking in found) >= min(tokens, 256)
        assert {blocking.tokens for blocking in found} <= {8, 16, 32, 64, 128, 256}
    for capability in ((8, 0), (8, 9), (10, 0)):
        assert warpgroup.blockings(64, capability) == (), "the instructions are Hopper's alone"
    assert warpgroup.blockings(4096, (9, 0)) == ()
    assert all(blocking.tokens == 8 or blocking.across > 1 for blocking in warpgroup.blockings(5, (9, 0)))
    assert any(blocking.across > 1 for blocking in warpgroup.blockings(5, (9, 0))), "to share takes sixteen tokens"
    for blocking in warpgroup.BLOCKINGS:
        assert blocking.shared_bytes <= 227 * 1024
        assert blocking.threads <= 1024
        assert blocking.stages >= 2
        assert blocking.across * blocking.cluster <= 8, "the largest cluster that every GPU of the kind takes"
        assert blocking.tokens // blocking.across % 8 == 0, "the copy engine swizzles eight rows at a time"
        assert blocking.stage_bytes % 1024 == 0


def test_on_hopper_the_older_kernel_is_measured_for_few_tokens_only():
    ways = {tokens: {kernel.way for kernel in own_kernels(tokens, (9, 0))} for tokens in (8, 64, 1024)}
    assert ways == {8: {"few", "warpgroup"}, 64: {"warpgroup"}, 1024: set()}
    assert {kernel.way for kernel in own_kernels(64, (8, 0))} == {"few"}


def test_a_blocking_says_its_macros_and_its_instruction():
    blocking = Blocking(64, 2, 2, 4, 3)
    assert blocking.macros == {"TOKENS": 64, "GROUPS": 2, "CR": 2, "CS": 4, "STAGES": 3}
    assert all(name in nvrtc.source("warpgroup.cu") for name in blocking.macros)
    assert (blocking.rows, blocking.threads, blocking.stage_bytes) == (128, 288, 128 * 128 + 64 * 256 + 2048)
    text = warpgroup._instruction(64, torch.bfloat16)
    assert "m64n64k32.f32.bf16.bf16" in text
    assert "float (&d)[32]" in text
    assert text.count("+f") == 32


def test_measured_times_come_back_from_disk(tmp_path):
    path = tmp_path / "folder" / "kernels.json"
    entry = Times(8, 10.5, {FEW: 6.25}, ("a note",))
    where = kernel_cache.key(PLACE, torch.float16, SHAPE, 8)
    kernel_cache.add(path, {where: entry})
    kernel_cache.add(path, {kernel_cache.key(PLACE, torch.float16, SHAPE, 64): replace(entry, tokens=64)})
    assert kernel_cache.find(path, PLACE, torch.float16, SHAPE, (1, 8, 64)) == {8: entry, 64: replace(entry, tokens=64)}
    assert [file.name for file in path.parent.iterdir()] == ["kernels.json"]


def test_whatever_number_of_tokens_was_measured_is_found(tmp_path, monkeypatch):
    path = tmp_path / "kernels.json"
    measured = {tokens: times(tokens, 10, few=5) for tokens in (100, 3)}
    kernel_cache.add(path, {kernel_cache.key(PLACE, torch.float16, SHAPE, at): entry for at, entry in measured.items()})
    kernel_cache.add(path, {kernel_cache.key(PLACE, torch.float16, SHAPE[::-1], 7): times(7, 10, few=5)})
    assert kernel_cache.find(path, PLACE, torch.float16, SHAPE) == measured
    monkeypatch.setattr(kernel_search.kernel_cache.Place, "here", lambda device: PLACE)
    monkeypatch.setattr(kernel_search.torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(kernel_search.cusparselt, "way", lambda device: ("cusparselt", ""))
    monkeypatch.setattr(kernel_search.nvrtc, "is_available", lambda: True)
    table = kernel_search.stored_table(SHAPE, torch.float16, device=0, cache=path)
    assert {1, 3, 100, BUCKETS[-1]} <= {row.tokens for row in table.rows}
    assert [row.kernel for row in table.rows if row.us is not None] == [Kernel.parse(FEW)] * 2


@pytest.mark.parametrize("field", ["gpu", "driver", "torch", "cusparselt", "kernels"])
def test_times_of_another_machine_are_not_used(tmp_path, field):
    path = tmp_path / "kernels.json"
    kernel_cache.add(path, {kernel_cache.key(PLACE, torch.float16, SHAPE, 8): Times(8, 10.0, {})})
    assert kernel_cache.find(path, replace(PLACE, **{field: "other"}), torch.float16, SHAPE, (8,)) == {}
    assert kernel_cache.find(path, PLACE, torch.bfloat16, SHAPE, (8,)) == {}
    assert kernel_cache.find(path, PLACE, torch.float16, SHAPE[::-1], (8,)) == {}


def test_an_entry_without_kernels_is_measured_again(tmp_path):
    path = tmp_path / "kernels.json"
    kernel_cache.add(path, {kernel_cache.key(PLACE, torch.float16, SHAPE, 8): Times(8, 10.0, {}, ("out of memory",))})
    assert kernel_cache.find(path, PLACE, torch.float16, SHAPE, (8,)) == {}


def test_times_that_cannot_be_kept_are_used_all_the_same(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(kernel_search.kernel_cache.Place, "here", lambda device: PLACE)
    monkeypatch.setattr(kernel_search.torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(
        kernel_search, "measure_kernels", lambda points, dtype, device: {at: times(at[1], 10, few=5) for at in points}
    )
    tables = kernel_search.kernel_tables(
        [SHAPE],
        torch.float16,
        token_counts=(8,),
        device=torch.device("cuda", 0),
        cache=tmp_path / "file" / "cache.json",
    )
    assert tables[SHAPE].text == f"8={FEW}"
    assert "not kept for the next run" in caplog.text


OTHER_VERSION = json.dumps(
    {"version": 99, "entries": {"old": {"tokens": 8, "dense_us": 1.0, "kernels": {}, "notes": []}}}
)


@pytest.mark.parametrize("text", ["", "{", "[]", OTHER_VERSION, '{"version": 1, "entries": [1]}'])
def test_a_damaged_file_counts_as_empty_and_is_replaced(tmp_path, text):
    path = tmp_path / "kernels.json"
    path.write_text(text)
    assert kernel_cache.read(path) == {}
    kernel_cache.add(path, {"key": Times(8, 10.0, {})})
    assert set(kernel_cache.read(path)) == {"key"}


def test_the_place_of_the_cache(monkeypatch, tmp_path):
    monkeypatch.delenv("PROX24_KERNEL_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert kernel_cache.default_path() == tmp_path / "prox24_lightning" / "kernels.json"
    monkeypatch.setenv("PROX24_KERNEL_CACHE", str(tmp_path / "mine.json"))
    assert kernel_cache.default_path() == tmp_path / "mine.json"


JOBS = [Job("float16", (512, 1024), tokens, 4, 0) for tokens in (64, 128, 256)]

CHILD = """
import json, os, sys, time
for index, job in enumerate(json.load(sys.stdin)):
    for algorithm in range(4):
        if algorithm in job["skip"] or algorithm >= (job["end"] or 99):
            continue
        print(json.dumps({{"job": index, "algorithm": algorithm}}), flush=True)
        if job["tokens"] == 128 and algorithm == 2:
            {death}
        print(json.dumps({{"job": index, "algorithm": algorithm, "us": 10.0 - algorithm}}), flush=True)
    print(json.dumps({{"job": index, "done": True, "problem": ""}}), flush=True)
"""


def child(death: str) -> list[str]:
    return [sys.executable, "-c", CHILD.format(death=death)]


def test_an_algorithm_that_kills_is_left_out():
    answers = algorithm_search.search(JOBS, command=child("print('illegal', file=sys.stderr); os._exit(134)"))
    assert [answer.algorithms for answer in answers] == [(3, 2), (3, 1), (3, 1)], "no longer tried after the death"
    assert answers[1].problem == "cuSPARSELt's algorithm 2 ended a process with status 134 (illegal)"


def test_what_kills_at_one_shape_is_left_out_at_all():
    """Each death costs a process: an algorithm that dies at the first of many shapes must not use them all up."""
    jobs = [Job("float16", (512, 1024 * columns), 128, 4, 0) for columns in range(1, 41)]
    answers = algorithm_search.search(jobs, command=child("os._exit(134)"))
    assert [answer.algorithms for answer in answers] == [(3, 1)] * 40


def test_after_two_in_a_row_that_kill_the_rest_is_left_out():
    *python, text = child("os._exit(134)")
    text = text.replace("range(4)", "range(50)").replace("algorithm == 2", "algorithm >= 6")
    answers = algorithm_search.search(JOBS, command=[*python, text])
    assert [answer.algorithms for answer in answers] == [(49, 48), (5, 4), (5, 4)]
    assert answers[1].problem == (
        "cuSPARSELt's algorithm 6 ended a process with status 134; "
        "cuSPARSELt's algorithm 7 and the ones after it, left out, ended a process with status 134"
    )


def test_a_search_in_which_every_second_one_kills_is_given_up():
    *python, text = child("os._exit(134)")
    text = text.replace("range(4)", "range(50)").replace("algorithm == 2", "algorithm % 2")
    answers = algorithm_search.search(JOBS[1:2], command=[*python, text])
    assert answers[0].algorithms == (30, 28)
    assert answers[0].problem.endswith("the search for cuSPARSELt's algorithms was given up after 16 processes")


def test_a_child_that_hangs_is_ended():
    answers = algorithm_search.search(JOBS[1:2], command=child("time.sleep(60)"), seconds=5)
    assert answers[0].algorithms == (3, 1)
    assert "algorithm 2 took more than 5 seconds" in answers[0].problem


def test_an_algorithm_that_hangs_costs_less_than_a_start(monkeypatch):
    monkeypatch.setattr(algorithm_search, "SECONDS_AN_ALGORITHM", 3.0)
    answers = algorithm_search.search(JOBS[1:2], command=child("time.sleep(60)"))
    assert "algorithm 2 took more than 3 seconds" in answers[0].problem


def test_jobs_that_are_done_are_told_once_whatever_dies():
    told = []
    algorithm_search.search(JOBS, command=child("os._exit(134)"), on_done=lambda: told.append(1))
    assert len(told) == len(JOBS)


def test_a_bar_shows_how_far_the_search_is_and_leaves_other_bars_alone():
    console = Console(file=io.StringIO(), force_terminal=True)
    with TuningProgress(console) as bar:
        bar.begin("kernels timed", 12)()
    assert "kernels timed" in console.file.getvalue()
    assert "1/12" in console.file.getvalue()
    with Progress(console=console), TuningProgress(console) as bar:
        bar.begin("kernels timed", 12)()


def test_a_child_that_works_may_take_long():
    *python, text = child("pass")
    slow = text.replace("        print(", "        time.sleep(0.5)\n        print(", 1)
    answers = algorithm_search.search(JOBS, command=[*python, slow], seconds=4)  # of silence; it takes six in all
    assert [answer.algorithms for answer in answers] == [(3, 2)] * 3


def test_a_child_that_never_starts_is_said():
    answers = algorithm_search.search(JOBS, command=[sys.executable, "-c", "raise SystemExit('no module')"])
    assert [answer.algorithms for answer in answers] == [(), (), ()]
    assert answers[2].problem == "the search for cuSPARSELt's algorithms ended a process with status 1 (no module)"


def test_no_jobs_no_child():
    assert algorithm_search.search([], command=["/nonexistent"]) == []


def test_jobs_travel_as_json(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(algorithm_search, "_measure", lambda job: seen.append(job) or iter([{"algorithm": 3}]))
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps([asdict(job) for job in JOBS])))
    algorithm_search.main()
    assert seen == JOBS
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines[2:4] == [{"job": 1, "algorithm": 3}, {"job": 1, "done": True, "problem": ""}]


def test_without_cusparselt_large_products_are_expanded():
    if torch.backends.cusparselt.is_available():
        pytest.skip("it is here")
    cusparselt.way.cache_clear()
    assert cusparselt.way(0) == ("expand", "torch was built without cuSPARSELt")
    with pytest.raises(cusparselt.CusparseltError, match="built without cuSPARSELt"):
        cusparselt.load()


def test_a_library_that_is_none_is_refused(tmp_path):
    with pytest.raises(cusparselt.CusparseltError, match="cannot be loaded"):
        cusparselt.Library(str(tmp_path / "libcusparseLt.so.0"))
    with pytest.raises(cusparselt.CusparseltError, match="lacks an entry"):
        cusparselt.Library("libc.so.6")


@pytest.mark.parametrize("offset", [1.0, float("nan")])
def test_a_kernel_whose_products_are_wrong_is_not_timed(monkeypatch, offset):
    weight = torch.randn(8, 128)
    few, wrong = Kernel.few(TILINGS[0]), Kernel.few(TILINGS[1])

    def prepared(kernel, *_):
        return lambda inputs, *_: inputs @ weight.t() + (offset if kernel == wrong else 0)

    def measured(variants, **_):
        return {name: Timing(1.0, 1.0, 1.0) for name in variants}

    monkeypatch.setattr(kernel_search, "prepare", prepared)
    monkeypatch.setattr(kernel_search, "capture", lambda call: SimpleNamespace(replay=call))
    monkeypatch.setattr(kernel_search, "measure", measured)
    found = kernel_search._time((8, 128), torch.float32, 3, [few, wrong], ["told"], [weight], [weight])
    assert list(found.kernels) == [str(few)]
    assert found.notes[0] == "told"
    assert f"{wrong}: wrong products on this machine" in found.notes[1]
