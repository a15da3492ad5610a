"""Models in which orders of inputs are free: LLaMA, GPT-2 and a convolutional net."""

from __future__ import annotations

import torch
from torch import nn

IDS = torch.randint(0, 50, (2, 12), generator=torch.Generator().manual_seed(3))
IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))


class Residual(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.first = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.second = nn.Conv2d(16, channels, 3, padding=1)

    def forward(self, x):
        return torch.relu(x + self.second(torch.relu(self.norm(self.first(x)))))


class Net(nn.Module):
    """Two residual blocks, an inverted bottleneck with a depthwise convolution, and a classifier."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.one, self.two = Residual(8), Residual(8)
        self.expand, self.norm = nn.Conv2d(8, 32, 1), nn.BatchNorm2d(32)
        self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.project = nn.Conv2d(32, 8, 1)
        self.hidden, self.head = nn.Linear(8, 24), nn.Linear(24, 10)

    def forward(self, x):
        x = self.two(self.one(self.stem(x)))
        x = self.project(nn.functional.silu(self.depthwise(torch.relu(self.norm(self.expand(x))))))
        return self.head(torch.tanh(self.hidden(x.mean((2, 3)))))


def conv_net():
    torch.manual_seed(0)
    net = Net()
    net(IMAGES + 1)  # statistics that differ from channel to channel
    return net.eval(), lambda: net(IMAGES)


def llama(**kwargs):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**{**sizes, "num_hidden_layers": 2, "vocab_size": 50, **kwargs})
    model = LlamaForCausalLM(config).eval()
    return model, lambda: model(IDS, use_cache=False).logits


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 50, "n_positions": 16}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return model, lambda: model(IDS, use_cache=False).logits
