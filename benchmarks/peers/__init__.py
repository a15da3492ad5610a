"""Other published ways to a 2:4 model, as Lightning callbacks: what Prox24 is measured against."""

from benchmarks.peers.gradual_magnitude import GradualMagnitude
from benchmarks.peers.one_shot import OneShot
from benchmarks.peers.proxsparse import ProxSparse
from benchmarks.peers.sr_ste import SRSTE

__all__ = ["SRSTE", "GradualMagnitude", "OneShot", "ProxSparse"]
