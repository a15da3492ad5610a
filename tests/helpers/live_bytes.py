"""How much memory tensors take at most while a block runs, on any device, counted by torch's own dispatch."""

from __future__ import annotations

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """``peak``: the most bytes that tensors held at one time which the block made or used."""

    def __init__(self):
        super().__init__()
        self.peak = 0
        self._live = {}

    def count(self, tensors):
        """Count these too, for as long as they live."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._live[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                self._live[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
        self._live = {place: held for place, held in self._live.items() if not held[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._live.values()))
        return result
