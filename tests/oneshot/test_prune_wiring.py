"""Models whose blocks work in place, are compiled, or do not hand the hidden state straight on."""

from __future__ import annotations

import pytest
import torch
from tiny_blocks import WIDTH, prune
from torch import nn


class Residual(nn.Module):
    """Adds to its input, in place or not; calls its first layer twice."""

    def __init__(self, in_place):
        super().__init__()
        self.fc, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.in_place = in_place

    def forward(self, x):
        for _ in range(2):
            change = self.out(torch.tanh(self.fc(x)))
            x = x.add_(change) if self.in_place else x + change
        return x


@pytest.mark.parametrize("dense_target", [0.0, 0.5])
@pytest.mark.parametrize("whole", [False, True])
def test_blocks_that_work_in_place_give_the_same(dense_target, whole):
    models = []
    for in_place in (False, True):
        torch.manual_seed(0)
        parts = [Residual(in_place), *([] if whole else [Residual(in_place)])]
        models.append(nn.Sequential(*parts) if whole else nn.Sequential(nn.Sequential(*parts)))
    data = torch.randn(3, 40, WIDTH)
    for model in models:
        prune(model, list(data.clone()), dense_target=dense_target)
    for one, two in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(one, two)


class Inner(nn.Module):
    """What the blocks of :class:`Wired` add to their input, which the model may do for them."""

    def __init__(self, adds=False, pair=False):
        super().__init__()
        self.fc, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.adds, self.pair = adds, pair

    def forward(self, x, more=None):
        change = self.out(torch.tanh(self.fc(x if more is None else x + more)))
        result = x + change if self.adds else change
        return (result, change if more is None else more + change) if self.pair else result


class Wired(nn.Module):
    def __init__(self, wiring):
        super().__init__()
        self.blocks = nn.ModuleList(Inner(wiring == "chain", wiring == "carried") for _ in range(3))
        self.wiring = wiring

    def forward(self, x):
        first, second, third = self.blocks
        if self.wiring == "side by side":
            return torch.cat([first(x), second(x), third(x)], -1)
        if self.wiring == "reversed":
            return first(second(third(x)))
        if self.wiring == "in place":
            for block in self.blocks:
                x = block(x).add_(1)
            return x
        if self.wiring == "carried":
            more = None
            for block in self.blocks:
                x, more = block(x, more)
            return x
        return third(second(first(x))) if self.wiring == "chain" else self.outside(x)

    def outside(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x


def wired(wiring):
    torch.manual_seed(0)
    return Wired(wiring).eval()


WIRINGS = {
    "outside": "block blocks.1 is not called with what blocks.0 returned",
    "side by side": "block blocks.1 is not called with what blocks.0 returned",
    "in place": "block blocks.1 is not called with what blocks.0 returned",
    "reversed": "block blocks.2 is called before blocks.0",
    "carried": "block blocks.1 takes more than the hidden state from the block before it, and changes it",
}


@pytest.mark.parametrize("wiring", WIRINGS)
def test_blocks_that_are_no_chain_are_pruned_on_their_true_inputs(wiring, caplog):
    model, data = wired(wiring), list(torch.randn(3, 40, WIDTH))
    report = prune(model, iter(data), refine=None, method="wanda")
    assert f"{WIRINGS[wiring]}: the whole Wired is pruned as one block" in caplog.text
    dense = wired(wiring)
    assert len(report.layers) == 6
    for layer in report.layers:
        name = layer.name.removesuffix(".weight")
        seen = []
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        with torch.no_grad():
            for batch in data:
                model(batch)
        rows, wanted = torch.cat(seen), dense.get_submodule(name).weight
        lost = (rows @ (model.get_submodule(name).weight - wanted).T).square().sum() / (rows @ wanted.T).square().sum()
        assert layer.loss == pytest.approx(lost.item(), rel=1e-3)


def test_a_residual_outside_the_blocks_changes_nothing():
    models = wired("chain"), wired("outside")
    for model in models:
        prune(model, list(torch.randn(3, 40, WIDTH, generator=torch.Generator().manual_seed(1))), dense_target=0.5)
    for one, two in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one, two)


def test_named_blocks_that_are_no_chain_are_refused():
    with pytest.raises(
        ValueError, match=r"blocks='blocks' cannot be pruned one by one: block blocks.1 is not.*leave blocks= out"
    ):
        prune(wired("outside"), [torch.randn(40, WIDTH)], blocks="blocks")


def test_a_later_batch_that_takes_another_way_is_named():
    model = wired("chain")
    model.register_forward_pre_hook(
        lambda module, args: setattr(module, "wiring", "outside" if len(args[0]) == 5 else "chain")
    )
    with pytest.raises(ValueError, match=r"what blocks.0 returned in calibration batch 1, unlike before; leave out"):
        prune(model, [torch.randn(40, WIDTH), torch.randn(5, WIDTH)])


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(("change", "message"), [("weights", "dense_weights was"), ("last batch", "inputs was")])
def test_blocks_of_other_weights_or_data_are_not_taken_over(tmp_path, whole, change, message):
    data = list(torch.randn(3, 40, WIDTH))
    wiring = "outside" if whole else "chain"
    prune(wired(wiring), data, work_dir=tmp_path)
    model = wired(wiring)
    if change == "weights":
        model.blocks[2].out.weight.data[0, 0] += 0.1
    else:
        data[-1] = data[-1] + 0.1
    with pytest.raises(ValueError, match=message):
        prune(model, data, work_dir=tmp_path)


@pytest.mark.parametrize("in_place", [False, True])
def test_blocks_that_were_compiled_and_run_are_pruned_the_same(in_place):
    plain, compiled = wired("chain"), wired("chain")
    for number, block in enumerate(compiled.blocks):
        if in_place:
            block.compile(backend="eager")
        else:
            compiled.blocks[number] = torch.compile(block, backend="eager")
    data = torch.randn(3, 40, WIDTH)
    with torch.no_grad():
        compiled(data[0])
    prune(plain, list(data))
    assert len(prune(compiled, list(data)).layers) == 6
    for one, two in zip(plain.parameters(), compiled.parameters(), strict=True):
        assert torch.equal(one, two)


def test_layers_that_are_never_called_at_all_are_an_error():
    model = wired("chain")
    for block in model.blocks:
        block.forward = lambda x: x
    with pytest.raises(ValueError, match="the first calibration batch calls none of the 6 layers of Wired"):
        prune(model, [torch.randn(40, WIDTH)])


def test_an_encoder_of_torch_takes_a_padding_mask():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, 2, 32, batch_first=True), 2)
    mask = torch.zeros(2, 6, dtype=torch.bool)
    mask[0, 4:] = True
    report = prune(encoder, [{"src": torch.randn(2, 6, WIDTH), "src_key_padding_mask": mask}])
    assert [layer.name for layer in report.layers] == [f"layers.{i}.linear{j}.weight" for i in (0, 1) for j in (1, 2)]
    assert torch.backends.mha.get_fastpath_enabled()
