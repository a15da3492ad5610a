"""Tests of the Triton kernel on a CPU: ``TRITON_INTERPRET=1 pytest tests/solvers/interpreted``."""

from __future__ import annotations

import os

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]
