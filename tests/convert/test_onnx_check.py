"""A pruned model exported to ONNX keeps its zeros, and the checker says which nodes TensorRT takes for sparse."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from prox24_lightning.convert import check_onnx
from prox24_lightning.mask import mask_24
from prox24_lightning.weights.selection import select_weights

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
# The exporter warns of torch's own use of a class that is going away.
pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.:FutureWarning")


class Net(nn.Module):
    """A convolution, a linear layer on matrices (exported as Gemm), and two on sequences (as MatMul)."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1)
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 12)
        self.odd = nn.Linear(6, 4)

    def forward(self, x):
        x = torch.relu(self.conv(x)).mean(-1)
        x = torch.relu(self.second(torch.relu(self.first(x.transpose(1, 2)))))
        return self.odd(x.mean(1)[:, :6])


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    torch.manual_seed(0)
    model, path = Net().eval(), tmp_path_factory.mktemp("onnx") / "net.onnx"
    with torch.no_grad():
        for weight in select_weights(model, skip=["second"]).chosen:
            weight.parameter.mul_(mask_24(weight.parameter, dim=weight.dim))
    torch.onnx.export(model, (torch.randn(2, 4, 6, 6),), path, dynamo=True, verbose=False)
    return model, path


def test_every_node_is_judged_by_its_own_input_channels(exported):
    conv, first, second, odd = check_onnx(exported[1])
    assert [node.kind for node in (conv, first, second, odd)] == ["Conv", "MatMul", "MatMul", "Gemm"]
    assert (conv.is_24, first.is_24, second.is_24, odd.is_24) == (True, True, False, False)
    assert (first.shape, first.dim) == ((8, 8), 0)
    assert "24 of 24 groups have more than two non-zeros" in second.problem
    assert odd.problem == "6 input channels do not divide by 4"


def test_zeros_are_the_models_own(exported):
    model, path = exported
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}
    assert torch.equal(torch.from_numpy(stored["conv.weight"].copy()), model.conv.weight.detach())
    matrix = stored[check_onnx(path)[1].weight]
    assert torch.equal(torch.from_numpy(matrix.copy()).T, model.first.weight.detach())


def test_gemm_is_read_in_both_orders():
    weight = torch.randn(8, 4)
    weight = weight * mask_24(weight, dim=0)
    for transposed in (0, 1):
        values = (weight.T if transposed else weight).contiguous().numpy()
        node = onnx.helper.make_node("Gemm", ["x", "w"], ["y"], transB=transposed)
        graph = onnx.helper.make_graph([node], "g", [], [], [onnx.numpy_helper.from_array(values, "w")])
        [found] = check_onnx(onnx.helper.make_model(graph))
        assert (found.is_24, found.dim) == (True, transposed)


def test_without_onnx_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ImportError, match=r"pip install prox24_lightning\[onnx\]"):
        check_onnx("x.onnx")
