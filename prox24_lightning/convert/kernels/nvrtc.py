"""CUDA C++ compiled at run time by NVRTC, the compiler that torch brings along, and launched through the driver.

Nothing has to be built when the package is installed; a program takes about half a second, once a process.
"""

from __future__ import annotations

import ctypes
import ctypes.util
from collections.abc import Mapping
from ctypes import byref, c_char_p, c_int, c_size_t, c_uint, c_void_p
from functools import cache
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any

import torch

_WHEELS = ("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu13", "nvidia-cuda-nvrtc-cu12")
_MAX_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_SHARED_UNASKED = 48 * 1024


_PROGRAMMATIC_SERIALIZATION = 6  # CUlaunchAttributeID


class _Attribute(ctypes.Structure):  # CUlaunchAttribute
    _fields_ = (("id", c_int), ("_pad", c_int), ("value", c_int), ("_rest", c_int * 15))

    def __init__(self, number: int, value: int) -> None:
        super().__init__(number, 0, value)


class _Launch(ctypes.Structure):  # CUlaunchConfig
    _fields_ = (
        *((name, c_uint) for name in ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z", "shared_bytes")),
        *(("stream", c_void_p), ("attributes", c_void_p), ("count", c_uint)),
    )


class NvrtcError(RuntimeError):
    """The compiler or the driver cannot be bound, or refuses."""


def compile_program(
    text: str, macros: Mapping[str, int], capability: tuple[int, int], *, all_features: bool = False
) -> bytes:
    """Machine code of a CUDA C++ text for one compute capability; needs no GPU.

    Args:
        text: of the program.
        macros: defined for it.
        capability: of the GPU.
        all_features: also those instructions that no other GPU will have ("sm_90a").

    Raises:
        NvrtcError: with the compiler's log.
    """
    library = _nvrtc()
    program = c_void_p()
    check(library.nvrtcCreateProgram(byref(program), text.encode(), b"kernel.cu", 0, None, None), "create")
    options = [f"--gpu-architecture=sm_{capability[0]}{capability[1]}{'a' * all_features}", "--std=c++17"]
    options += [f"-D{name}={value}" for name, value in macros.items()]
    try:
        given = (c_char_p * len(options))(*(option.encode() for option in options))
        size = c_size_t()
        if library.nvrtcCompileProgram(program, len(options), given):
            library.nvrtcGetProgramLogSize(program, byref(size))
            log = ctypes.create_string_buffer(size.value)
            library.nvrtcGetProgramLog(program, log)
            raise NvrtcError(f"NVRTC refuses the kernel with {dict(macros)}: {log.value.decode()[:2000]}")
        check(library.nvrtcGetCUBINSize(program, byref(size)), "nvrtcGetCUBINSize")
        code = ctypes.create_string_buffer(size.value)
        check(library.nvrtcGetCUBIN(program, code), "nvrtcGetCUBIN")
        return code.raw
    finally:
        library.nvrtcDestroyProgram(byref(program))


class Function:
    """One kernel of a compiled program, on the current GPU.

    Args:
        code: from :func:`compile_program`.
        name: of an ``extern "C"`` kernel.
        parameters: its parameters, in order.
        threads: a block.
        shared_bytes: dynamic shared memory a block.
        early: the kernel may start before the one in front of it in the stream has ended, and waits for that itself
            (``griddepcontrol.wait``); GPUs from compute capability 9.0.
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
        if shared_bytes > _SHARED_UNASKED:
            check(library.cuFuncSetAttribute(self._function, _MAX_SHARED, shared_bytes), "cuFuncSetAttribute")
        self._launch = library.cuLaunchKernelEx
        self._threads, self._shared, self._parameters = threads, shared_bytes, parameters
        self._early = _Attribute(_PROGRAMMATIC_SERIALIZATION, 1)
        self._attributes = (ctypes.addressof(self._early), 1) if early else (None, 0)
        self._offsets = [getattr(parameters, name).offset for name, *_ in parameters._fields_]
        self._pointers = c_void_p * len(self._offsets)

    def __call__(self, grid: tuple[int, int, int], stream: int, *arguments: Any) -> None:
        """Launch ``grid`` blocks on a CUDA stream of the current GPU."""
        given = self._parameters(*arguments)
        start = ctypes.addressof(given)
        pointers = self._pointers(*[start + offset for offset in self._offsets])
        how = _Launch(*grid, self._threads, 1, 1, self._shared, stream, *self._attributes)
        status = self._launch(byref(how), self._function, pointers, None)
        if status:
            check(status, "cuLaunchKernelEx")


def driver_version() -> str:
    """The driver's own version where NVML tells it, the CUDA version it speaks otherwise."""
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


def is_available() -> bool:
    """Whether programs can be compiled here."""
    try:
        _nvrtc()
    except NvrtcError:
        return False
    return True


@cache
def _nvrtc() -> ctypes.CDLL:
    found = ctypes.util.find_library("nvrtc")
    for wheel in _WHEELS:
        try:
            names = [file for file in files(wheel) or () if file.name.startswith("libnvrtc.so")]
        except PackageNotFoundError:
            continue
        if names:
            found = str(names[0].locate())
            break
    if found is None:
        raise NvrtcError(f"no libnvrtc: it comes with {' or '.join(_WHEELS)}, which a CUDA build of torch requires")
    try:
        for builtins in sorted(Path(found).parent.glob("libnvrtc-builtins.so*")):
            ctypes.CDLL(str(builtins))  # NVRTC looks for it by its bare name
        return ctypes.CDLL(found)
    except OSError as error:
        raise NvrtcError(f"{found} cannot be loaded: {error}") from None


@cache
def driver() -> Any:
    """The CUDA driver's library.

    Raises:
        NvrtcError: if there is none.
    """
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise NvrtcError(f"the CUDA driver cannot be loaded: {error}") from None
    library.cuLaunchKernelEx.argtypes = [c_void_p] * 4
    library.cuFuncSetAttribute.argtypes = [c_void_p, c_int, c_int]
    return library


def check(status: int, what: str) -> None:
    """Raise :class:`NvrtcError` unless a call has succeeded."""
    if status:
        raise NvrtcError(f"{what} failed with status {status}")
