"""A lock has one owner, in this process and among processes, and is free when its owner ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from prox24_lightning.utils.file_lock import locked

HOLD = (
    "import sys, time\nfrom prox24_lightning.utils.file_lock import locked\n"
    "with locked(sys.argv[1]):\n    print('held', flush=True)\n    time.sleep(60)"
)


def test_a_second_owner_is_refused_and_learns_the_first(tmp_path):
    path = tmp_path / "lock"
    with locked(path), pytest.raises(BlockingIOError, match=rf"process {os.getpid()} on .*, since 20"), locked(path):
        pass
    with locked(path):
        pass


def test_a_killed_owner_leaves_no_lock(tmp_path):
    path = tmp_path / "lock"
    owner = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True)
    try:
        assert owner.stdout.readline() == "held\n"
        with pytest.raises(BlockingIOError, match=f"process {owner.pid} on"), locked(path):
            pass
    finally:
        owner.send_signal(signal.SIGKILL)
        owner.wait()
        owner.stdout.close()
    with locked(path):
        pass


def test_an_error_inside_frees_the_lock(tmp_path):
    with pytest.raises(KeyError), locked(tmp_path / "lock"):
        raise KeyError
    with locked(tmp_path / "lock"):
        pass


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_child_that_outlives_its_parents_run_does_not_keep_the_lock(tmp_path):
    with locked(tmp_path / "lock"):
        child = os.fork()
        if not child:
            time.sleep(30)
            os._exit(0)
    try:
        with locked(tmp_path / "lock"):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
