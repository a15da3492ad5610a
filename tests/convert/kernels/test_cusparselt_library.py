"""Binding cuSPARSELt where there is none. No GPU needed."""

from __future__ import annotations

import pytest
import torch

from prox24_lightning.convert.kernels.cusparselt import bindings as cusparselt
from prox24_lightning.convert.kernels.cusparselt.bindings import support


def test_without_cusparselt_large_products_are_expanded():
    if torch.backends.cusparselt.is_available():
        pytest.skip("it is here")
    support.cache_clear()
    assert support(0) == ("expand", "torch was built without cuSPARSELt")
    with pytest.raises(cusparselt.CusparseltError, match="built without cuSPARSELt"):
        cusparselt.load()


def test_a_library_that_is_none_is_refused(tmp_path):
    with pytest.raises(cusparselt.CusparseltError, match="cannot be loaded"):
        cusparselt.Library(str(tmp_path / "libcusparseLt.so.0"))
    with pytest.raises(cusparselt.CusparseltError, match="lacks an entry"):
        cusparselt.Library("libc.so.6")
