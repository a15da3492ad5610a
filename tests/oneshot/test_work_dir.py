"""``work_dir`` and ``offload``: damaged blocks are solved again, one run at a time, shared folders stay apart."""

from __future__ import annotations

import logging
import shutil
import threading

import pytest
import torch
from tiny_blocks import KilledError, batches, killed_in, prune, seeded

from prox24_lightning.oneshot.offload import HiddenStates
from prox24_lightning.oneshot.work_dir import FinishedBlocks

OPTIONS = {"steps": 3, "refine_steps": 3}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A work_dir with three finished blocks, and the model they belong to."""
    folder = tmp_path_factory.mktemp("finished")
    model = seeded()
    prune(model, work_dir=folder, **OPTIONS)
    return folder, model


def again(folder):
    model = seeded()
    return model, prune(model, work_dir=folder, **OPTIONS)


def assert_same(first, second):
    for one, two in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("place", [3, 40, 300, -700, -5])
def test_a_flipped_bit_in_a_finished_block_is_noticed(tmp_path, finished, place, caplog):
    """In the length of the header, in the header's JSON, and in the tensors."""
    folder = shutil.copytree(finished[0], tmp_path / "copy")
    file = folder / "block_00001.safetensors"
    content = bytearray(file.read_bytes())
    content[place] ^= 1 << 2
    file.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        model, report = again(folder)
    assert caplog.text.count("block_00001.safetensors is damaged") == 1
    assert "this block is solved again" in caplog.text
    assert_same(model, finished[1])
    assert len(report.layers) == 9
    caplog.clear()
    again(folder)
    assert "damaged" not in caplog.text, "it has been written anew"


@pytest.mark.parametrize("damage", [lambda file: file.write_bytes(b""), lambda file: file.write_bytes(b"\x00" * 400)])
def test_a_file_that_is_no_block_is_solved_again(tmp_path, finished, damage, caplog):
    folder = shutil.copytree(finished[0], tmp_path / "copy")
    damage(folder / "block_00000.safetensors")
    assert_same(again(folder)[0], finished[1])
    assert "block_00000.safetensors is damaged" in caplog.text


def test_a_block_under_the_number_of_another_is_solved_again(tmp_path, finished, caplog):
    folder = shutil.copytree(finished[0], tmp_path / "copy")
    shutil.copy(folder / "block_00000.safetensors", folder / "block_00001.safetensors")
    assert_same(again(folder)[0], finished[1])
    assert "block_00001.safetensors is damaged (its checksum" in caplog.text


def test_damaged_settings_are_refused_by_name(tmp_path, finished):
    folder = shutil.copytree(finished[0], tmp_path / "copy")
    (folder / "settings.json").write_text("{")
    with pytest.raises(ValueError, match=r"settings.json is damaged .*use another work_dir, or remove that folder"):
        again(folder)


def test_a_second_run_in_one_work_dir_is_refused_while_the_first_is_at_work(tmp_path):
    model, second = seeded(), []

    def start_another(*_):
        with pytest.raises(ValueError, match=rf"work_dir {tmp_path} is in use by another run \(process \d+ on"):
            prune(seeded(), work_dir=tmp_path, method="wanda")
        second.append(True)

    handle = model.layers[1].left.register_forward_pre_hook(start_another)
    prune(model, work_dir=tmp_path, **OPTIONS)
    handle.remove()
    assert second
    assert_same(again(tmp_path)[0], model)


def test_of_runs_that_start_at_once_one_owns_the_work_dir(tmp_path):
    found, barrier = [], threading.Barrier(4)

    def note(what):
        found.append(what)
        if len(found) == 4:
            done.set()

    def start(number):
        barrier.wait()
        try:
            with FinishedBlocks.open(tmp_path, {"number": number}):
                note(number)
                done.wait(10)
        except ValueError as error:
            note(str(error))

    done = threading.Event()
    threads = [threading.Thread(target=start, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(isinstance(one, int) for one in found) == 1
    assert sum("is in use by another run" in str(one) for one in found) == 3


def test_a_run_that_failed_frees_its_work_dir(tmp_path):
    model = seeded()
    handle = killed_in(model.layers[1].out, 0)
    with pytest.raises(KilledError):
        prune(model, work_dir=tmp_path, **OPTIONS)
    handle.remove()
    whole = seeded()
    prune(whole, **OPTIONS)
    assert_same(again(tmp_path)[0], whole)


def test_where_files_cannot_be_locked_one_line_says_so(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("prox24_lightning.utils.file_lock.fcntl", None)
    again(tmp_path)
    assert f"work_dir {tmp_path} cannot be locked" in caplog.text


@pytest.mark.parametrize("dense_target", [0.0, 0.5])
def test_two_runs_share_an_offload_folder(tmp_path, dense_target):
    """A second run, on other batches, begins and ends while the first is at work."""
    alone, model, other = seeded(), seeded(), batches(seed=7)
    prune(alone, dense_target=dense_target, **OPTIONS)
    calls = []

    def start_another(*_):
        if not calls:
            calls.append(True)
            assert list(tmp_path.iterdir()), "the first run has files there"
            prune(seeded(), other, offload=str(tmp_path), **OPTIONS)

    handle = model.layers[1].left.register_forward_pre_hook(start_another)
    prune(model, offload=str(tmp_path), dense_target=dense_target, **OPTIONS)
    handle.remove()
    assert calls
    assert_same(model, alone)
    assert not list(tmp_path.iterdir())


def test_hidden_states_in_one_folder_stay_apart(tmp_path):
    first, second = HiddenStates(str(tmp_path)), HiddenStates(str(tmp_path))
    first.append(torch.zeros(2))
    second.append(torch.ones(2))
    assert first[0].tolist() == [0, 0]
    second.close()
    assert first[0].tolist() == [0, 0]
    first.close()
    assert not list(tmp_path.iterdir())


def test_a_failed_run_leaves_no_offloaded_files(tmp_path):
    model = seeded()
    handle = killed_in(model.layers[1].out, 0)
    with pytest.raises(KilledError):
        prune(model, offload=str(tmp_path), dense_target=0.5, **OPTIONS)
    handle.remove()
    assert not list(tmp_path.iterdir())
