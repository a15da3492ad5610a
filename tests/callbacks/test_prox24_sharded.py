"""Invariant 5, sharded: two ranks with FSDP2 or tensor parallelism give what one process gives, and read its files.

One pair of processes does all the work; the tests look at what it left.
"""

from __future__ import annotations

import json
import warnings
from contextlib import suppress
from unittest.mock import patch

import pytest
import torch
from few_steps import few_solver_steps
from new_processes import spawn
from sharded_runs import FREEZE, STEPS, fit, gathered
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from prox24_lightning import ConvertAndBenchmark, RoundWeights, SparsityMonitor, load_masks, save_masks
from prox24_lightning.mask import is_24
from prox24_lightning.schedules import FRACTION_CURVES
from prox24_lightning.sparsify import PhasePlan, PostStepProx, Progressive, SparsityEngine
from prox24_lightning.sparsify.checks import check_weights
from prox24_lightning.sparsify.strategies.progressive import dense_block
from prox24_lightning.utils.distributed import check_same
from prox24_lightning.weights.selection import select_weights
from prox24_lightning.weights.sharded import runnable

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")]

RUNS = [(sharding, strategy) for sharding in ("fsdp2", "tensor") for strategy in ("progressive", "post_step")]
SAVED = {("fsdp2", "progressive"): True, ("fsdp2", "post_step"): False, ("tensor", "post_step"): True}
"""Runs that keep checkpoints -> whether these are whole files, or folders with a part a rank."""
MIDDLE, FROZEN = 5, 10
BUDGET = 0.7
"""Leaves one of the two layers dense."""
LIMITS = [(1 << 20, 1 << 20), (1 << 20, 0), (0, 0)]
"""Of the bytes that each rank may keep of what layers are called with in the dense reference."""
GROWN = [("post_step", MIDDLE), ("progressive", MIDDLE), ("progressive", FROZEN)]
"""From one process to two ranks."""


def work(rank, folder):
    for sharding, strategy in RUNS:
        kept = folder / f"{sharding}_{strategy}" if (sharding, strategy) in SAVED else None
        monitor = SparsityMonitor(every_n_steps=1, summary=False)
        also = [monitor, ConvertAndBenchmark(dirpath=folder, filename=f"{sharding}_{strategy}", verbose=False)]
        trainer, _, state = fit(sharding, strategy, kept, SAVED.get((sharding, strategy), True), also=also)
        torch.save(
            torch.tensor(monitor.histories["prox24"].groups_24), folder / f"seen_{sharding}_{strategy}.{rank}.pt"
        )
        torch.save(state, folder / f"{sharding}_{strategy}.{rank}.pt")
        if sharding == "tensor":
            prox = trainer.callbacks[0]
            save_masks(folder / f"{strategy}.safetensors", prox.weights, prox.masks)
            for weight in prox.weights:
                weight.parameter.data.add_(1.0)
            load_masks(trainer.lightning_module, folder / f"{strategy}.safetensors", expect="any")
            again = {f"{weight.name}": gathered(weight.parameter) for weight in prox.weights}
            torch.save(again, folder / f"again_{strategy}.{rank}.pt")
    for sharding in ("fsdp2", "tensor"):
        _, _, state = fit(sharding, "progressive", budget=BUDGET)
        torch.save(state, folder / f"{sharding}_budget.{rank}.pt")
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            _, _, state = fit(sharding, "post_step", also=[RoundWeights("int8", verbose=False)])
        torch.save(state, folder / f"{sharding}_rounded.{rank}.pt")
        said = [text for warning in said if "rounding" in (text := str(warning.message))]
        (folder / f"{sharding}_rounded.{rank}.json").write_text(json.dumps(said))
    for sharding, strategy in SAVED:
        for step in (MIDDLE, FROZEN):
            saved = folder / f"{sharding}_{strategy}" / f"step={step}.ckpt"
            _, _, state = fit(sharding, strategy, full=SAVED[sharding, strategy], resume=saved)
            torch.save(state, folder / f"{sharding}_{strategy}_from_{step}.{rank}.pt")
    for strategy, step in GROWN:
        _, _, state = fit("fsdp2", strategy, resume=folder / f"one_{strategy}" / f"step={step}.ckpt")
        torch.save(state, folder / f"fsdp2_{strategy}_from_one_{step}.{rank}.pt")
    words = {"cut": words_of_a_cut(), "drift": words_of_drift(rank), "run": words_of_a_run_that_drifts(rank)}
    words["begun by"] = module_that_begins_a_pass_after_an_error()
    (folder / f"words.{rank}.json").write_text(json.dumps(words))
    torch.save(uneven(rank), folder / f"uneven.{rank}.pt")
    torch.save({f"{limits}": kept_inputs(limits[rank]) for limits in LIMITS}, folder / f"kept.{rank}.pt")
    torch.distributed.destroy_process_group()


