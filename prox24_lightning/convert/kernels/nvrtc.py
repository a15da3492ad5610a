"""Compile CUDA C++ at run time with NVRTC, the compiler that a CUDA build of torch installs.

Nothing has to be built when the package is installed; a program takes about half a second, once a process.

The bindings are ctypes and not ``cuda-python``: six functions are used, whose C signatures are the same in CUDA 12 and
13, and libnvrtc is the file that torch installed. ``cuda-bindings`` is no dependency of the older torch versions that
the package supports, is released per CUDA major version, and would have to match what torch and the driver bring.
"""

from __future__ import annotations

import ctypes
import ctypes.util
from collections.abc import Mapping
from ctypes import byref, c_char_p, c_size_t, c_void_p
from functools import cache
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

from prox24_lightning.convert.kernels.cuda_driver import CudaError, check

_WHEELS = ("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu13", "nvidia-cuda-nvrtc-cu12")


def compile_program(
    text: str, macros: Mapping[str, int], capability: tuple[int, int], *, all_features: bool = False
) -> bytes:
    """Compile a CUDA C++ program into machine code for one compute capability; needs no GPU.

    Args:
        text: source of the program.
        macros: defined for it, name -> value.
        capability: compute capability of the GPU.
        all_features: also allow instructions that no other GPU has ("sm_90a").

    Raises:
        CudaError: if there is no NVRTC, or with the compiler's log.
    """
    library = _nvrtc()
    program = c_void_p()
    check(library.nvrtcCreateProgram(byref(program), text.encode(), b"kernel.cu", 0, None, None), "nvrtcCreateProgram")
    options = [f"--gpu-architecture=sm_{capability[0]}{capability[1]}{'a' * all_features}", "--std=c++17"]
    options += [f"-D{name}={value}" for name, value in macros.items()]
    try:
        arguments = (c_char_p * len(options))(*(option.encode() for option in options))
        size = c_size_t()
        if library.nvrtcCompileProgram(program, len(options), arguments):
            library.nvrtcGetProgramLogSize(program, byref(size))
            log = ctypes.create_string_buffer(size.value)
            library.nvrtcGetProgramLog(program, log)
            raise CudaError(f"NVRTC refuses the kernel with {dict(macros)}: {log.value.decode()[:2000]}")
        check(library.nvrtcGetCUBINSize(program, byref(size)), "nvrtcGetCUBINSize")
        code = ctypes.create_string_buffer(size.value)
        check(library.nvrtcGetCUBIN(program, code), "nvrtcGetCUBIN")
        return code.raw
    finally:
        library.nvrtcDestroyProgram(byref(program))


def is_available() -> bool:
    """Return whether programs can be compiled here."""
    try:
        _nvrtc()
    except CudaError:
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
        raise CudaError(f"no libnvrtc: it comes with {' or '.join(_WHEELS)}, which a CUDA build of torch requires")
    try:
        for builtins in sorted(Path(found).parent.glob("libnvrtc-builtins.so*")):
            ctypes.CDLL(str(builtins))  # NVRTC looks for it by its bare name
        return ctypes.CDLL(found)
    except OSError as error:
        raise CudaError(f"{found} cannot be loaded: {error}") from None
