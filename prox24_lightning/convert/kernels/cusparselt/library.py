"""Bind NVIDIA's cuSPARSELt with ctypes, and make plans that are used at every call.

torch's own operator (``torch._cslt_sparse_mm``) makes descriptors, algorithm choice and plan anew at every call, about
600 us of host work. The library is the one that torch has loaded, so nothing else has to be installed; there is no
Python binding of it to depend on.

A product here is ``y = x W^T + bias`` for x ``(tokens, in_features)``, W ``(out_features, in_features)`` 2:4 along its
inputs and y ``(tokens, out_features)``, all row-major: in the library's terms W is the structured A, x read transposed
is B, and the result is written column by column.

The numbers of enumerations are those of ``cusparseLt.h`` (0.6 to 0.8) and ``cusparse.h``.
"""

from __future__ import annotations

import ctypes
import re
from contextlib import suppress
from ctypes import byref, c_char_p, c_float, c_int, c_int32, c_int64, c_size_t, c_uint32, c_void_p
from functools import cache
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from prox24_lightning.convert.format.packed_weight import pack_24, unpack_24
from prox24_lightning.convert.kernels.packed_buffer import from_buffer, random_buffer, to_buffer

OLDEST = 600
"""The oldest version with these enumerations: major * 1000 + minor * 100 + patch."""

TOKEN_MULTIPLE = 8
"""Tokens are padded to a multiple of this: rows of 16 bytes in 16-bit types."""

_NAME = "libcusparseLt.so"
_WHEELS = ("nvidia-cusparselt-cu13", "nvidia-cusparselt-cu12")
_COLUMN_MAJOR, _ROW_MAJOR = 1, 2  # cusparseOrder_t
_NOT_TRANSPOSED, _TRANSPOSED = 0, 1  # cusparseOperation_t
_COMPUTE_32F = 2  # cusparseComputeType
_ALIGNMENT = 16
_PROBE = (128, 256)  # (out_features, in_features): two tiles of metadata and more in each direction
_TYPES = {torch.float16: 2, torch.bfloat16: 14}  # cudaDataType
_BIAS_POINTER = 8  # cusparseLtMatmulDescAttribute_t
_CONFIG_ID, _CONFIG_MAX_ID = 0, 1  # cusparseLtMatmulAlgAttribute_t
_ONE, _ZERO = byref(c_float(1)), byref(c_float(0))


class CusparseltError(RuntimeError):
    """The library cannot be bound, or one of its calls failed."""


class Library:
    """The loaded library. Every call raises :class:`CusparseltError` with the library's own message if it fails."""

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            self._library = ctypes.CDLL(path)
        except OSError as error:
            raise CusparseltError(f"{path} cannot be loaded: {error}") from None
        self._handles: dict[int, _Opaque] = {}
        try:
            self._library.cusparseLtGetErrorString.restype = c_char_p
            self.multiply = self._library.cusparseLtMatmul
            for name in _ENTRIES:
                getattr(self._library, name)
        except AttributeError as error:
            raise CusparseltError(f"{path} lacks an entry: {error}") from None
        # The only call that is made often: declared types make its conversion of arguments fast.
        self.multiply.argtypes = [c_void_p] * 10 + [c_int32]

    def handle(self, device: int) -> _Opaque:
        """Return the library's state for one GPU, made at the first call."""
        if device not in self._handles:
            made = _opaque()
            with torch.cuda.device(device):
                self.call("cusparseLtInit", made)
            self._handles[device] = made
        return self._handles[device]

    def version(self, device: int) -> int:
        """Return major * 1000 + minor * 100 + patch."""
        number = c_int()
        self.call("cusparseLtGetVersion", self.handle(device), byref(number))
        return number.value

    def call(self, name: str, *arguments: object) -> None:
        status = getattr(self._library, name)(*arguments)
        if status:
            self.fail(name, status)

    def fail(self, name: str, status: int) -> None:
        message = self._library.cusparseLtGetErrorString(c_int(status)) or b"unknown error"
        raise CusparseltError(f"{name}: {message.decode()} (status {status})")


_Opaque = ctypes.Array  # of bytes: the library's structures, 512 bytes in 0.8
_ENTRIES = (
    "cusparseLtInit",
    "cusparseLtGetVersion",
    "cusparseLtStructuredDescriptorInit",
    "cusparseLtDenseDescriptorInit",
    "cusparseLtMatmulDescriptorInit",
    "cusparseLtMatmulDescSetAttribute",
    "cusparseLtMatmulAlgSelectionInit",
    "cusparseLtMatmulAlgSetAttribute",
    "cusparseLtMatmulAlgGetAttribute",
    "cusparseLtMatmulPlanInit",
    "cusparseLtMatmulPlanDestroy",
    "cusparseLtMatmulGetWorkspace",
    "cusparseLtMatmul",
)


