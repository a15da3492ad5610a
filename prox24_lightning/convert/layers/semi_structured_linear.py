"""A linear layer with a packed 2:4 weight that multiplies on sparse tensor cores."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from prox24_lightning.convert.format.packed_weight import PackedWeight, unpack_24
from prox24_lightning.convert.kernels.buffers import from_buffer
from prox24_lightning.convert.kernels.expand.kernel import expand
from prox24_lightning.convert.kernels.registry import kernel_for, takes_rounded
from prox24_lightning.convert.kernels.round_tokens.kernel import Rounding
from prox24_lightning.convert.kernels.rounded_buffer import padded_shape, tail
from prox24_lightning.convert.layers.linear_op import multiply, multiply_rounded, packed_linear
from prox24_lightning.weights.rounding import RoundedForm


class SemiStructuredLinear(nn.Module):
    """A linear layer whose 2:4 weight is stored as its kept values and two bits of metadata for each; forward only.

    :func:`~prox24_lightning.convert.convert.convert_linear` makes them. ``packed`` is an int16 buffer
    (:mod:`~prox24_lightning.convert.kernels.packed_buffer`), or an int8 one of a weight that is rounded to 8 bits
    (:mod:`~prox24_lightning.convert.kernels.rounded_buffer`), so ``.to(dtype)``, ``state_dict()`` and ``deepcopy``
    leave its bits alone. A dense weight that is kept is not part of the ``state_dict``: loading one makes it anew. The
    dtype and the form are in the metadata of a ``state_dict``, beside the modules' versions, and loading refuses
    others.

    Args:
        packed: the buffer of the weight.
        shape: (out_features, in_features).
        dtype: float16 or bfloat16, of inputs and outputs.
        bias: (out_features,) in any floating dtype, or None.
        kernels: which kernel runs at which number of tokens
            (:attr:`~prox24_lightning.convert.autotune.kernel_table.KernelTable.text`).
        dense: the same weight (out_features, in_features), kept for the numbers of tokens at which cuBLAS wins.
        transposed: class of the layer that was converted if that stores its weight as (in_features, out_features).
        form: of a weight that is rounded to 8 bits, whose inputs are rounded token by token; None for 16 bits.
    """

    packed: Tensor
    dense: Tensor | None

    def __init__(
        self,
        packed: Tensor,
        shape: tuple[int, int],
        dtype: torch.dtype,
        bias: Tensor | None,
        kernels: str,
        dense: Tensor | None = None,
        transposed: type[Any] | None = None,
        form: RoundedForm | None = None,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self.dtype = dtype
        self.kernels = kernels
        self.transposed = transposed
        self.form = form
        self.register_buffer("packed", packed)
        self.register_buffer("dense", None if dense is None else dense.detach().view(torch.int16), persistent=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @property
    def packed_weight(self) -> PackedWeight:
        """The weight in the portable packed form, in tensors of its own."""
        return from_buffer(self.packed, self._shape, self.dtype, self.form)

    @property
    def weight(self) -> Tensor:
        """The dense (out_features, in_features) weight, exactly; expanded at every access unless it is kept."""
        if self.dense is not None:
            return self.dense.view(self.dtype)
        return self._expanded()

    @property
    def stored_bytes(self) -> int:
        """Bytes of the packed weight, and of the dense one if it is kept, without the bias."""
        return self.packed.nbytes + (0 if self.dense is None else self.dense.nbytes)

    def forward(self, input: Tensor) -> Tensor:
        """Multiply ``(..., in_features)`` inputs; the result is ``(..., out_features)``.

        Raises:
            RuntimeError: on the CPU or another GPU than the weight's, for a dtype other than the weight's (outside
                autocast), for another number of features, and when a gradient would be needed.
        """
        compiling = torch.compiler.is_compiling()
        packed: Any
        if compiling:
            packed, dense, bias = self.packed, self.dense, self.bias
        else:  # Module.__getattr__ takes the host longer than what is looked up
            packed, dense, bias = self._buffers["packed"], self._buffers["dense"], self._parameters.get("bias")
        if (
            (input.requires_grad and torch.is_grad_enabled())
            or not input.is_cuda
            or input.device != packed.device
            or input.dtype != self.dtype
            or input.shape[-1] != self.in_features
        ):
            input = self._accepted(input)
        call = multiply if type(input) is Tensor and not compiling else packed_linear
        return call(
            input, packed, dense, bias, self.dtype, self.out_features, self.in_features, self.kernels, self.form
        )

    def _accepted(self, input: Tensor) -> Tensor:
        """Return an input of the layer's dtype, as autocast casts it; any other that does not fit is refused."""
        if input.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                "a converted 2:4 layer has no backward: run it under torch.no_grad() or torch.inference_mode(), or "
                "train the dense model (prox24_lightning.convert.expand_model brings it back)"
            )
        if not (input.is_cuda and self.packed.is_cuda):
            raise RuntimeError(
                f"a converted 2:4 layer runs on CUDA only; input is on {input.device}, weight on {self.packed.device}"
            )
        if input.device != self.packed.device:
            raise RuntimeError(
                f"input is on {input.device}, the packed weight on {self.packed.device}: move one of them"
            )
        if input.dtype != self.dtype:
            if not torch.is_autocast_enabled(input.device.type):
                raise RuntimeError(f"input is {input.dtype}, the packed weight {self.dtype}: cast the input")
            input = input.to(self.dtype)
        if input.shape[-1] != self.in_features:
            raise RuntimeError(f"input of shape {tuple(input.shape)} does not end in in_features={self.in_features}")
        return input

    def rounding(self, tokens: int) -> Rounding | None:
        """Return how :meth:`multiply_rounded` takes that many tokens; None where the layer has to round them itself."""
        if self.form is None or not takes_rounded(kernel_for(self.kernels, tokens)):
            return None
        return Rounding(self.form, padded_shape(self._shape)[1], tail(self.packed))

    def multiply_rounded(self, rounded: Tensor, tokens: int) -> Tensor:
        """Return (tokens, out_features) of tokens that are rounded as :meth:`rounding` says, on a GPU."""
        assert self.form is not None
        return multiply_rounded(
            rounded, tokens, self.packed, self.bias, self.dtype, self._shape, self.kernels, self.form
        )

    @property
    def _shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    def _expanded(self) -> Tensor:
        if self.packed.is_cuda:
            return expand(self.packed, self._shape, self.dtype, self.form).contiguous()
        return unpack_24(self.packed_weight)

    @property
    def _stored_as(self) -> str:
        """What the bits of ``packed`` mean."""
        return str(self.dtype) if self.form is None else f"{self.form} for {self.dtype}"

    @override
    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if hasattr(destination, "_metadata"):
            destination._metadata[prefix[:-1]]["dtype"] = self._stored_as

    @override
    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        stored = local_metadata.get("dtype")
        if stored not in (None, self._stored_as):
            error_msgs.append(
                f"{prefix}packed holds bits of {stored}, and this layer reads them as {self._stored_as}: load it into "
                f"a model that was converted in {stored}"
            )
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if self.dense is not None and f"{prefix}packed" in state_dict:
            fresh = self._expanded().view(torch.int16)
            # In place where the packed weight was loaded in place: a captured CUDA graph reads both.
            self.dense = fresh if local_metadata.get("assign_to_params_buffers") else self.dense.copy_(fresh)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"dtype={self.dtype}, {'' if self.form is None else f'form={self.form}, '}kernels={self.kernels!r}"
        )
