"""What Hopper's copy engine wants to know of a matrix: the driver's tensor map, passed to a kernel by value."""

from __future__ import annotations

import ctypes
from ctypes import c_int, c_uint32, c_uint64, c_void_p

from prox24_lightning.convert.kernels.nvrtc import check, driver

TensorMap = ctypes.c_ubyte * 128
"""As it stands among a kernel's parameters."""

_ALIGNMENT = 64
_UINT16 = 1  # CUtensorMapDataType
_PLAIN = 0  # CUtensorMapInterleave
_SWIZZLE_128 = 3  # CUtensorMapSwizzle
_L2_256 = 3  # CUtensorMapL2promotion
_ZEROS = 0  # CUtensorMapFloatOOBfill: outside of the matrix
_BOX_COLUMNS = 64  # 128 bytes, the widest that can be swizzled


def tensor_map(address: int, rows: int, columns: int, box_rows: int) -> ctypes.Array[ctypes.c_ubyte]:
    """The map of a row-major matrix of 16-bit entries, copied in boxes of ``box_rows`` rows and 64 columns, swizzled.

    Args:
        address: of the first entry, a multiple of 16.
        rows: of the matrix; a box beyond them brings zeros.
        columns: of the matrix, a multiple of 8.
        box_rows: at most 256.

    Raises:
        NvrtcError: if the driver cannot be bound or refuses.
    """
    memory = (ctypes.c_ubyte * (128 + _ALIGNMENT))()
    found = TensorMap.from_buffer(memory, -ctypes.addressof(memory) % _ALIGNMENT)
    status = driver().cuTensorMapEncodeTiled(
        *(ctypes.byref(found), c_int(_UINT16), c_uint32(2), c_void_p(address)),
        *((c_uint64 * 2)(columns, rows), (c_uint64 * 1)(columns * 2), (c_uint32 * 2)(_BOX_COLUMNS, box_rows)),
        *((c_uint32 * 2)(1, 1), c_int(_PLAIN), c_int(_SWIZZLE_128), c_int(_L2_256), c_int(_ZEROS)),
    )
    check(status, "cuTensorMapEncodeTiled")
    return found
