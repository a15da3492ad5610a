"""vLLM: packed folders in ``vllm serve FOLDER`` and ``LLM(FOLDER)``.

vLLM finds :func:`register` by the entry point ``vllm.general_plugins`` and calls it in every process of its own;
importing this package imports nothing.
"""

from __future__ import annotations


def register() -> None:
    """Tell vLLM about ``quant_method: prox24``; calling it again changes nothing."""
    from prox24_lightning.integrations.vllm import plugin  # noqa: F401
