"""One thread a process: the tensors of the tests are tiny, and threads that wait for each other are slow."""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is loaded, and for the processes that tests start
