"""Output heads are found by a model's structure, whatever they are called."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from lightning.pytorch import LightningModule
from torch import nn

from prox24_lightning.weights.heads import output_heads
from prox24_lightning.weights.selection import select_weights

TEXT: dict[str, Any] = {
    "vocab_size": 64,
    "num_labels": 4,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "pad_token_id": 0,
}
BART: dict[str, Any] = {
    "vocab_size": 64,
    "num_labels": 4,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
}
T5: dict[str, Any] = {
    "vocab_size": 64,
    "num_labels": 4,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 1,
    "num_heads": 4,
    "tie_word_embeddings": False,
}
IMAGE: dict[str, Any] = {"image_size": 32, "num_labels": 4}
VIT = {
    **IMAGE,
    "patch_size": 8,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
STAGES = {**IMAGE, "embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1]}
SWIN = {**IMAGE, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}
WAVE = {**TEXT, "conv_dim": (16, 16), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2}
WAVE |= {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "classifier_proj_size": 16}
CLIP = {"projection_dim": 24}
CLIP |= {"text_config": {k: v for k, v in TEXT.items() if k != "num_labels"}, "vision_config": VIT}

MODELS: dict[str, tuple[Any, set[str], set[str]]] = {
    # class: configuration, heads, layers beside the head that are pruned
    "BertForSequenceClassification": (tf.BertConfig(**TEXT), {"classifier"}, {"bert.pooler.dense"}),
    "BertForTokenClassification": (tf.BertConfig(**TEXT), {"classifier"}, set()),
    "BertForQuestionAnswering": (tf.BertConfig(**TEXT), {"qa_outputs"}, set()),
    "BertForPreTraining": (
        tf.BertConfig(**TEXT),
        {"cls.predictions.decoder", "cls.seq_relationship"},
        {"cls.predictions.transform.dense"},
    ),
    "RobertaForSequenceClassification": (
        tf.RobertaConfig(**TEXT),
        {"classifier.out_proj"},
        {"classifier.dense"},
    ),
    "ElectraForPreTraining": (
        tf.ElectraConfig(embedding_size=32, **TEXT),
        {"discriminator_predictions.dense_prediction"},
        {"discriminator_predictions.dense"},
    ),
    "DistilBertForSequenceClassification": (
        tf.DistilBertConfig(vocab_size=64, dim=32, n_layers=1, n_heads=4, hidden_dim=64, num_labels=4),
        {"classifier"},
        {"pre_classifier"},
    ),
    "DebertaV2ForSequenceClassification": (tf.DebertaV2Config(**TEXT), {"classifier"}, {"pooler.dense"}),
    "BartForSequenceClassification": (
        tf.BartConfig(**BART),
        {"classification_head.out_proj"},
        {"classification_head.dense"},
    ),
    "BartForConditionalGeneration": (tf.BartConfig(**BART), {"lm_head"}, set()),
    "T5ForConditionalGeneration": (tf.T5Config(**T5), {"lm_head"}, set()),
    "T5ForSequenceClassification": (
        tf.T5Config(**T5),
        {"classification_head.out_proj"},
        {"classification_head.dense"},
    ),
    "LlamaForSequenceClassification": (tf.LlamaConfig(**TEXT), {"score"}, {"model.layers.0.mlp.down_proj"}),
    "ViTForImageClassification": (tf.ViTConfig(**VIT), {"classifier"}, set()),
    "DeiTForImageClassificationWithTeacher": (
        tf.DeiTConfig(**VIT),
        {"cls_classifier", "distillation_classifier"},
        set(),
    ),
    "SwinForImageClassification": (tf.SwinConfig(**SWIN), {"classifier"}, set()),
    "ConvNextForImageClassification": (tf.ConvNextConfig(**{**STAGES, "num_stages": 2}), {"classifier"}, set()),
    "ResNetForImageClassification": (tf.ResNetConfig(**STAGES), {"classifier.1"}, set()),
    "MobileNetV2ForImageClassification": (tf.MobileNetV2Config(depth_multiplier=0.25, **IMAGE), {"classifier"}, set()),
    "Wav2Vec2ForCTC": (tf.Wav2Vec2Config(**WAVE), {"lm_head"}, set()),
    "Wav2Vec2ForSequenceClassification": (tf.Wav2Vec2Config(**WAVE), {"classifier"}, {"projector"}),
    "CLIPModel": (tf.CLIPConfig(**CLIP), {"text_projection", "visual_projection"}, set()),
    "GPT2DoubleHeadsModel": (
        tf.GPT2Config(n_layer=1, n_embd=32, n_head=4, vocab_size=64, num_labels=4, tie_word_embeddings=False),
        {"lm_head", "multiple_choice_head.summary"},
        {"transformer.h.0.mlp.c_proj"},
    ),
    "BertModel": (tf.BertConfig(**TEXT), set(), {"pooler.dense"}),
}


@pytest.mark.parametrize("name", MODELS)
def test_heads_of_transformers_stay_dense(name):
    config, heads, beside = MODELS[name]
    model = getattr(tf, name)(config)
    names = {module: key for key, module in model.named_modules()}
    assert {names[head] for head in output_heads(model)} == heads
    selection = select_weights(model)
    chosen = {weight.module_name for weight in selection}
    assert not chosen & heads
    assert beside <= chosen
    reasons = {weight.name: weight.reason for weight in selection.skipped}
    dense = [reasons[f"{head}.weight"] for head in heads if f"{head}.weight" in reasons]
    assert all(reason == "output head" or reason.startswith("tied") or "divide" in reason for reason in dense)


class TimmLike(nn.Module):
    """The head is registered before the body, and its container does nothing but hold it."""

    def __init__(self) -> None:
        super().__init__()
        self.top = nn.Sequential()
        self.top.add_module("fc", nn.Linear(32, 32))
        self.body = nn.Conv2d(8, 32, 3)

    def get_classifier(self) -> nn.Module:
        return self.top.fc


class Pretrained(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(32, 32)
        self.body = nn.Linear(32, 32)
        self.pretrained_cfg = {"classifier": ("last",)}


class TorchvisionLike(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer1 = nn.Sequential(nn.Conv2d(8, 32, 3), nn.BatchNorm2d(32))
        self.fc = nn.Linear(32, 12)


class Vgg(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(8, 32, 3), nn.ReLU())
        self.classifier = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))


class TwoTasks(nn.Module):
    """Two outputs of one trunk, and no name that says so."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16))
        self.mean = nn.Linear(16, 4)
        self.deviation = nn.Linear(16, 4)


