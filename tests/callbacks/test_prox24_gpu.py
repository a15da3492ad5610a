"""Prox24 on one GPU: every strategy of Lightning that one GPU can run ends as the plain one does, and resumes."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from parallel_runs import fit
from sharded_runs import ShardedModule
from tiny_runs import StatefulLoader, quiet_trainer, tiny_loader

from prox24_lightning import Prox24, is_24
from prox24_lightning.weights.sharded import gathered

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed from"),
    pytest.mark.filterwarnings("ignore:GPU available but not used"),  # the same run on the CPU, to compare
    # Lightning builds DDP on a side stream; torch 2.11 says so at the first backward pass.
    pytest.mark.filterwarnings("ignore:The AccumulateGrad node.s stream does not match"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*"),
]

ACCELERATOR = "gpu"
TARGETS = ["model.0", "model.2"]
STEPS, START, FREEZE, CUT = 12, 2, 8, 5


def run(folder, host, strategy, precision, *, resume=None):
    """Weights and masks at the end, whole and on the CPU; a checkpoint of every step lies in ``folder``."""
    seed_everything(0, verbose=False)
    prox = Prox24(START, FREEZE, strategy=strategy, targets=TARGETS, verbose=False)
    saving = ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    module = ShardedModule("fsdp2" if host == "fsdp2" else "")
    trainer = quiet_trainer(
        accelerator=ACCELERATOR,
        strategy=ModelParallelStrategy(1, 1) if host == "fsdp2" else host,
        precision=precision,
        max_steps=STEPS,
        max_epochs=-1,
        callbacks=[prox, saving],
        enable_checkpointing=True,
    )
    trainer.fit(module, StatefulLoader(tiny_loader(STEPS)), ckpt_path=resume)
    weights = {name: gathered(value.detach()).cpu() for name, value in module.named_parameters()}
    return weights, {name: gathered(mask).cpu() for name, mask in prox.masks.items()}


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("strategy", ["progressive", "post_step"])
@pytest.mark.parametrize("host", ["ddp", "fsdp2"])
def test_one_gpu_gives_the_same_by_every_strategy(tmp_path, host, strategy, precision):
    if host == "fsdp2" and precision == "bf16-mixed":
        pytest.skip("Lightning's ModelParallelStrategy knows no autocast")
    plain, masks = run(tmp_path / "plain", "auto", strategy, precision)
    found, found_masks = run(tmp_path / host, host, strategy, precision)
    assert set(masks) == {f"{target}.weight" for target in TARGETS}
    for name, mask in masks.items():
        assert torch.equal(found_masks[name], mask), name
        assert is_24(found[name]), name
    for name, value in plain.items():
        torch.testing.assert_close(found[name], value, atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("strategy", ["progressive", "post_step"])
def test_a_resumed_run_on_a_gpu_equals_the_unbroken_one(tmp_path, strategy, precision):
    unbroken, _ = run(tmp_path / "unbroken", "auto", strategy, precision)
    resumed, _ = run(
        tmp_path / "resumed", "auto", strategy, precision, resume=tmp_path / "unbroken" / f"step={CUT}.ckpt"
    )
    assert [name for name, value in unbroken.items() if not torch.equal(resumed[name], value)] == []


@pytest.mark.parametrize("options", [{"reconstruction_steps": 0}, {"strategy": "post_step"}])
def test_a_run_in_float64_gives_on_a_gpu_what_it_gives_on_a_cpu(options):
    """In float32 a rounding error decides between masks that are nearly as good."""
    cpu, found = (fit("", device, double=True, **options) for device in ("cpu", ACCELERATOR))
    assert [name for name, mask in cpu["masks"].items() if not torch.equal(found["masks"][name], mask)] == []
    for name, value in cpu["weights"].items():
        torch.testing.assert_close(found["weights"][name], value, atol=1e-4, rtol=0, msg=name)
