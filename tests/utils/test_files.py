"""A file under its final name is whole: after errors, a full disk and kills at any moment."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
import torch

from prox24_lightning.utils.files import check_folder, filling, replacing, save_object, write_text

WRITER = """
import sys
from prox24_lightning.utils.files import write_text
print("ready", flush=True)
letter = 0
while True:
    letter = (letter + 1) % 26
    write_text(sys.argv[1], chr(97 + letter) * 2_000_000)
"""

FULL_DISK = """
import resource, signal, sys, torch
from prox24_lightning.utils.files import save_object, write_text
from prox24_lightning.utils.safetensors_file import save_tensors
write_text(sys.argv[1], "old")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
large = torch.zeros(100_000)
writers = [
    lambda path: write_text(path, "n" * 5000),
    lambda path: save_object(path, {"large": large}),
    lambda path: save_tensors(path, {"large": large}, {}),
]
for write in writers:
    try:
        write(sys.argv[1])
    except OSError as error:
        print(error.errno)
"""


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "note.txt"
    write_text(path, "one")
    write_text(path, "zwei ü")
    assert path.read_text(encoding="utf-8") == "zwei ü"
    assert os.listdir(tmp_path) == ["note.txt"]


def test_an_error_while_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "note.txt"
    write_text(path, "old")
    with suppress(KeyError), replacing(path) as temporary:
        temporary.write_text("half")
        raise KeyError
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["note.txt"]


def test_two_writers_of_one_file_do_not_share_a_temporary_one(tmp_path):
    """As two threads, or two containers in which both processes have the same id."""
    path = tmp_path / "note.json"
    with replacing(path) as slow, slow.open("w") as file:
        file.write("slow ")
        file.flush()
        with replacing(path) as quick:
            assert quick != slow
            quick.write_text("quick")
        assert path.read_text() == "quick"
        file.write("but whole")
    assert path.read_text() == "slow but whole"
    assert os.listdir(tmp_path) == ["note.json"]


def test_many_threads_leave_one_whole_file(tmp_path):
    path = tmp_path / "note.txt"
    texts = [letter * 100_000 for letter in "abcdefgh"]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda text: write_text(path, text), texts * 4))
    assert path.read_text() in texts
    assert os.listdir(tmp_path) == ["note.txt"]


def test_an_object_comes_back(tmp_path):
    save_object(tmp_path / "state.pt", {"step": 3, "w": torch.arange(4)})
    found = torch.load(tmp_path / "state.pt", weights_only=True)
    assert found["step"] == 3
    assert found["w"].tolist() == [0, 1, 2, 3]
    assert os.listdir(tmp_path) == ["state.pt"]


def test_a_folder_gets_all_files_or_none_and_keeps_what_it_had(tmp_path):
    folder = tmp_path / "model"
    with filling(folder) as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "a").write_text("1")
        (temporary / "b").write_text("1")
    with suppress(KeyError), filling(folder) as temporary:
        (temporary / "b").write_text("2")
        raise KeyError
    assert sorted(path.name for path in folder.iterdir()) == ["b", "sub"]
    assert ((folder / "b").read_text(), (folder / "sub" / "a").read_text()) == ("1", "1")


def test_files_that_the_new_ones_replace_are_removed_at_the_end(tmp_path):
    for name in ("model-00001-of-00002.bin", "model.bin", "notes"):
        (tmp_path / name).write_text("old")
    patterns = ("model.bin", "model-*-of-*.bin")
    with suppress(KeyError), filling(tmp_path, instead_of=patterns):
        raise KeyError
    assert len(os.listdir(tmp_path)) == 3
    with filling(tmp_path, instead_of=patterns) as temporary:
        (temporary / "model.bin").write_text("new")
    assert sorted(os.listdir(tmp_path)) == ["model.bin", "notes"]
    assert (tmp_path / "model.bin").read_text() == "new"


def test_a_folder_that_cannot_be_written_is_known_before(tmp_path, monkeypatch):
    check_folder(tmp_path)
    check_folder(tmp_path / "new" / "sub")
    assert os.listdir(tmp_path) == []
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("file", "file/sub", "link"):
        with pytest.raises(NotADirectoryError, match=f"{name} cannot be a folder, because"):
            check_folder(tmp_path / name)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(PermissionError, match=f"new cannot be written: no permission to write into {tmp_path};"):
        check_folder(tmp_path / "new")


def test_a_full_disk_leaves_the_old_file(tmp_path):
    path = tmp_path / "note.txt"
    done = subprocess.run([sys.executable, "-c", FULL_DISK, path], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["27", "27", "27"]  # EFBIG, as for a disk that is full
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["note.txt"]


def test_a_kill_at_any_moment_leaves_a_whole_file(tmp_path):
    path = tmp_path / "note.txt"
    for pause in (0.02, 0.031, 0.053):
        process = subprocess.Popen([sys.executable, "-c", WRITER, path], stdout=subprocess.PIPE)
        process.stdout.readline()
        time.sleep(pause)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        text = path.read_text()
        assert (len(text), len(set(text))) == (2_000_000, 1)
