"""What vLLM asks of a quantization method, for packed 2:4 weights.

vLLM runs query, key and value projections, and gate and up projections, as one layer each: such a group is packed as a
whole or dense as a whole (:func:`~prox24_lightning.convert.packed_model.find_packable` sees to it).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.parameter import ChannelQuantScaleParameter, ModelWeightParameter

from prox24_lightning.convert.autotune.kernel_table import BUCKETS
from prox24_lightning.convert.autotune.tune import kernel_tables
from prox24_lightning.convert.convert import target_of
from prox24_lightning.convert.eligibility import check_layer
from prox24_lightning.convert.form_choice import form_problem
from prox24_lightning.convert.format.header import VERSIONS
from prox24_lightning.convert.format.packed_weight import PackedWeight, check_packed, unpack_24
from prox24_lightning.convert.format.shards import open_packed
from prox24_lightning.convert.kernels.buffers import to_buffer
from prox24_lightning.convert.layers.linear_op import packed_linear
from prox24_lightning.io.packed_folder import QUANT_METHOD
from prox24_lightning.weights.rounding import LARGEST, VALUE_DTYPES, RoundedForm


@register_quantization_config(QUANT_METHOD)
class Prox24Config(QuantizationConfig):
    """The ``quantization_config`` of a packed folder.

    Args:
        dense: names of the linear layers that are stored dense, as Hugging Face has them.
        form: that packed layers are rounded to; None for layers of 16 bits.
        not_rounded: names of the packed layers that are not rounded all the same.
        input_scales: fixed scales of inputs, by layer.
    """

    def __init__(
        self,
        dense: list[str],
        form: RoundedForm | None = None,
        not_rounded: Sequence[str] = (),
        input_scales: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        self.dense = dense
        self.form = form
        self.not_rounded = list(not_rounded)
        self.input_scales = dict(input_scales or {})

    @classmethod
    def get_name(cls) -> str:
        return QUANT_METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Prox24Config:
        """Read the entry of ``config.json``.

        Raises:
            ValueError: for a version or a form that this release does not read.
        """
        if config.get("version") not in VERSIONS or "modules_to_not_convert" not in config:
            raise ValueError(
                f"this folder is packed in version {config.get('version')!r} of the format, and this release of "
                f"prox24_lightning serves versions {', '.join(map(str, VERSIONS))}: write the folder again with "
                "`prox24 convert`"
            )
        if columns := config.get("packed_along_outputs"):
            raise ValueError(
                f"{columns[0]} is not packed along its second dimension, which vLLM cannot load: serve the dense form "
                "(`prox24 convert FOLDER OUT --form dense`)"
            )
        form = config.get("weights")
        if form not in (*LARGEST, None):
            raise ValueError(f"weights={form!r} of the quantization_config is none of {', '.join(LARGEST)}")
        fixed = config.get("input_scales")
        return cls(list(config["modules_to_not_convert"]), form, config.get("modules_not_rounded", ()), fixed)

    def maybe_update_config(self, model_name: str, *args: Any, **kwargs: Any) -> None:
        """Check the tensors of a folder, which vLLM calls this with before it loads them.

        Files of the hub are not here yet, and are not checked; a folder without weights is vLLM's matter.

        Raises:
            ValueError: for a damaged file, or a tensor that does not fit its checksum.
        """
        if Path(model_name).is_dir():
            with suppress(FileNotFoundError):
                open_packed(model_name).check_tensors()

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        self.dense = hf_to_vllm_mapper.apply_list(self.dense)
        self.not_rounded = hf_to_vllm_mapper.apply_list(self.not_rounded)
        self.input_scales = hf_to_vllm_mapper.apply_dict(self.input_scales)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> LinearMethodBase | None:
        """Return how ``layer`` runs; None leaves embeddings and heads to vLLM.

        Raises:
            ValueError: for a layer of several weights of which only some are packed.
        """
        if not isinstance(layer, LinearBase):
            return None
        parent, _, last = prefix.rpartition(".")
        members = [f"{parent}.{name}" for name in self.packed_modules_mapping.get(last, [last])]
        for names, how in ((self.dense, "stored dense"), (self.not_rounded, "not rounded to 8 bits")):
            found = [name for name in members if name in names]
            if found and len(found) < len(members):
                raise ValueError(
                    f"vLLM runs {', '.join(members)} as one layer, and {', '.join(found)} is {how}: write the folder "
                    "again with `prox24 convert`, which treats such a group as a whole"
                )
        if members[0] in self.dense:
            return UnquantizedLinearMethod()
        form = None if members[0] in self.not_rounded else self.form
        scales = [self.input_scales[name] for name in members if name in self.input_scales]
        # Layers that run as one share their input, so that they were measured on the same.
        return Prox24LinearMethod(prefix, form, max(scales) if len(scales) == len(members) else None)


@register_weight_loader_v2_supported_method
class Prox24LinearMethod(LinearMethodBase):
    """A linear layer with a packed weight: on sparse tensor cores, or expanded where there are none.

    Args:
        name: of the layer, for errors.
        form: of its weight if that is rounded to 8 bits, else None.
        input_scale: of its inputs, if that is fixed.
    """

    def __init__(self, name: str, form: RoundedForm | None = None, input_scale: float | None = None) -> None:
        self.name = name
        self.form = form
        self.input_scale = input_scale
        self.dtype: torch.dtype | None = None
        self.kernels: str | None = None
        self._dense = UnquantizedLinearMethod()

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Give ``layer`` the parameters that the file's tensors are loaded into.

        Raises:
            ValueError: if a rank's part of the inputs ends inside a byte of indices.
        """
        rows, columns = sum(output_partition_sizes), input_size_per_partition
        if columns % 8:
            raise ValueError(
                f"{self.name} has {columns} of {input_size} inputs on a rank, and packed weights are cut at multiples "
                "of 8: choose another tensor_parallel_size"
            )
        self.dtype = params_dtype
        # A module in the weight's place: in the file its tensors are called weight.values, .indices and .scales.
        layer.weight = nn.Module()
        loader = extra_weight_attrs["weight_loader"]
        stored = params_dtype if self.form is None else VALUE_DTYPES[self.form]
        for name, width, dtype in (("values", columns // 2, stored), ("indices", columns // 8, torch.uint8)):
            data = torch.empty(rows, width, dtype=dtype)
            parameter = ModelWeightParameter(data=data, input_dim=1, output_dim=0, weight_loader=loader)
            layer.weight.register_parameter(name, parameter)
        if self.form is not None:
            scales = ChannelQuantScaleParameter(
                data=torch.empty(rows, dtype=torch.float32), output_dim=0, weight_loader=loader
            )
            layer.weight.register_parameter("scales", scales)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Exchange the loaded tensors for the kernels' buffer, measured for this GPU, or for the dense weight."""
        values, indices = (layer.get_parameter(f"weight.{part}").data for part in ("values", "indices"))
        scales = None if self.form is None else layer.get_parameter("weight.scales").data
        del layer.weight
        shape = values.shape[0], 2 * values.shape[1]
        dtype, fixed = (None, None) if self.form is None else (self.dtype, self.input_scale)
        packed = PackedWeight(values, indices, shape, scales, dtype, fixed)
        check_packed(packed, name=self.name)
        self.kernels = self._chosen_kernels(packed)
        if self.kernels is None:
            layer.register_parameter("weight", nn.Parameter(unpack_24(packed), requires_grad=False))
            self._dense.process_weights_after_loading(layer)
        else:
            layer.register_parameter("packed", nn.Parameter(to_buffer(packed), requires_grad=False))

    def _chosen_kernels(self, packed: PackedWeight) -> str | None:
        """The kernels of this shape, packed also where dense float8 is faster; None where it cannot run sparse."""
        target = target_of(packed.device)
        with torch.device("meta"):
            linear = nn.Linear(packed.shape[1], packed.shape[0], bias=False, dtype=packed.dtype)
        if target is None or not check_layer(linear, name=self.name, target=target, values=False).runs:
            return None
        if form_problem(self.form, target) is not None:
            return None
        tables = kernel_tables([packed.shape], packed.dtype, token_counts=BUCKETS, device=packed.device, form=self.form)
        return tables[packed.shape].text

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return ``x @ weight.T + bias``."""
        if self.kernels is None:
            return self._dense.apply(layer, x, bias)
        rows, columns = layer.output_size_per_partition, x.shape[-1]
        return packed_linear(x, layer.packed, None, bias, x.dtype, rows, columns, self.kernels, self.form)