def words_of_a_cut():
    model = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 8))
    parallelize_module(model, init_device_mesh("cpu", (2,)), {"0": ColwiseParallel(), "1": RowwiseParallel()})
    try:
        check_weights(select_weights(model), {}, "prox24")
    except ValueError as error:
        return str(error)


def words_of_drift(rank):
    try:
        check_same({"a": torch.ones(3), "b": torch.full((3,), float(rank))}, "the masks", "cpu")
    except RuntimeError as error:
        return str(error)


def module_that_begins_a_pass_after_an_error():
    """FSDP2 waits for what was written into the shards where a forward pass begins."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    for part in (*model, model):
        fully_shard(part, mesh=init_device_mesh("cpu", (2,)))

    def end(module, args):
        raise ArithmeticError

    handle = model[1].register_forward_pre_hook(end)
    with runnable(model, model), suppress(ArithmeticError):
        model(torch.ones(2, 8))
    handle.remove()
    begun = []
    model[0].register_forward_pre_hook(lambda *_: begun.append(model._get_fsdp_state()._state_ctx.iter_forward_root))
    model[0](torch.ones(2, 8))
    return next(name for name, module in model.named_modules() if module._get_fsdp_state() is begun[0])


def words_of_a_run_that_drifts(rank):
    """Copies on two ranks, as DDP has them, that something has made different."""
    torch.manual_seed(rank)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    strategy = PostStepProx(None, FRACTION_CURVES["linear"])
    engine = SparsityEngine(select_weights(model).chosen, PhasePlan(0, 1), strategy)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    engine.bind([optimizer])
    model(torch.ones(2, 8)).sum().backward()
    try:
        optimizer.step()
    except RuntimeError as error:
        return str(error)


def uneven(rank):
    """Layers of three rows and of one: parts of different sizes, and one without entries."""
    found = {}
    for name, strategy in (
        ("progressive", Progressive),
        ("post_step", lambda model: PostStepProx(None, FRACTION_CURVES["linear"])),
    ):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 3), nn.Linear(3, 8), nn.Linear(8, 1))
        whole = {key: value.clone() for key, value in model.state_dict().items()}
        for layer in model:
            fully_shard(layer)
        fully_shard(model)
        weights = select_weights(model, targets=["0", "2"]).chosen
        engine = SparsityEngine(weights, PhasePlan(1, 4), strategy(model), metric="activation")
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        engine.bind([optimizer])
        generator = torch.Generator().manual_seed(0)
        for _ in range(6):
            x = torch.randn(2, 4, 8, generator=generator)[rank]
            engine.before_batch()
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        engine.state_dict()
        sizes = [tuple(mask.shape) for mask in engine.masks.values()]
        found[name] = {"weights": [gathered(weight.parameter) for weight in weights], "parts": sizes}
        assert not torch.equal(found[name]["weights"][0], whole["0.weight"])
    return found


def kept_inputs(limit):
    """Prune a model whose dense inputs fit into ``limit`` on this rank, and whose head belongs to the outermost FSDP2
    module; return its weights."""
    torch.manual_seed(0)
    blocks = (nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2))
    model = nn.Sequential(*blocks, nn.Linear(8, 4))
    for block in model[:2]:
        fully_shard(block)
    fully_shard(model)
    weights = select_weights(model, skip=["2"]).chosen
    engine = SparsityEngine(weights, PhasePlan(3, 3), Progressive(model, dense_target=0.5, reconstruction_steps=2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    engine.bind([optimizer])
    with patch.object(dense_block, "_KEPT_ON_CPU", limit), few_solver_steps():
        for _ in range(4):
            engine.before_batch()
            model(torch.randn(4, 8)).square().mean().backward()
            optimizer.step()
    engine.unbind()
    return [gathered(weight.parameter) for weight in weights]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    for strategy in ("progressive", "post_step"):
        _, _, state = fit("", strategy, folder / f"one_{strategy}")
        torch.save(state, folder / f"one_{strategy}.pt")
    _, _, state = fit("", "post_step", also=[RoundWeights("int8", verbose=False)])
    torch.save(state, folder / "one_rounded.pt")
    _, _, state = fit("", "progressive", budget=BUDGET)
    torch.save(state, folder / "one_budget.pt")
    spawn(work, folder)
    return folder


def read(path):
    return torch.load(path, weights_only=True)


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if name.startswith("mask"):
            assert torch.equal(found[name], value), name
        else:
            torch.testing.assert_close(found[name], value, rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("sharding", ["fsdp2", "tensor"])
def test_sharded_layers_that_stay_dense_are_those_of_one_process(folder, sharding):
    first, second = (read(folder / f"{sharding}_budget.{rank}.pt") for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert_close(first, read(folder / "one_budget.pt"))
    assert len([name for name in first if name.startswith("mask")]) == 1


@pytest.mark.parametrize("sharding, strategy", RUNS)
def test_a_sharded_run_gives_what_one_process_gives(folder, sharding, strategy):
    first, second = (read(folder / f"{sharding}_{strategy}.{rank}.pt") for rank in (0, 1))
    for rank in (0, 1):
        assert read(folder / f"seen_{sharding}_{strategy}.{rank}.pt")[-1] == 1
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert_close(first, read(folder / f"one_{strategy}.pt"))
    assert is_24(first["model.2.weight"])
    report = json.loads((folder / f"{sharding}_{strategy}.json").read_text())
    assert report["error"] is None
    assert {layer["name"] for layer in report["layers"]} >= {"model.0", "model.2"}


def test_fsdp2_rounds_gathered_weights_and_tensor_parallelism_trains_unrounded_by_name(folder):
    rounded, plain = read(folder / "one_rounded.pt"), read(folder / "one_post_step.pt")
    for sharding, expected, other in (("fsdp2", rounded, plain), ("tensor", plain, rounded)):
        first, second = (read(folder / f"{sharding}_rounded.{rank}.pt") for rank in (0, 1))
        assert all(torch.equal(first[name], second[name]) for name in first)
        for name in ("model.0.weight", "model.2.weight"):
            far = (other[name] - expected[name]).abs().max()
            assert (first[name] - expected[name]).abs().max() < 0.1 * far, (sharding, name)
    said = [json.loads((folder / f"{sharding}_rounded.0.json").read_text()) for sharding in ("fsdp2", "tensor")]
    assert said[0] == []
    assert len(said[1]) == 1
    assert "tensor parallelism cuts the weight" in said[1][0]


@pytest.mark.parametrize("step", [MIDDLE, FROZEN])
@pytest.mark.parametrize("sharding, strategy", SAVED)
def test_a_resumed_sharded_run_equals_the_unbroken_one_bit_for_bit(folder, sharding, strategy, step):
    unbroken = read(folder / f"{sharding}_{strategy}.1.pt")
    for rank in (0, 1):
        resumed = read(folder / f"{sharding}_{strategy}_from_{step}.{rank}.pt")
        assert [name for name in unbroken if not torch.equal(unbroken[name], resumed[name])] == []


@pytest.mark.parametrize("strategy, step", GROWN)
def test_two_ranks_read_what_one_process_wrote(folder, strategy, step):
    first, second = (read(folder / f"fsdp2_{strategy}_from_one_{step}.{rank}.pt") for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    if (strategy, step) == ("progressive", MIDDLE):
        # Both ranks take the batches that the one had recorded, so these weigh more beside the newer ones.
        assert all(is_24(first[f"model.{layer}.weight"]) for layer in (0, 2))
    else:
        assert_close(first, read(folder / f"one_{strategy}.pt"))


@pytest.mark.parametrize("sharding, strategy", [run for run, full in SAVED.items() if full])
def test_one_process_reads_what_two_ranks_wrote(folder, sharding, strategy):
    _, _, state = fit("", strategy, resume=folder / f"{sharding}_{strategy}" / f"step={MIDDLE}.ckpt")
    assert_close(state, read(folder / f"one_{strategy}.pt"))


def test_parts_of_uneven_sizes_and_without_entries(folder):
    first, second = (read(folder / f"uneven.{rank}.pt") for rank in (0, 1))
    for name, found in first.items():
        assert (found["parts"], second[name]["parts"]) == ([(2, 8), (1, 8)], [(1, 8), (0, 8)])
        assert all(is_24(weight) for weight in found["weights"])
        assert all(torch.equal(a, b) for a, b in zip(found["weights"], second[name]["weights"], strict=True))


def test_ranks_of_which_one_alone_has_memory_for_inputs_do_not_wait_for_each_other(folder):
    for rank in (0, 1):
        kept, mixed, rerun = read(folder / f"kept.{rank}.pt").values()
        assert all(map(is_24, kept))
        assert all(map(torch.equal, kept, mixed))
        assert all(map(torch.equal, kept, rerun))


def test_masks_of_sharded_weights_go_to_a_file_and_back(folder):
    for strategy in ("progressive", "post_step"):
        expected = read(folder / f"one_{strategy}.pt")
        for rank in (0, 1):
            for name, weight in read(folder / f"again_{strategy}.{rank}.pt").items():
                assert torch.equal(weight != 0, expected[name] != 0)


@pytest.mark.parametrize("rank", [0, 1])
def test_groups_cut_apart_and_masks_that_drifted_are_named(folder, rank):
    words = json.loads((folder / f"words.{rank}.json").read_text())
    assert "1.weight cannot be 2:4: its 12 entries along dimension 1 are sharded into parts of 6" in words["cut"]
    assert "the masks of 'b' differ: ranks [1] do not have what rank 0 has" in words["drift"]
    assert "the masks of '0.weight' differ: ranks [1] do not have what rank 0 has" in words["run"]


def test_a_call_that_an_error_ended_does_not_hold_up_the_next_pass(folder):
    assert json.loads((folder / "words.0.json").read_text())["begun by"] == "0"


def test_the_steps_of_this_file_hit_each_phase():
    assert MIDDLE < FREEZE < FROZEN < STEPS
