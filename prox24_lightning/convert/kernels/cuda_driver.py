"""Load and launch compiled CUDA kernels through the CUDA driver, bound with ctypes.

ctypes and not ``cuda-python``, for the reasons in :mod:`~prox24_lightning.convert.kernels.nvrtc`, and because a launch
is on the host's critical path: every layer launches once a token. Here it is one foreign call on a prepared structure.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import byref, c_int, c_uint, c_void_p
from functools import cache
from threading import Lock
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


class PreparedLaunch:
    """The structures of a launch, made once: a launch fills in what differs, in a third of the time that making takes.

    Args:
        launch: the driver's ``cuLaunchKernelEx``.
        function: the kernel's handle.
        parameters: of the kernel, in order.
        threads: of a block.
        shared_bytes: of a block.
        attributes: address and number of the launch attributes.
    """

    def __init__(
        self,
        launch: Callable[..., int],
        function: c_void_p,
        parameters: type[ctypes.Structure],
        threads: int,
        shared_bytes: int,
        attributes: tuple[int | None, int],
    ) -> None:
        self._launch, self._function = launch, function
        self._values = parameters()
        start = ctypes.addressof(self._values)
        offsets = [getattr(parameters, name).offset for name, *_ in parameters._fields_]
        self._pointers = (c_void_p * len(offsets))(*[start + offset for offset in offsets])
        self._config = _LaunchConfig(1, 1, 1, threads, 1, 1, shared_bytes, None, *attributes)
        self._addresses = ctypes.addressof(self._config), ctypes.addressof(self._pointers)
        self._fill = self._values.__init__  # type: ignore[misc]
        self._lock = Lock()  # two threads may launch one kernel

    def __call__(self, grid: tuple[int, int, int], stream: int, arguments: tuple[Any, ...]) -> int:
        """Launch, and return the driver's status."""
        config = self._config
        at, pointers = self._addresses
        with self._lock:
            self._fill(*arguments)
            config.grid_x, config.grid_y, config.grid_z = grid
            config.stream = stream
            return self._launch(at, self._function, pointers, None)


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
        self._early = _Attribute(_PROGRAMMATIC_SERIALIZATION, 1)
        attributes = (ctypes.addressof(self._early), 1) if early else (None, 0)
        self._launch = PreparedLaunch(
            library.cuLaunchKernelEx, self._function, parameters, threads, shared_bytes, attributes
        )

    def __call__(self, grid: tuple[int, int, int], stream: int, *arguments: Any) -> None:
        """Launch ``grid`` blocks on a CUDA stream of the current GPU."""
        if status := self._launch(grid, stream, arguments):
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
