"""CUDA C++ compiled at run time by NVRTC, the compiler that torch brings along, and launched through the driver.

Nothing has to be built when the package is installed. A compiled program is kept for the process only: one takes
about a second.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import os
from collections.abc import Mapping, Sequence
from ctypes import byref, c_char_p, c_int, c_size_t, c_uint, c_void_p
from functools import cache
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import torch

_WHEELS = ("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu13", "nvidia-cuda-nvrtc-cu12")
_MAX_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


class NvrtcError(RuntimeError):
    """The compiler or the driver cannot be bound, or refuses."""


def compile_program(source: str, macros: Mapping[str, int], capability: tuple[int, int]) -> bytes:
    """Machine code of ``source`` for one compute capability; needs no GPU.

    Raises:
        NvrtcError: with the compiler's log.
    """
    library = _nvrtc()
    program = c_void_p()
    _check(library.nvrtcCreateProgram(byref(program), source.encode(), b"prox24.cu", 0, None, None), "create")
    options = [f"--gpu-architecture=sm_{capability[0]}{capability[1]}", "--std=c++17", "-default-device"]
    options += [f"-D{name}={value}" for name, value in macros.items()]
    try:
        given = (c_char_p * len(options))(*(option.encode() for option in options))
        if library.nvrtcCompileProgram(program, len(options), given):
            size = c_size_t()
            library.nvrtcGetProgramLogSize(program, byref(size))
            log = ctypes.create_string_buffer(size.value)
            library.nvrtcGetProgramLog(program, log)
            raise NvrtcError(f"NVRTC refuses the kernel with {dict(macros)}: {log.value.decode()[:2000]}")
        size = c_size_t()
        _check(library.nvrtcGetCUBINSize(program, byref(size)), "size")
        code = ctypes.create_string_buffer(size.value)
        _check(library.nvrtcGetCUBIN(program, code), "code")
        return code.raw
    finally:
        library.nvrtcDestroyProgram(byref(program))


class Kernel:
    """One kernel of a compiled program, on the current GPU.

    Args:
        code: from :func:`compile_program`.
        name: of an ``extern "C"`` kernel.
        kinds: the ctypes of its parameters.
        threads: a block.
        shared_bytes: dynamic shared memory a block.
    """

    def __init__(self, code: bytes, name: str, kinds: Sequence[type], threads: int, shared_bytes: int = 0) -> None:
        driver = _driver()
        torch.cuda.current_stream()  # the GPU's context is there from here on
        module, self._function = c_void_p(), c_void_p()
        _check(driver.cuModuleLoadData(byref(module), code), "cuModuleLoadData")
        _check(driver.cuModuleGetFunction(byref(self._function), module, name.encode()), "cuModuleGetFunction")
        if shared_bytes > 48 * 1024:
            _check(driver.cuFuncSetAttribute(self._function, _MAX_SHARED, shared_bytes), "cuFuncSetAttribute")
        self._launch = driver.cuLaunchKernel
        self._threads, self._shared, self._kinds = threads, shared_bytes, tuple(kinds)

    def __call__(self, grid: tuple[int, int], stream: int, *arguments: int) -> None:
        """Launch ``grid`` blocks on a CUDA stream."""
        values = [kind(value) for kind, value in zip(self._kinds, arguments, strict=True)]
        pointers = (c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        status = self._launch(self._function, *grid, 1, self._threads, 1, 1, self._shared, stream, pointers, None)
        if status:
            _check(status, "cuLaunchKernel")


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
    found = os.environ.get("PROX24_NVRTC", found)
    if found is None:
        raise NvrtcError(f"no libnvrtc: none of {', '.join(_WHEELS)} is installed")
    try:
        for builtins in sorted(Path(found).parent.glob("libnvrtc-builtins.so*")):
            ctypes.CDLL(str(builtins))  # NVRTC looks for it by its name alone
        return ctypes.CDLL(found)
    except OSError as error:
        raise NvrtcError(f"{found} cannot be loaded: {error}") from None


@cache
def _driver() -> ctypes.CDLL:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise NvrtcError(f"the CUDA driver cannot be loaded: {error}") from None
    driver.cuLaunchKernel.argtypes = [c_void_p, *[c_uint] * 7, c_void_p, c_void_p, c_void_p]
    driver.cuFuncSetAttribute.argtypes = [c_void_p, c_int, c_int]
    return driver


def _check(status: int, what: str) -> None:
    if status:
        raise NvrtcError(f"{what} failed with status {status}")
