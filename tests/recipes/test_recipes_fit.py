"""Every recipe through the command line: a few steps at a tiny size, from dense to 2:4."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from prox24_lightning.cli import main

CONFIGS = Path(__file__).parent.parent.parent / "configs"

TINY = {
    "digits": ["--model.channels=4", "--model.hidden=8", "--data.batch_size=16"],
    "bytelm": ["--model.width=16", "--model.heads=2", "--model.context=16", "--data.context=16", "--data.batch_size=4"],
    "text_classifier": ["--data.max_length=8", "--data.batch_size=4", "--model.model={e}", "--data.model={e}"],
    "causal_lm": [
        *(f'--{part}.model={{{{"name": "{{l}}", "package": false, "file": null}}}}' for part in ("model", "data")),
        "--data.training=tiny_language.Chains",
        '--data.evaluation={{"chains": {{"class_path": "tiny_language.Chains"}}}}',
        "--data.length=16",
        "--data.batch_size=4",
        "--data.eval_sequences=8",
        "--data.cache=null",
        "--trainer.precision=32-true",
    ],
}
METRICS = {"digits": "val_acc", "bytelm": "val_ppl", "text_classifier": "val_f1", "causal_lm": "val_loss_chains"}


@pytest.mark.parametrize("recipe", list(TINY))
def test_recipe_ends_2_4_and_logs_its_way(recipe, tmp_path, encoder_folder, llama_folder):
    short = ["--trainer.max_steps=10", "--trainer.val_check_interval=5", "--trainer.limit_val_batches=2"]
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.log_every_n_steps=1", "--trainer.accelerator=cpu"]
    logger = [f"--trainer.logger.init_args.save_dir={tmp_path}", "--trainer.logger.init_args.version=only"]
    tiny = [option.format(e=encoder_folder, l=llama_folder) for option in TINY[recipe]]
    main(["fit", "--config", str(CONFIGS / f"{recipe}.yaml"), *short, *quiet, *logger, *tiny])

    folder = tmp_path / recipe / "only"
    curves = EventAccumulator(str(folder)).Reload()
    names = set(curves.Tags()["scalars"])
    assert {"train_loss", "lr", "val_loss", METRICS[recipe]} <= names
    assert [event.step for event in curves.Scalars("train_loss")] == list(range(10))
    assert (folder / "config.yaml").is_file()
    state = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    masks = next(value for key, value in state["callbacks"].items() if key.startswith("Prox24"))
    assert masks, "the checkpoint holds the state of Prox24"
    linear = {
        "digits": "model.6",
        "bytelm": "model.blocks.0.up",
        "text_classifier": "model.bert.pooler.dense",
        "causal_lm": "model.model.layers.0.mlp.up_proj",
    }[recipe]
    weight = state["state_dict"][f"{linear}.weight"]
    assert max(weight.shape) <= 576, "the tiny options arrived"
    assert ((weight.unflatten(1, (-1, 4)) != 0).sum(-1) <= 2).all()
