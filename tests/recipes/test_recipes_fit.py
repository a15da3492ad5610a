"""Every recipe through the command line: a few steps at a tiny size, from dense to 2:4."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from prox24_lightning.cli.main import main
from prox24_lightning.finetune import weights_checksum
from prox24_lightning.io.pretrained import Pretrained
from prox24_lightning.mask import is_24

pytestmark = pytest.mark.slow

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
SHORT = [
    "--trainer.max_steps=10",
    "--trainer.val_check_interval=5",
    "--trainer.limit_val_batches=2",
    "--trainer.enable_progress_bar=false",
    "--trainer.log_every_n_steps=1",
    "--trainer.accelerator=cpu",
]
METRICS = {"digits": "val_acc", "bytelm": "val_ppl", "text_classifier": "val_f1", "causal_lm": "val_loss_chains"}


@pytest.mark.parametrize("recipe", list(TINY))
def test_recipe_ends_2_4_and_logs_its_way(recipe, tmp_path, encoder_folder, llama_folder):
    logger = [f"--trainer.logger.init_args.save_dir={tmp_path}", "--trainer.logger.init_args.version=only"]
    tiny = [option.format(e=encoder_folder, l=llama_folder) for option in TINY[recipe]]
    main(["fit", "--config", str(CONFIGS / f"{recipe}.yaml"), *SHORT, *logger, *tiny])

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


@pytest.mark.parametrize(
    "recipe, geometry, dims",
    [
        ("digits", "block", (0, 1)),
        ("bytelm", "column", (0,)),
        ("text_classifier", "block", (0, 1)),
        ("causal_lm", "column", (0,)),
    ],
)
def test_recipe_ends_2_4_in_another_geometry(recipe, geometry, dims, tmp_path, encoder_folder, llama_folder):
    config = yaml.safe_load((CONFIGS / f"{recipe}.yaml").read_text())
    callbacks = config["trainer"]["callbacks"]
    (prox,) = (entry for entry in callbacks if entry["class_path"] == "prox24_lightning.Prox24")
    prox["init_args"]["geometry"] = geometry
    prox["init_args"].pop("reorder_inputs", None)  # inputs are ordered along rows alone
    config["trainer"]["callbacks"] = [entry for entry in callbacks if "ConvertAndBenchmark" not in entry["class_path"]]
    (monitor,) = (entry for entry in callbacks if entry["class_path"] == "prox24_lightning.SparsityMonitor")
    monitor["init_args"] |= {"overview": False, "histograms_every_n_steps": 0, "figures_every_n_steps": 0}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    logger = [f"--trainer.logger.init_args.save_dir={tmp_path}", "--trainer.logger.init_args.version=only"]
    tiny = [option.format(e=encoder_folder, l=llama_folder) for option in TINY[recipe]]
    main(["fit", "--config", str(path), *SHORT, *logger, *tiny])
    state = torch.load(tmp_path / recipe / "only" / "checkpoints" / "last.ckpt", weights_only=True)
    engine = next(value for key, value in state["callbacks"].items() if key.startswith("Prox24"))
    assert engine["phase"] == "frozen"
    assert len(engine["masks"]) >= 2
    for name in engine["masks"]:
        for dim in dims:
            assert is_24(state["state_dict"][name], dim=dim), name


def test_a_teacher_is_trained_and_a_2_4_model_learns_from_it(tmp_path, llama_folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = yaml.safe_load((CONFIGS / "causal_lm.yaml").read_text())
    config["trainer"]["callbacks"] = config["trainer"]["callbacks"][:2]  # a checkpoint and Prox24
    config["trainer"]["callbacks"][1]["init_args"]["reconstruction_steps"] = 2
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(config))
    tiny = [option.format(l=llama_folder) for option in TINY["causal_lm"]]
    states = {}
    for name, folder in (("causal_lm_teacher", ""), ("causal_lm_distilled", "only/checkpoints")):
        configs = ["--config", "base.yaml", "--config", str(CONFIGS / f"{name}.yaml")]
        main(["fit", *configs, *SHORT, *tiny, "--trainer.logger.init_args.version=only"])
        states[name] = torch.load(tmp_path / "runs" / name / folder / "last.ckpt", weights_only=True)
    teacher, distilled = states.values()
    assert not any(key.startswith(("Prox24", "Distillation")) for key in teacher["callbacks"])
    model = Pretrained(llama_folder).model()
    began = weights_checksum(model)
    model.load_state_dict({key.removeprefix("model."): value for key, value in teacher["state_dict"].items()})
    assert distilled["callbacks"]["Distillation"]["teacher_checksum"] == weights_checksum(model) != began
    assert is_24(distilled["state_dict"]["model.model.layers.0.mlp.up_proj.weight"])
