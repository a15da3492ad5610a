"""Runs over two processes against runs of one: DDP, FSDP2 and tensor parallelism, both strategies.

On CPUs over gloo, and with ``-m gpu`` on two GPUs over NCCL. One pair of processes does all the work of a device; the
tests look at what it left.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from experts import MixtureModel
from parallel_runs import FEATURES, FREEZE, START, Cases, Decoder, fit, join, read
from sharded_runs import spawn
from torch import nn

from prox24_lightning import Distillation, SparsityMonitor
from prox24_lightning.mask import is_24
from prox24_lightning.oneshot import prune_layerwise
from prox24_lightning.sparsify.strategies.progressive import shared_calls

pytestmark = [pytest.mark.timeout(900), pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")]

MIDDLE, FROZEN = 12, 30
STEPS_OF_FILES = {"cpu": (MIDDLE,), "gpu": (MIDDLE, FROZEN)}
"""Steps at which checkpoints are read: one block is sparse, and all are."""
PROGRESSIVE, SOLVED, POST_STEP = {}, {"reconstruction_steps": 0}, {"strategy": "post_step"}
EQUAL = {
    "ddp solved": ("ddp", SOLVED),
    "fsdp2 solved": ("fsdp2", SOLVED),
    "tensor solved": ("tensor", SOLVED),
    "ddp post_step": ("ddp", POST_STEP),
    "fsdp2 post_step": ("fsdp2", POST_STEP),
    "tensor post_step": ("tensor", POST_STEP),
}
"""Runs that give what one process gives."""
ALIKE = {
    "ddp": ("ddp", PROGRESSIVE),
    "fsdp2": ("fsdp2", PROGRESSIVE),
    "tensor": ("tensor", PROGRESSIVE),
    "fsdp2 bf16": ("fsdp2", {"precision": "bf16-mixed"}),
    "fsdp2 policy": ("fsdp2", {"policy": True}),
    "tensor bf16": ("tensor", {"precision": "bf16-mixed"}),
    "ddp bf16 compiled": ("ddp", {"precision": "bf16-mixed", "compiled": True}),
    "fsdp2 bf16 compiled post_step": ("fsdp2", {"precision": "bf16-mixed", "compiled": True, **POST_STEP}),
}
"""Runs whose batches, precision or compiled code round otherwise; each with what it is compared with on one process."""
ON_CPU = ("fsdp2 solved", "tensor solved", "fsdp2", "tensor", "fsdp2 policy")
"""On CPUs each run takes long; others are in :mod:`test_prox24_sharded` and :mod:`test_prox24_ddp`."""
LIMITS = {"cpu": 700, "gpu": 200}
"""Seconds that the processes have."""
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.slow),
    pytest.param(
        "gpu",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
        ],
    ),
]


class Experts(nn.Module):
    """A mixture of experts between two linear layers, as the decoder has them."""

    def __init__(self) -> None:
        super().__init__()
        inner = MixtureModel()
        self.embed, self.blocks, self.head = nn.Linear(FEATURES, 8), inner.blocks, nn.Linear(8, 4)

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def runs_of(device):
    return {name: run for name, run in {**EQUAL, **ALIKE}.items() if device == "gpu" or name in ON_CPU}


def skip_unless_run(device, name):
    if name not in runs_of(device):
        pytest.skip("runs on GPUs only")


def skip_unless_read(device, step):
    if step not in STEPS_OF_FILES[device]:
        pytest.skip("runs on GPUs only")


def work(rank, folder, device):
    join(device)
    cases = Cases(folder / f"rank{rank}.pt")

    def run(name):
        parallel, options = runs_of(device)[name]
        kept = folder / "fsdp2" if name == "fsdp2" else None
        cases.run(name, lambda: fit(parallel, device, folder=kept, **options))

    compiled = [name for name in runs_of(device) if "compiled" in name]  # they take longest
    for name in runs_of(device):
        if name not in compiled:
            run(name)
    for name, source in (("resumed", "fsdp2"), ("grown", "one")):
        for step in STEPS_OF_FILES[device]:
            path = folder / source / f"step={step}.ckpt"
            cases.run(f"{name} from {step}", lambda p=path: fit("fsdp2", device, resume=p))
    cases.run("cut batches", lambda: with_cut_batches(device))
    cases.run("experts", lambda: fit("fsdp2", device, model=Experts, strategy="progressive"))
    cases.run("distillation", lambda: distilled("fsdp2", device))
    cases.run("monitor", lambda: monitored("fsdp2", device))
    cases.run("prune_layerwise", lambda: pruned(device))
    for name in compiled:
        run(name)
    dist.destroy_process_group()


def with_cut_batches(device):
    """Batches of this size are not cut but for this."""
    before, shared_calls.POSITIONS = shared_calls.POSITIONS, 1
    try:
        return fit("ddp", device)
    finally:
        shared_calls.POSITIONS = before


def distilled(parallel, device):
    distillation = Distillation(0.5, features=0.5, verbose=False)
    return fit(parallel, device, also=(distillation,), **POST_STEP)


def monitored(parallel, device):
    monitor = SparsityMonitor(every_n_steps=1, summary=False, progress_bar=False, overview=False)
    found = fit(parallel, device, also=(monitor,), **SOLVED)
    history = monitor.histories.get("prox24")
    return {**found, "series": {} if history is None else {**history.series, "groups_24": history.groups_24}}


def pruned(device):
    torch.manual_seed(0)
    place = torch.device("cuda", dist.get_rank() if dist.is_initialized() else 0) if device == "gpu" else "cpu"
    model = Decoder().to(place)
    batches = [torch.randn(2, 8, FEATURES).to(place) for _ in range(4)]
    report = prune_layerwise(model, batches, progress=False, dense_target=0.5, steps=50)
    weights = {name: value.cpu() for name, value in model.state_dict().items()}
    return {"weights": weights, "tokens": report.layers[0].tokens}


@pytest.fixture(scope="module", params=DEVICES)
def left(request, tmp_path_factory):
    """What the processes left: the device, its folder, and a function that reads a case of a rank."""
    device = request.param
    folder = tmp_path_factory.mktemp(device)
    one = Cases(folder / "one.pt")
    one.run("solved", lambda: fit("", device, **SOLVED))
    one.run("post_step", lambda: fit("", device, **POST_STEP))
    one.run("", lambda: fit("", device, folder=folder / "one"))
    one.run("distillation", lambda: distilled("", device))
    one.run("monitor", lambda: monitored("", device))
    one.run("prune_layerwise", lambda: pruned(device))
    try:
        spawn(work, folder, device, seconds=LIMITS[device])
    except TimeoutError as error:
        print(error)  # the tests of cases that have not run fail
    return device, folder


def both(folder, name):
    first, second = (read(folder / f"rank{rank}.pt", name) for rank in (0, 1))
    assert all(torch.equal(value, second["weights"][key]) for key, value in first["weights"].items())
    return first, second


def share_of_equal(found, expected):
    """Share of the entries of all masks that are equal."""
    assert found["masks"].keys() == expected["masks"].keys()
    equal = [(mask == expected["masks"][name]).flatten() for name, mask in found["masks"].items()]
    return float(torch.cat(equal).float().mean())


def largest_difference(found, expected):
    return max(float((found["weights"][name] - value).abs().max()) for name, value in expected["weights"].items())


@pytest.mark.parametrize("name", [*EQUAL, *ALIKE])
def test_both_ranks_choose_the_same_masks_at_every_freeze(left, name):
    device, folder = left
    skip_unless_run(device, name)
    first, second = both(folder, name)
    assert first["hashes"] == second["hashes"]
    freezes = 1 if "post_step" in name else 3
    assert len(first["hashes"]) == freezes, first["hashes"]
    assert first["hashes"][-1][:2] == (FREEZE, 18)
    assert START < first["hashes"][0][0] <= FREEZE
    assert first["warnings"] == second["warnings"] == []
    for mask in first["masks"].values():
        assert is_24(mask.float())


@pytest.mark.parametrize("name", EQUAL)
def test_two_ranks_give_what_one_process_gives(left, name):
    device, folder = left
    skip_unless_run(device, name)
    found, _ = both(folder, name)
    expected = read(folder / "one.pt", name.split()[1])
    print(name, share_of_equal(found, expected), largest_difference(found, expected))
    assert share_of_equal(found, expected) > (0.995 if device == "gpu" else 0.9999)
    assert largest_difference(found, expected) < (2e-2 if device == "gpu" else 1e-4)


@pytest.mark.parametrize("name", ALIKE)
def test_precision_and_compiled_code_change_little(left, name):
    device, folder = left
    skip_unless_run(device, name)
    found, _ = both(folder, name)
    expected = read(folder / "one.pt", "post_step" if "post_step" in name else "")
    print(name, share_of_equal(found, expected), largest_difference(found, expected))
    assert share_of_equal(found, expected) > 0.9


@pytest.mark.parametrize("step", [MIDDLE, FROZEN])
def test_a_resumed_run_ends_as_the_unbroken_one(left, step):
    device, folder = left
    skip_unless_read(device, step)
    found, _ = both(folder, f"resumed from {step}")
    unbroken, _ = both(folder, "fsdp2")
    assert found["hashes"][-1] == unbroken["hashes"][-1]
    assert largest_difference(found, unbroken) <= (1e-4 if device == "gpu" else 0)


@pytest.mark.parametrize("step", [MIDDLE, FROZEN])
def test_two_ranks_read_what_one_process_wrote(left, step):
    device, folder = left
    skip_unless_read(device, step)
    found, _ = both(folder, f"grown from {step}")
    expected = read(folder / "one.pt", "")
    assert share_of_equal(found, expected) > (0.9 if step == MIDDLE else 0.9999)


@pytest.mark.parametrize("step", [MIDDLE, FROZEN])
def test_one_process_reads_what_two_ranks_wrote(left, step):
    device, folder = left
    skip_unless_read(device, step)
    found = fit("", device, resume=folder / "fsdp2" / f"step={step}.ckpt")
    expected, _ = both(folder, "fsdp2")
    assert share_of_equal(found, expected) > (0.9 if step == MIDDLE else 0.9999)


def test_batches_that_are_cut_lead_to_masks_that_are_as_good(left):
    _, folder = left
    first, second = both(folder, "cut batches")
    assert first["hashes"] == second["hashes"]
    whole = read(folder / "one.pt", "")
    assert 0.6 < share_of_equal(first, whole) < 1, "fewer tokens choose other masks"


def test_sharded_experts(left):
    _, folder = left
    first, second = both(folder, "experts")
    assert first["hashes"] == second["hashes"]
    experts = {name: mask for name, mask in first["masks"].items() if mask.dim() == 3}
    assert len(experts) == 4
    assert first["warnings"] == second["warnings"] == [], "the experts' inputs are seen"
    assert all(is_24(mask.float()) for mask in experts.values())


def test_distillation_of_a_sharded_model(left):
    device, folder = left
    found, _ = both(folder, "distillation")
    expected = read(folder / "one.pt", "distillation")
    assert largest_difference(found, expected) < (2e-2 if device == "gpu" else 1e-4)


def test_a_monitor_measures_the_parts_of_all_ranks(left):
    device, folder = left
    found, _ = both(folder, "monitor")
    expected = read(folder / "one.pt", "monitor")
    for name in ("groups_24", "zeros_2", "retained_squared_norm", "mask_flips"):
        seen, wanted = (torch.tensor(one["series"][name]) for one in (found, expected))
        torch.testing.assert_close(seen, wanted, rtol=0, atol=5e-3 if device == "gpu" else 1e-3, equal_nan=True)


def test_prune_layerwise_on_two_devices(left):
    _, folder = left
    found, _ = both(folder, "prune_layerwise")
    expected = read(folder / "one.pt", "prune_layerwise")
    assert found["tokens"] == expected["tokens"]
    weights = [name for name, value in expected["weights"].items() if value.dim() == 2 and "blocks" in name]
    same = [((found["weights"][name] != 0) == (expected["weights"][name] != 0)).float().mean() for name in weights]
    assert min(same) > 0.9
    assert same[0] > 0.999, "of the first layers nothing differs but rounding"
