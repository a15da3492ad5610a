"""Small optimizers that remember weights, wrap another optimizer, or are not elementwise, as public ones do."""

from __future__ import annotations

import torch
from torch.optim import SGD, AdamW, Optimizer


def _run(closure):
    if closure is not None:
        with torch.enable_grad():
            closure()


class Masters(SGD):
    """Updates fp32 masters in its state and copies them into the weights."""

    @torch.no_grad()
    def step(self, closure=None):
        _run(closure)
        for group in self.param_groups:
            for p in group["params"]:
                master = self.state[p].setdefault("master", p.detach().float().clone())
                p.copy_(master.sub_(p.grad.float(), alpha=group["lr"]))


class OuterMasters(SGD):
    """Trains fp32 copies of the weights by their own gradients, and copies them into the weights after each step."""

    def __init__(self, params, **arguments):
        self.weights = list(params)
        super().__init__([p.detach().float().clone().requires_grad_() for p in self.weights], **arguments)

    def zero_grad(self, set_to_none=True):
        for p in self.weights:
            p.grad = None

    @torch.no_grad()
    def step(self, closure=None):
        _run(closure)
        masters = self.param_groups[0]["params"]
        for p, master in zip(self.weights, masters, strict=True):
            master.grad = p.grad.float()
        super().step()
        for p, master in zip(self.weights, masters, strict=True):
            p.copy_(master)


class MasterList(SGD):
    """Keeps fp32 masters in a list beside its state, as older mixed-precision optimizers do."""

    def __init__(self, params, lr):
        super().__init__(params, lr=lr)
        self.fp32 = [[p.detach().float().clone() for p in group["params"]] for group in self.param_groups]

    @torch.no_grad()
    def step(self, closure=None):
        _run(closure)
        for group, masters in zip(self.param_groups, self.fp32, strict=True):
            for p, master in zip(group["params"], masters, strict=True):
                p.copy_(master.sub_(p.grad.float(), alpha=group["lr"]))


class SlowWeights(Optimizer):
    """Lookahead (arXiv 1907.08610): wraps an optimizer, goes half way back to slow weights in every fifth step."""

    def __init__(self, inner):
        self.inner = inner
        super().__init__(inner.param_groups, {})
        self.steps = 0
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["slow"] = p.detach().clone()

    @torch.no_grad()
    def step(self, closure=None):
        self.inner.step(closure)
        self.steps += 1
        for p, state in self.state.items() if self.steps % 5 == 0 else ():
            p.copy_(state["slow"].lerp_(p, 0.5))


class ScheduleFree(SGD):
    """Schedule-free SGD (arXiv 2405.15682): weights are y in training, x after ``eval()``; z is in the state."""

    beta = 0.9

    @torch.no_grad()
    def step(self, closure=None):
        _run(closure)
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1
            for p in group["params"]:
                z = self.state[p].setdefault("z", p.detach().clone())
                p.lerp_(z, 1 / group["k"])
                p.sub_(p.grad, alpha=group["lr"] * (1 - self.beta * (1 - 1 / group["k"])))
                z.sub_(p.grad, alpha=group["lr"])

    @torch.no_grad()
    def eval(self):
        for p, state in self.state.items():
            p.lerp_(state["z"], 1 - 1 / self.beta)


class Shampoo(SGD):
    """Keeps the sums of g g^T and g^T g (arXiv 1802.09568); of a square weight they have its shape."""

    @torch.no_grad()
    def step(self, closure=None):
        _run(closure)
        for p in (p for group in self.param_groups for p in group["params"] if p.ndim == 2):
            for key, outer in (("left", p.grad @ p.grad.T), ("right", p.grad.T @ p.grad)):
                self.state[p][key] = self.state[p].get(key, 0) + outer
        super().step()


class Rotated(AdamW):
    """Adam in a rotated basis (SOAP, arXiv 2409.11321): its second moments are of other coordinates than the weight."""

    @torch.no_grad()
    def step(self, closure=None):
        super().step(closure)
        for p in (p for group in self.param_groups for p in group["params"] if p.ndim == 2):
            self.state[p]["bases"] = [torch.eye(size) for size in p.shape]


class SharpnessAware(Optimizer):
    """SAM (arXiv 2010.01412): two half steps around two backward passes, or one step with a closure."""

    def __init__(self, params, base, **arguments):
        super().__init__(params, {})
        self.base = base(self.param_groups, **arguments)
        self.param_groups = self.base.param_groups

    @torch.no_grad()
    def first_step(self):
        for p in (p for group in self.param_groups for p in group["params"]):
            self.state[p]["old"] = p.detach().clone()
            p.add_(p.grad, alpha=0.05)
        self.zero_grad()

    @torch.no_grad()
    def second_step(self):
        for p in (p for group in self.param_groups for p in group["params"]):
            p.copy_(self.state[p]["old"])
        self.base.step()
        self.zero_grad()

    def step(self, closure):
        closure()
        self.first_step()
        closure()
        self.second_step()


class Orthogonal(SGD):
    """Muon-like: every update is an orthogonal matrix, dense also where gradients are zero."""

    @torch.no_grad()
    def step(self, closure=None):
        _run(closure)
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.ndim == 2):
                buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                u, _, vh = torch.linalg.svd(buffer.lerp_(p.grad, 0.1), full_matrices=False)
                p.sub_(u @ vh, alpha=group["lr"])
