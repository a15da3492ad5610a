"""Load and launch compiled CUDA kernels through the CUDA driver, bound with ctypes.

ctypes and not ``cuda-python``, for the reasons in :mod:`~prox24_lightning.convert.kernels.nvrtc`, and because a launch
is on the host's critical path: every layer launches once a token. Here it is one foreign call on a prepared structure.
"""

from __future__ import annotations

import ctypes
from ctypes import byref, c_int, c_uint, c_void_p
from functools import cache
from typing import Any

import torch

_MAX_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_DEFAULT_SHARED = 48 * 1024  # bytes of dynamic shared memory that need no attribute
_PROGRAMMATIC_SERIALIZATION = 6  # CUlaunchAttributeID


class CudaError(RuntimeError):
    """NVRTC or the CUDA driver cannot be loaded, or one of its calls failed."""


class _Attribute(ctypes.Structure):  # CUlaunchAttribute
    _fields_ = (("id", c_int), ("_pad", c_int), ("value", c_int), ("_rest", c_int * 15))

    def __init__(self, number: int, value: int) -> None:
        super().__init__(number, 0, value)


class _LaunchConfig(ctypes.Structure):  # CUlaunchConfig
    _fields_ = (
        *((name, c_uint) for name in ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z", "shared_bytes")),
        *(("stream", c_void_p), ("attributes", c_void_p), ("count", c_uint)),
    )


class CudaFunction:
    """One kernel of a compiled program, loaded on the current GPU.

    Args:
        code: from :func:`~prox24_lightning.convert.kernels.nvrtc.compile_program`.
        name: of an ``extern "C"`` kernel.
        parameters: its parameters, in order.
        threads: threads of a block.
        shared_bytes: dynamic shared memory of a block.
        early: let the kernel start before its predecessor in the stream has ended; the kernel itself waits for it
            (``griddepcontrol.wait``). Compute capability 9.0 or newer.

    Raises:
        CudaError: if the driver cannot be loaded or refuses the program.
    """

    def __init__(
        self,
        code: bytes,
        name: str,
        parameters: type[ctypes.Structure],
        threads: int,
        shared_bytes: int = 0,
        *,
        early: bool = False,
    ) -> None:
        library = driver()
        torch.cuda.current_stream().synchronize()  # from here on the GPU has a context
        module, self._function = c_void_p(), c_void_p()
        check(library.cuModuleLoadData(byref(module), code), "cuModuleLoadData")
        check(library.cuModuleGetFunction(byref(self._function), module, name.encode()), "cuModuleGetFunction")
        if shared_bytes > _DEFAULT_SHARED:
            check(library.cuFuncSetAttribute(self._function, _MAX_SHARED, shared_bytes), "cuFuncSetAttribute")
        self._launch = library.cuLaunchKernelEx
        self._threads, self._shared, self._parameters = threads, shared_bytes, parameters
        self._early = _Attribute(_PROGRAMMATIC_SERIALIZATION, 1)
        self._attributes = (ctypes.addressof(self._early), 1) if early else (None, 0)
        self._offsets = [getattr(parameters, name).offset for name, *_ in parameters._fields_]
        self._pointers = c_void_p * len(self._offsets)

    def __call__(self, grid: tuple[int, int, int], stream: int, *arguments: Any) -> None:
        """Launch ``grid`` blocks on a CUDA stream of the current GPU."""
        values = self._parameters(*arguments)
        start = ctypes.addressof(values)
        pointers = self._pointers(*[start + offset for offset in self._offsets])
        config = _LaunchConfig(*grid, self._threads, 1, 1, self._shared, stream, *self._attributes)
        status = self._launch(byref(config), self._function, pointers, None)
        if status:
            check(status, "cuLaunchKernelEx")


def driver_version() -> str:
    """Return the driver's version as NVML gives it, or else the CUDA version that the driver supports."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
        text = ctypes.create_string_buffer(96)
        if not library.nvmlInit_v2() and not library.nvmlSystemGetDriverVersion(text, c_uint(96)):
            return text.value.decode()
    except (OSError, AttributeError):
        pass
    number = c_int()
    check(driver().cuDriverGetVersion(byref(number)), "cuDriverGetVersion")
    return f"CUDA {number.value}"


@cache
def driver() -> Any:
    """Load the CUDA driver's library.

    Raises:
        CudaError: if there is none.
    """
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise CudaError(f"the CUDA driver cannot be loaded: {error}") from None
    library.cuLaunchKernelEx.argtypes = [c_void_p] * 4
    library.cuFuncSetAttribute.argtypes = [c_void_p, c_int, c_int]
    return library


def check(status: int, call: str) -> None:
    """Raise :class:`CudaError` unless a driver or NVRTC call has succeeded (status 0)."""
    if status:
        raise CudaError(f"{call} failed with status {status}")
