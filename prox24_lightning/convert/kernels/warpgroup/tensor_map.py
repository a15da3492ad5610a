"""Encode the driver's tensor map of a matrix, which Hopper's copy engine (TMA) reads and a kernel takes by value."""

from __future__ import annotations

import ctypes
from ctypes import c_int, c_uint32, c_uint64, c_void_p

from prox24_lightning.convert.kernels.cuda_driver import check, driver

TensorMap = ctypes.c_ubyte * 128
"""CUtensorMap, as a kernel's parameter."""

_ALIGNMENT = 64
_TYPES = {2: 1, 8: 4}  # bytes of an entry -> CUtensorMapDataType
_PLAIN = 0  # CUtensorMapInterleave
_SWIZZLES = {64: 2, 128: 3}  # bytes of a box's row -> CUtensorMapSwizzle; wider rows are not swizzled
_UNSWIZZLED = 0
_L2_256 = 3  # CUtensorMapL2promotion
_ZEROS = 0  # CUtensorMapFloatOOBfill: outside of the matrix


def encode_tensor_map(
    address: int, rows: int, columns: int, box_rows: int, box_columns: int = 64, entry_bytes: int = 2
) -> ctypes.Array[ctypes.c_ubyte]:
    """Return the map of a row-major matrix, copied in boxes; rows of 64 or 128 bytes of a box are swizzled.

    Args:
        address: of the first entry, a multiple of 16.
        rows: of the matrix; a box beyond them is filled with zeros.
        columns: of the matrix; rows have a multiple of 16 bytes.
        box_rows: at most 256.
        box_columns: at most 256.
        entry_bytes: 2 or 8.

    Raises:
        CudaError: if the driver cannot be loaded or refuses.
    """
    memory = (ctypes.c_ubyte * (128 + _ALIGNMENT))()
    swizzle = _SWIZZLES.get(box_columns * entry_bytes, _UNSWIZZLED)
    encoded = TensorMap.from_buffer(memory, -ctypes.addressof(memory) % _ALIGNMENT)
    status = driver().cuTensorMapEncodeTiled(
        *(ctypes.byref(encoded), c_int(_TYPES[entry_bytes]), c_uint32(2), c_void_p(address)),
        *((c_uint64 * 2)(columns, rows), (c_uint64 * 1)(columns * entry_bytes), (c_uint32 * 2)(box_columns, box_rows)),
        *((c_uint32 * 2)(1, 1), c_int(_PLAIN), c_int(swizzle), c_int(_L2_256), c_int(_ZEROS)),
    )
    check(status, "cuTensorMapEncodeTiled")
    return encoded
