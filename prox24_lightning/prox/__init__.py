"""The 2:4 proximal operator, its penalty, and the strength at which a group becomes 2:4; torch only.

``prox_24`` runs one fused Triton kernel where it can (contiguous float32, bfloat16 and float16 weights on a CUDA GPU
of compute capability 8.0 or newer) and batched torch operations elsewhere; :func:`prox_path` says which path runs,
:func:`why_batched` why. :class:`MultiTensorProx` takes all the weights of a model in one launch.
"""

from prox24_lightning.prox.block import BlockMethod, BlockTrace
from prox24_lightning.prox.critical import critical_strength_24
from prox24_lightning.prox.dispatch import prox_path, why_batched
from prox24_lightning.prox.functional import block_convergence, prox_24, prox_block, settle_24
from prox24_lightning.prox.multi_tensor import MultiTensorProx
from prox24_lightning.prox.penalty import penalty_24
from prox24_lightning.prox.reference import prox_24_reference

__all__ = [
    "BlockMethod",
    "BlockTrace",
    "MultiTensorProx",
    "block_convergence",
    "critical_strength_24",
    "penalty_24",
    "prox_24",
    "prox_24_reference",
    "prox_block",
    "prox_path",
    "settle_24",
    "why_batched",
]