def _opaque(size: int = 16384) -> _Opaque:
    """Return zeroed memory for one of the library's structures, on a 16-byte boundary."""
    memory = (ctypes.c_char * (size + 16))()
    skip = -ctypes.addressof(memory) % 16
    part = (ctypes.c_char * size).from_buffer(memory, skip)
    return part


@cache
def load() -> Library:
    """Bind the library that torch has loaded, or the one of NVIDIA's wheel.

    Raises:
        CusparseltError: if there is none, it is too old, or it refuses this GPU.
    """
    if not torch.backends.cusparselt.is_available():
        raise CusparseltError("torch was built without cuSPARSELt")
    found = _find()
    if found is None:
        raise CusparseltError(f"no {_NAME} is loaded by torch or installed by {' or '.join(_WHEELS)}")
    library = Library(found)
    version = library.version(torch.cuda.current_device())
    if version < OLDEST:
        raise CusparseltError(f"cuSPARSELt {version} is older than {OLDEST}")
    return library


class Support(NamedTuple):
    """Which kernel multiplies many tokens on a GPU, and why cuSPARSELt's plans do not; ``problem`` is "" if they do."""

    kernel: Literal["cusparselt", "torch", "expand"]
    problem: str


@cache
def support(device: int) -> Support:
    """Return the kernel for many tokens on a GPU.

    It is "cusparselt" with our own plans, or else "torch" (its operator, which reads the same buffer), or else
    "expand", which needs no cuSPARSELt. The layout of the library's metadata is not documented, so it is compared with
    ours first (:mod:`~prox24_lightning.convert.kernels.packed_buffer`).
    """
    if not torch.backends.cusparselt.is_available():
        return Support("expand", "torch was built without cuSPARSELt")
    with torch.cuda.device(device):
        try:
            weight = unpack_24(
                from_buffer(random_buffer(_PROBE, torch.float16, torch.device("cuda"), 0), _PROBE, torch.float16)
            )
            theirs = torch._cslt_compress(weight)
        except RuntimeError as error:
            return Support("expand", f"cuSPARSELt does not run on this GPU: {str(error).splitlines()[0]}")
        if not torch.equal(theirs.view(torch.int16).flatten(), to_buffer(pack_24(weight)).flatten()):
            return Support("expand", "cuSPARSELt keeps the metadata in an unknown order on this GPU")
        try:
            load()
        except CusparseltError as error:
            return Support("torch", str(error))
    return Support("cusparselt", "")


def pad_tokens(inputs: Tensor, tokens: int) -> Tensor:
    """Return (tokens, in_features) inputs with rows of zeros up to a multiple of :data:`TOKEN_MULTIPLE`."""
    missing = -tokens % TOKEN_MULTIPLE
    return F.pad(inputs, (0, 0, 0, missing)) if missing else inputs


def _find() -> str | None:
    try:
        loaded = re.search(rf"(/\S*{re.escape(_NAME)}[.\d]*)", Path("/proc/self/maps").read_text())
    except OSError:
        loaded = None
    if loaded:
        return loaded.group(1)
    for wheel in _WHEELS:
        try:
            for file in files(wheel) or ():
                if file.name.startswith(_NAME):
                    return str(file.locate())
        except PackageNotFoundError:
            continue
    return None


class Plan:
    """A prepared product for one shape, padded token count, bias and algorithm; see :meth:`run`.

    Args:
        library: from :func:`load`.
        device: index of the GPU.
        dtype: float16 or bfloat16, of weight, input, bias and output alike; sums are float32.
        shape: (out_features, in_features).
        tokens: a multiple of :data:`TOKEN_MULTIPLE`.
        bias: address of the bias in ``dtype``, which must stay where it is; 0 for none.
        algorithm: one of :attr:`algorithms`; None takes the library's default.

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
    ) -> None:
        out_features, in_features = shape
        kind = c_int(_TYPES[dtype])
        call = library.call
        self._library = library
        self._handle = handle = library.handle(device)
        self._weight, self._rows, self._result, self._product, self._choice, self._plan = (_opaque() for _ in range(6))
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
            *(align, kind, c_int(_COLUMN_MAJOR)),
        )
        call(
            "cusparseLtMatmulDescriptorInit",
            *(handle, self._product, c_int(_NOT_TRANSPOSED), c_int(_TRANSPOSED)),
            *(self._weight, self._rows, self._result, self._result, c_int(_COMPUTE_32F)),
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
        self._addresses = ctypes.addressof(handle), ctypes.addressof(self._plan)

    def run(self, weight: int, rows: int, result: int, workspace: int, stream: int) -> None:
        """Launch the product; every argument is an address (``Tensor.data_ptr()``), ``stream`` a CUDA stream."""
        status = self._library.multiply(
            *self._addresses, _ONE, weight, rows, _ZERO, result, result, workspace, byref(c_void_p(stream)), 1
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
