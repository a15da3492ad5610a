"""The search for cuSPARSELt's algorithms in a process of its own. No GPU needed."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from dataclasses import asdict

from prox24_lightning.convert.autotune import cusparselt_algorithms, cusparselt_worker
from prox24_lightning.convert.autotune.cusparselt_algorithms import AlgorithmJob, fastest_algorithms

JOBS = [AlgorithmJob("float16", (512, 1024), tokens, 4, 0) for tokens in (64, 128, 256)]


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
    answers = fastest_algorithms(JOBS, command=child("print('illegal', file=sys.stderr); os._exit(134)"))
    assert [answer.algorithms for answer in answers] == [(3, 2), (3, 1), (3, 1)], "no longer tried after the death"
    assert answers[1].problem == "cuSPARSELt's algorithm 2 ended a process with status 134 (illegal)"


def test_what_kills_at_one_shape_is_left_out_at_all():
    """Each death costs a process: an algorithm that dies at the first of many shapes must not use them all up."""
    jobs = [AlgorithmJob("float16", (512, 1024 * columns), 128, 4, 0) for columns in range(1, 41)]
    answers = fastest_algorithms(jobs, command=child("os._exit(134)"))
    assert [answer.algorithms for answer in answers] == [(3, 1)] * 40


def test_after_two_in_a_row_that_kill_the_rest_is_left_out():
    *python, text = child("os._exit(134)")
    text = text.replace("range(4)", "range(50)").replace("algorithm == 2", "algorithm >= 6")
    answers = fastest_algorithms(JOBS, command=[*python, text])
    assert [answer.algorithms for answer in answers] == [(49, 48), (5, 4), (5, 4)]
    assert answers[1].problem == (
        "cuSPARSELt's algorithm 6 ended a process with status 134; "
        "cuSPARSELt's algorithm 7 and the ones after it, left out, ended a process with status 134"
    )


def test_a_search_in_which_every_second_one_kills_is_given_up():
    *python, text = child("os._exit(134)")
    text = text.replace("range(4)", "range(50)").replace("algorithm == 2", "algorithm % 2")
    answers = fastest_algorithms(JOBS[1:2], command=[*python, text])
    assert answers[0].algorithms == (30, 28)
    assert answers[0].problem.endswith("the search for cuSPARSELt's algorithms was given up after 16 processes")


def test_a_child_that_hangs_is_ended():
    answers = fastest_algorithms(JOBS[1:2], command=child("time.sleep(60)"), seconds=3)
    assert answers[0].algorithms == (3, 1)
    assert "algorithm 2 took more than 3 seconds" in answers[0].problem


def test_an_algorithm_that_hangs_costs_less_than_a_start(monkeypatch):
    monkeypatch.setattr(cusparselt_algorithms, "ALGORITHM_SECONDS", 2.0)
    answers = fastest_algorithms(JOBS[1:2], command=child("time.sleep(60)"))
    assert "algorithm 2 took more than 2 seconds" in answers[0].problem


def test_each_job_is_reported_once_whatever_dies():
    told = []
    fastest_algorithms(JOBS, command=child("os._exit(134)"), on_done=lambda: told.append(1))
    assert len(told) == len(JOBS)


def test_a_child_that_works_may_take_long():
    *python, text = child("pass")
    slow = text.replace("        print(", "        time.sleep(0.25)\n        print(", 1)
    answers = fastest_algorithms(JOBS, command=[*python, slow], seconds=2)  # of silence; it takes three in all
    assert [answer.algorithms for answer in answers] == [(3, 2)] * 3


def test_a_search_that_takes_too_long_keeps_what_was_timed():
    told = []
    answers = fastest_algorithms(
        JOBS, command=child("time.sleep(60)"), search_seconds=3, on_done=lambda: told.append(1)
    )
    assert [answer.algorithms for answer in answers] == [(3, 2), (1, 0), ()]
    late = "the search for cuSPARSELt's algorithms was given up after 3 seconds"
    assert [answer.problem for answer in answers] == ["", late, late]
    assert len(told) == 1


def test_a_child_that_never_starts_is_a_problem():
    answers = fastest_algorithms(JOBS, command=[sys.executable, "-c", "raise SystemExit('no module')"])
    assert [answer.algorithms for answer in answers] == [(), (), ()]
    assert answers[2].problem == "the search for cuSPARSELt's algorithms ended a process with status 1 (no module)"


def test_no_jobs_no_child():
    assert fastest_algorithms([], command=["/nonexistent"]) == []


def test_jobs_travel_as_json(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(cusparselt_worker, "time_algorithms", lambda job: seen.append(job) or iter([{"algorithm": 3}]))
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps([asdict(job) for job in JOBS])))
    cusparselt_worker.main()
    assert seen == JOBS
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines[2:4] == [{"job": 1, "algorithm": 3}, {"job": 1, "done": True, "problem": ""}]


def test_the_child_of_the_package_starts_without_a_warning():
    command = [sys.executable, "-W", "error", "-m", cusparselt_algorithms.WORKER]
    done = subprocess.run(command, input="[]", capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
