"""A product on cuSPARSELt whose descriptors, algorithm and plan are made once and used at every call.

A product here is ``y = x W^T + bias`` for x ``(tokens, in_features)``, W ``(out_features, in_features)`` 2:4 along its
inputs and y ``(tokens, out_features)``, all row-major: in the library's terms W is the structured A, x read transposed
is B, and the result is written column by column.

The numbers of enumerations are those of ``cusparseLt.h`` (0.6 to 0.8) and ``cusparse.h``.
"""

from __future__ import annotations

import ctypes
from contextlib import suppress
from ctypes import byref, c_float, c_int, c_int64, c_size_t, c_uint32, c_void_p

import torch

from prox24_lightning.convert.kernels.cusparselt.bindings import Library, opaque

_COLUMN_MAJOR, _ROW_MAJOR = 1, 2  # cusparseOrder_t
_NOT_TRANSPOSED, _TRANSPOSED = 0, 1  # cusparseOperation_t
_COMPUTE_32I, _COMPUTE_32F = 0, 2  # cusparseComputeType
_ALIGNMENT = 16
_TYPES = {torch.float16: 2, torch.bfloat16: 14, torch.int8: 3, torch.float8_e4m3fn: 28}  # cudaDataType
_BIAS_POINTER = 8  # cusparseLtMatmulDescAttribute_t
_CONFIG_ID, _CONFIG_MAX_ID = 0, 1  # cusparseLtMatmulAlgAttribute_t
_ZERO = byref(c_float(0))


class Plan:
    """A prepared product for one shape, padded token count, bias and algorithm; see :meth:`run`.

    Args:
        library: from :func:`load`.
        device: index of the GPU.
        dtype: float16 or bfloat16, of bias and output.
        shape: (out_features, in_features).
        tokens: a multiple of :data:`TOKEN_MULTIPLE`.
        bias: address of the bias in ``dtype``, which must stay where it is; 0 for none.
        algorithm: one of :attr:`algorithms`; None takes the library's default.
        values: dtype of weight and input if it is not ``dtype``: float8_e4m3fn or int8.
        factor: of the product, a power of two: sums of 8-bit values are as large as float16 cannot hold.

    Raises:
        CusparseltError: if the library refuses the shape or the algorithm.
    """

    def __init__(
        self,
        library: Library,
        device: int,
        dtype: torch.dtype,
        shape: tuple[int, int],
        tokens: int,
        bias: int = 0,
        algorithm: int | None = None,
        values: torch.dtype | None = None,
        factor: float = 1.0,
    ) -> None:
        out_features, in_features = shape
        kind, out_kind = c_int(_TYPES[values or dtype]), c_int(_TYPES[dtype])
        compute = c_int(_COMPUTE_32I if values == torch.int8 else _COMPUTE_32F)
        call = library.call
        self._library = library
        self._handle = handle = library.handle(device)
        self._weight, self._rows, self._result, self._product, self._choice, self._plan = (opaque() for _ in range(6))
        align = c_uint32(_ALIGNMENT)
        call(
            "cusparseLtStructuredDescriptorInit",
            *(handle, self._weight, c_int64(out_features), c_int64(in_features), c_int64(in_features)),
            *(align, kind, c_int(_ROW_MAJOR), c_int(0)),
        )
        call(
            "cusparseLtDenseDescriptorInit",
            *(handle, self._rows, c_int64(tokens), c_int64(in_features), c_int64(in_features)),
            *(align, kind, c_int(_ROW_MAJOR)),
        )
        call(
            "cusparseLtDenseDescriptorInit",
            *(handle, self._result, c_int64(out_features), c_int64(tokens), c_int64(out_features)),
            *(align, out_kind, c_int(_COLUMN_MAJOR)),
        )
        call(
            "cusparseLtMatmulDescriptorInit",
            *(handle, self._product, c_int(_NOT_TRANSPOSED), c_int(_TRANSPOSED)),
            *(self._weight, self._rows, self._result, self._result, compute),
        )
        if bias:
            pointer = c_void_p(bias)
            call(
                "cusparseLtMatmulDescSetAttribute",
                *(handle, self._product, c_int(_BIAS_POINTER), byref(pointer), c_size_t(ctypes.sizeof(pointer))),
            )
        call("cusparseLtMatmulAlgSelectionInit", handle, self._choice, self._product, c_int(0))
        if algorithm is not None:
            value = c_int(algorithm)
            call("cusparseLtMatmulAlgSetAttribute", handle, self._choice, c_int(_CONFIG_ID), byref(value), c_size_t(4))
        call("cusparseLtMatmulPlanInit", handle, self._plan, self._product, self._choice)
        size = c_size_t()
        call("cusparseLtMatmulGetWorkspace", handle, self._plan, byref(size))
        self.workspace_bytes = size.value
        self._factor = c_float(factor)
        self._addresses = ctypes.addressof(handle), ctypes.addressof(self._plan), ctypes.addressof(self._factor)

    def run(self, weight: int, rows: int, result: int, workspace: int, stream: int) -> None:
        """Launch the product; every argument is an address (``Tensor.data_ptr()``), ``stream`` a CUDA stream."""
        status = self._library.multiply(
            *self._addresses, weight, rows, _ZERO, result, result, workspace, byref(c_void_p(stream)), 1
        )
        if status:
            self._library.fail("cusparseLtMatmul", status)

    @property
    def algorithms(self) -> int:
        """Number of algorithms that the library has for this product; they are numbered from 0."""
        value = c_int()
        arguments = self._handle, self._choice, c_int(_CONFIG_MAX_ID), byref(value), c_size_t(4)
        self._library.call("cusparseLtMatmulAlgGetAttribute", *arguments)
        return value.value

    def __del__(self) -> None:
        if hasattr(self, "_addresses"):
            with suppress(Exception):  # at the end of the process the library may be gone already
                self._library.call("cusparseLtMatmulPlanDestroy", self._plan)
