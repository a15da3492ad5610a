"""LoRA adapters, and the frozen layers under them, stay dense: the remedy is to prune first and keep the zeros."""

from __future__ import annotations

import pytest
import transformers as tf
from peft import LoraConfig, get_peft_model
from torch import nn

from prox24_lightning.weights.selection import select_weights

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # of peft


def adapted(**arguments):
    config = tf.RobertaConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, num_labels=4
    )
    return get_peft_model(
        tf.RobertaForSequenceClassification(config), LoraConfig(r=8, target_modules=["query", "value"], **arguments)
    )


def reasons(selection):
    return {weight.name.split("self.")[-1]: weight.reason for weight in selection.skipped}


def test_adapters_and_their_base_stay_dense_with_the_remedy():
    selection = select_weights(adapted())
    assert not selection.chosen
    found = reasons(selection)
    assert found["query.lora_A.default.weight"].startswith("LoRA adapter")
    assert found["query.lora_B.default.weight"].startswith("LoRA adapter")
    assert found["query.base_layer.weight"].startswith("frozen (requires_grad=False) under a LoRA adapter: prune the")
    assert found["query.base_layer.weight"].endswith("prox24_lightning.finetune.MaskedLora")
    assert found["key.weight"] == "frozen (requires_grad=False)"


def test_what_trains_beside_adapters_is_pruned_but_a_warning_names_the_rest():
    selection = select_weights(adapted(modules_to_save=["classifier"]))
    assert {weight.name.rsplit("default.", 1)[-1] for weight in selection} == {"dense.weight"}
    assert "LoRA" in selection.warning()
    assert reasons(selection)["base_model.model.classifier.modules_to_save.default.out_proj.weight"] == "output head"


class Adapted(nn.Module):
    """An adapter that no library made."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.lora_A, self.lora_B = nn.Linear(8, 4, bias=False), nn.Linear(4, 8, bias=False)


def test_own_adapters_are_known_by_their_names():
    selection = select_weights(nn.Sequential(Adapted(), nn.Linear(8, 8)))
    assert {weight.name for weight in selection} == {"0.inner.weight", "1.weight"}
    with pytest.raises(ValueError, match="matches no weight"):
        select_weights(nn.Sequential(Adapted()), targets=["lora_C"])
    assert {w.name for w in select_weights(nn.Sequential(Adapted()), targets=["0.lora_A"])} == {"0.lora_A.weight"}