class Tasks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({"a": nn.Linear(16, 16), "b": nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))})
        self.trunk = nn.Linear(16, 16)


class OutputFirst(nn.Module):
    """Registered in another order than it runs: `out` is not found; `inner`, whose outputs it takes, is no head."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(16, 4)
        self.inner = nn.Linear(8, 16)


class AttentionHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(16, 4) for _ in range(4))
        self.proj = nn.Linear(16, 16)


class Language(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"attention": AttentionHeads()}) for _ in range(2))
        self.to_tokens = nn.Linear(16, 64)


class Gated(nn.Module):
    """Twice as many outputs as the next layer takes: halved and multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up = nn.Linear(16, 64)
        self.down = nn.Linear(32, 8)


class Task(LightningModule):
    def __init__(self, model: nn.Module, **attributes: Any) -> None:
        super().__init__()
        self.model = model
        for name, value in attributes.items():
            setattr(self, name, value)


def mlp(outputs: int = 4) -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, outputs))


OWN: dict[str, tuple[nn.Module, set[str]]] = {
    "get_classifier": (TimmLike(), {"top.fc"}),
    "pretrained_cfg": (Pretrained(), {"last"}),
    "nothing takes its outputs": (TorchvisionLike(), {"fc"}),
    "the last layer of a classifier": (Vgg(), {"classifier.2"}),
    "two outputs of one trunk": (TwoTasks(), {"mean", "deviation"}),
    "a dictionary of heads": (Tasks(), {"heads.a", "heads.b.1"}),
    "an output that is registered first": (OutputFirst(), set()),
    "heads of attention": (Language(), {"to_tokens"}),
    "a gate is no head": (Gated(), {"down"}),
    "inside a LightningModule": (Task(TorchvisionLike()), {"model.fc"}),
    "a head in a sequence": (nn.Sequential(mlp(16), Vgg()), {"1.classifier.2"}),
    "heads in a sequence of blocks": (nn.Sequential(AttentionHeads(), AttentionHeads()), set()),
    "beside another model": (Task(TorchvisionLike(), teacher=mlp(12)), {"model.fc"}),
    "a model whose outputs another takes": (Task(Gated(), decoder=mlp()), set()),
    "a LightningModule's own head": (
        Task(mlp(16), head=nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16))),
        {"head.1"},
    ),
    "a LightningModule's own layer": (Task(mlp(16), out=nn.Linear(16, 4)), {"out"}),
    "as many outputs as classes": (Task(mlp(4), num_classes=4), {"model.2"}),
    "a bare sequence": (mlp(), set()),
    "a bare sequence in a LightningModule": (Task(mlp()), set()),
}


@pytest.mark.parametrize("kind", OWN)
def test_heads_of_own_models_stay_dense(kind):
    model, heads = OWN[kind]
    names = {module: key for key, module in model.named_modules()}
    assert {names[head] for head in output_heads(model)} == heads
    assert not {weight.module_name for weight in select_weights(model)} & heads


def test_a_compiled_model_has_the_same_head():
    model = TorchvisionLike()
    model.fc = torch.compile(model.fc, backend="eager")
    assert {weight.name for weight in select_weights(model)} == {"layer1.0.weight"}


def test_a_head_is_taken_when_a_target_names_it():
    assert [weight.name for weight in select_weights(TorchvisionLike(), targets=["fc"])] == ["fc.weight"]


@pytest.mark.parametrize("method", [lambda layer: layer, lambda: 1 / 0, lambda: "fc", lambda: None])
def test_a_method_of_the_same_name_with_another_meaning_is_ignored(method):
    model = TorchvisionLike()
    model.get_classifier = model.get_output_embeddings = method
    assert {weight.name for weight in select_weights(model)} == {"layer1.0.weight"}


def test_a_head_of_an_own_class_stays_dense_as_well():
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 8))

    model = nn.Sequential(nn.Linear(8, 8), Product())
    model.get_output_embeddings = lambda: model[1]
    assert output_heads(model) == {model[1]}


@pytest.mark.parametrize("classes", [[3, 5], {"a": 3}, "four", torch.tensor([1, 2])])
def test_classes_that_are_no_number_are_no_obstacle(classes):
    assert not output_heads(Task(mlp(), num_classes=classes))
