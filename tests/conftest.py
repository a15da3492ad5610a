"""What holds for all tests: one thread a process, and no deadline for a single example of Hypothesis.

The tensors of the tests are tiny, and threads that wait for each other are slow.
"""

from __future__ import annotations

import os

from hypothesis import settings

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is loaded, and for the processes that tests start

settings.register_profile("prox24", deadline=None)  # how long an example takes depends on the machine
settings.load_profile("prox24")
