"""Bind NVIDIA's cuSPARSELt with ctypes, and find out whether it can be used on a GPU.

torch's own operator (``torch._cslt_sparse_mm``) makes descriptors, algorithm choice and plan anew at every call, about
600 us of host work. The library is the one that torch has loaded, so nothing else has to be installed; there is no
Python binding of it to depend on.
"""

from __future__ import annotations

import ctypes
import re
from ctypes import byref, c_char_p, c_int, c_int32, c_void_p
from functools import cache
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from prox24_lightning.convert.format.packed_weight import PackedWeight, pack_24, unpack_24
from prox24_lightning.convert.kernels import rounded_buffer
from prox24_lightning.convert.kernels.packed_buffer import from_buffer, random_buffer, to_buffer
from prox24_lightning.weights.rounding import RoundedForm

OLDEST = 600
"""The oldest version with these enumerations: major * 1000 + minor * 100 + patch."""

TOKEN_MULTIPLE = 8
"""Tokens are padded to a multiple of this: rows of 16 bytes in 16-bit types."""

_NAME = "libcusparseLt.so"
_WHEELS = ("nvidia-cusparselt-cu13", "nvidia-cusparselt-cu12")
_PROBE = (128, 256)  # (out_features, in_features): two tiles of metadata and more in each direction


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
        self._handles: dict[int, Opaque] = {}
        try:
            self._library.cusparseLtGetErrorString.restype = c_char_p
            self.multiply = self._library.cusparseLtMatmul
            for name in _ENTRIES:
                getattr(self._library, name)
        except AttributeError as error:
            raise CusparseltError(f"{path} lacks an entry: {error}") from None
        # The only call that is made often: declared types make its conversion of arguments fast.
        self.multiply.argtypes = [c_void_p] * 10 + [c_int32]

    def handle(self, device: int) -> Opaque:
        """Return the library's state for one GPU, made at the first call."""
        if device not in self._handles:
            made = opaque()
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


Opaque = ctypes.Array  # of bytes: the library's structures, 512 bytes in 0.8
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


def opaque(size: int = 16384) -> Opaque:
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
def support(device: int, form: RoundedForm | None = None) -> Support:
    """Return the kernel for many tokens on a GPU and a weight of 16 bits, or of 8 bits (``form``).

    It is "cusparselt" with our own plans, or else "torch" (its operator, which reads the same buffer), or else
    "expand", which needs no cuSPARSELt, and for 8 bits takes the place of "torch" too. The layout of the library's
    metadata is not documented, so it is compared with ours first
    (:mod:`~prox24_lightning.convert.kernels.packed_buffer`, :mod:`~prox24_lightning.convert.kernels.rounded_buffer`).
    """
    if not torch.backends.cusparselt.is_available():
        return Support("expand", "torch was built without cuSPARSELt")
    with torch.cuda.device(device):
        try:
            ours, weight = _probe(form)
            theirs = torch._cslt_compress(weight).view(ours.dtype).flatten()
        except RuntimeError as error:
            return Support("expand", f"cuSPARSELt does not run on this GPU: {str(error).splitlines()[0]}")
        if not torch.equal(theirs, ours[: len(theirs)]):
            return Support("expand", "cuSPARSELt keeps the metadata in an unknown order on this GPU")
        try:
            load()
        except CusparseltError as error:
            return Support("torch" if form is None else "expand", str(error))
    return Support("cusparselt", "")


def _probe(form: RoundedForm | None) -> tuple[Tensor, Tensor]:
    """Return a flat buffer of ours, and the dense weight whose values it holds.

    It has two non-zeros in each group: where one is missing, the library may choose another index than we do.
    """
    gpu = torch.device("cuda")
    if form is None:
        weight = unpack_24(from_buffer(random_buffer(_PROBE, torch.float16, gpu, 0), _PROBE, torch.float16))
        return to_buffer(pack_24(weight)).flatten(), weight
    buffer = rounded_buffer.random_buffer(_PROBE, form, gpu, 0)
    packed = rounded_buffer.from_buffer(buffer, _PROBE, form, torch.float16)
    return buffer, unpack_24(PackedWeight(packed.values, packed.indices, _PROBE))


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
