"""Runs over two processes against runs of one: DDP, FSDP2 and tensor parallelism, both strategies.

On CPUs over gloo, and with ``-m gpu`` on two GPUs over NCCL. One pair of processes does all the work of a device; the
tests look at what it left.

Runs that must be equal train in float64 by SGD. A rounding error of the last digit decides between two masks that are
nearly as good, the row then becomes another one, and all that is pruned later with it: in float32 a few percent of the
last block's mask differ, and no tolerance tells that from a fault. In float64 masks are the same, and weights equal to
1e-4 (inputs hardly vary in some directions, in which the refit is free). AdamW would divide gradients that are zero but
for rounding by themselves.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from experts import MixtureModel
from new_processes import spawn
from parallel_runs import FEATURES, FREEZE, FROZEN, LAYERS, MIDDLE, SOLVES, START, Cases, Decoder, fit, join, read
from torch import nn

from prox24_lightning import Distillation, SparsityMonitor
from prox24_lightning.mask import is_24
from prox24_lightning.oneshot import prune_layerwise
from prox24_lightning.sparsify.strategies.progressive import shared_calls

pytestmark = [pytest.mark.timeout(900), pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")]

PROGRESSIVE, POST_STEP = {}, {"strategy": "post_step"}
SOLVED, MOVED = {"reconstruction_steps": 0, "double": True}, {**POST_STEP, "double": True}
EQUAL = {
    "ddp solved": ("ddp", SOLVED),
    "fsdp2 solved": ("fsdp2", SOLVED),
    "tensor solved": ("tensor", SOLVED),
    "ddp post_step": ("ddp", MOVED),
    "fsdp2 post_step": ("fsdp2", MOVED),
    "tensor post_step": ("tensor", MOVED),
}
"""Runs that give what one process gives; without reconstruction, which sums in float32."""
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
ON_CPU = ("fsdp2 solved", "tensor solved", "tensor", "fsdp2 policy")
"""On CPUs each run takes a while; others are in :mod:`test_prox24_sharded` and :mod:`test_prox24_ddp`."""
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


def work(rank, folder, device):
    join(device)
    cases = Cases(folder / f"rank{rank}.pt")

    def run(name):
        parallel, options = runs_of(device)[name]
        if name == "fsdp2 solved":
            cases.run(name, lambda: monitored(parallel, device, folder / "fsdp2"))
        else:
            cases.run(name, lambda: fit(parallel, device, **options))

    compiled = [name for name in runs_of(device) if "compiled" in name]  # they take longest
    for name in runs_of(device):
        if name not in compiled:
            run(name)
    for name, source in (("resumed", "fsdp2"), ("grown", "one")):
        for step in (MIDDLE, FROZEN):
            path = folder / source / f"step={step}.ckpt"
            cases.run(f"{name} from {step}", lambda p=path: fit("fsdp2", device, resume=p, **SOLVED))
    cases.run("cut batches", lambda: with_cut_batches(device))
    cases.run("experts", lambda: fit("fsdp2", device, model=Experts, strategy="progressive"))
    cases.run("distillation", lambda: distilled("fsdp2", device))
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
    return fit(parallel, device, also=(distillation,), **MOVED)


def monitored(parallel, device, folder):
    monitor = SparsityMonitor(every_n_steps=1, summary=False, progress_bar=False, overview=False)
    found = fit(parallel, device, also=(monitor,), folder=folder, **SOLVED)
    history = monitor.histories.get("prox24")
    return {**found, "series": {} if history is None else {**history.series, "groups_24": history.groups_24}}


def pruned(device):
    torch.manual_seed(0)
    place = torch.device("cuda", dist.get_rank() if dist.is_initialized() else 0) if device == "gpu" else "cpu"
    model = Decoder().double().to(place)
    batches = [torch.randn(2, 8, FEATURES).double().to(place) for _ in range(4)]
    report = prune_layerwise(model, batches, progress=False, dense_target=0.5, steps=50)
    weights = {name: value.cpu() for name, value in model.state_dict().items()}
    return {"weights": weights, "tokens": report.layers[0].tokens}


@pytest.fixture(scope="module", params=DEVICES)
def left(request, tmp_path_factory):
    """What the processes left: the device, its folder, and a function that reads a case of a rank."""
    device = request.param
    folder = tmp_path_factory.mktemp(device)
    one = Cases(folder / "one.pt")
    one.run("solved", lambda: monitored("", device, folder / "one"))
    if device == "gpu":
        one.run("post_step", lambda: fit("", device, **MOVED))
    one.run("", lambda: fit("", device))
    one.run("distillation", lambda: distilled("", device))
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
    return float(torch.cat(equal).double().mean())


def largest_difference(found, expected):
    return max(float((found["weights"][name] - value).abs().max()) for name, value in expected["weights"].items())


def check_equal(found, expected):
    print(share_of_equal(found, expected), largest_difference(found, expected))
    assert share_of_equal(found, expected) == 1
    assert largest_difference(found, expected) < 1e-4


@pytest.mark.parametrize("name", [*EQUAL, *ALIKE])
def test_both_ranks_choose_the_same_masks_at_every_freeze(left, name):
    device, folder = left
    skip_unless_run(device, name)
    first, second = both(folder, name)
    assert first["hashes"] == second["hashes"]
    freezes = 1 if "post_step" in name else SOLVES
    assert len(first["hashes"]) == freezes, first["hashes"]
    assert first["hashes"][-1][:2] == (FREEZE, LAYERS)
    assert START < first["hashes"][0][0] <= FREEZE
    assert first["warnings"] == second["warnings"] == []
    for mask in first["masks"].values():
        assert is_24(mask.float())


@pytest.mark.parametrize("name", EQUAL)
def test_two_ranks_give_what_one_process_gives(left, name):
    device, folder = left
    skip_unless_run(device, name)
    found, _ = both(folder, name)
    check_equal(found, read(folder / "one.pt", name.split()[1]))


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
    found, _ = both(folder, f"resumed from {step}")
    unbroken, _ = both(folder, "fsdp2 solved")
    assert share_of_equal(found, unbroken) == 1
    assert largest_difference(found, unbroken) <= (1e-4 if device == "gpu" else 0)


@pytest.mark.parametrize("step", [MIDDLE, FROZEN])
def test_two_ranks_read_what_one_process_wrote(left, step):
    _, folder = left
    found, _ = both(folder, f"grown from {step}")
    expected = read(folder / "one.pt", "solved")
    if step == FROZEN:
        check_equal(found, expected)
    else:
        assert share_of_equal(found, expected) > 0.9, "both ranks calibrate with what the one had recorded before"


@pytest.mark.parametrize("step", [MIDDLE, FROZEN])
def test_one_process_reads_what_two_ranks_wrote(left, step):
    device, folder = left
    found = fit("", device, resume=folder / "fsdp2" / f"step={step}.ckpt", **SOLVED)
    expected, _ = both(folder, "fsdp2 solved")
    check_equal(found, expected)


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
    _, folder = left
    found, _ = both(folder, "distillation")
    check_equal(found, read(folder / "one.pt", "distillation"))


def test_a_monitor_measures_the_parts_of_all_ranks(left):
    device, folder = left
    found, _ = both(folder, "fsdp2 solved")
    expected = read(folder / "one.pt", "solved")
    for name in ("groups_24", "zeros_2", "retained_squared_norm", "mask_flips"):
        seen, wanted = (torch.tensor(one["series"][name]) for one in (found, expected))
        torch.testing.assert_close(seen, wanted, rtol=0, atol=2e-2 if device == "gpu" else 1e-5, equal_nan=True)


def test_prune_layerwise_on_two_devices(left):
    _, folder = left
    found, _ = both(folder, "prune_layerwise")
    expected = read(folder / "one.pt", "prune_layerwise")
    assert found["tokens"] == expected["tokens"]
    for one in (found, expected):
        matrices = {name: value for name, value in one["weights"].items() if value.dim() == 2 and "blocks" in name}
        one["masks"] = {name: value != 0 for name, value in matrices.items()}
    check_equal(found, expected)
