"""Load packed 2:4 folders with transformers' own ``from_pretrained``.

transformers asks the quantizer that is registered for ``quantization_config.quant_method`` of ``config.json``. This one
names the packed file as the weights to load, turns each packed weight into the exact dense weight or, on a GPU with
sparse tensor cores, into the buffer that the kernels read, and lets ``save_pretrained`` write a packed folder again.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin
from typing_extensions import override

from prox24_lightning.convert.autotune.tune import stored_table
from prox24_lightning.convert.convert import expand_model, insert_layers, target_of
from prox24_lightning.convert.eligibility import DTYPES, check_model
from prox24_lightning.convert.form_choice import form_problem
from prox24_lightning.convert.format.header import VERSIONS, PackedEntry
from prox24_lightning.convert.format.packed_weight import check_packed
from prox24_lightning.convert.format.reader import PackedFile
from prox24_lightning.convert.format.shards import PackedModel
from prox24_lightning.convert.kernels.buffers import empty_buffer, from_buffer, to_buffer
from prox24_lightning.convert.layers.semi_structured_linear import SemiStructuredLinear
from prox24_lightning.integrations.transformers.saving import push_to_hub, save_pretrained
from prox24_lightning.io.packed_folder import QUANT_METHOD
from prox24_lightning.oneshot.save import forget_quantization
from prox24_lightning.utils.files import PACKED_FILE
from prox24_lightning.weights.layer_matrix import is_transposed_linear, transposed_kind

log = logging.getLogger(__name__)


class Prox24Config(QuantizationConfigMixin):
    """``quantization_config`` of a packed folder: the format's version and the file that holds the weights.

    Args:
        version: of the packed format.
        weights_file: ``packed.safetensors``, or ``packed.safetensors.index.json`` of a folder in several files.
        entries: for other hosts (``modules_to_not_convert``, ``packed_along_outputs``, ``weights``,
            ``modules_not_rounded``, ``input_scales``); kept as they are.

    Raises:
        ValueError: for a version that this release does not read, or a file name with a path.
    """

    def __init__(self, version: int = VERSIONS[0], weights_file: str = PACKED_FILE, **entries: Any) -> None:
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]
        if version not in VERSIONS:
            raise ValueError(
                f"this folder is packed in version {version!r} of the format, and this release of prox24_lightning "
                f"reads versions {', '.join(map(str, VERSIONS))}: update prox24_lightning, or have the folder "
                "written again"
            )
        if not isinstance(weights_file, str) or not weights_file.startswith(PACKED_FILE):
            raise ValueError(f"weights_file={weights_file!r} of the quantization_config is not a packed file")
        self.version = version
        self.weights_file = weights_file
        vars(self).update({key: value for key, value in entries.items() if key != "quant_method"})


@dataclass(frozen=True)
class _Stored:
    """What the packed files say; the files themselves are closed, so that the model can be copied and pickled.

    Attributes:
        info: what the writer added: source, class of the model, and why weights are stored dense.
        entries: packed weights of all files by name.
        dtypes: of the dense form of each.
    """

    info: dict[str, Any]
    entries: dict[str, PackedEntry]
    dtypes: dict[str, torch.dtype]


class Prox24Quantizer(HfQuantizer):
    """transformers' view of packed 2:4 weights.

    Linear layers whose device is a GPU that can run them become
    :class:`~prox24_lightning.convert.layers.semi_structured_linear.SemiStructuredLinear`; every other packed weight is
    expanded to the dense weight, exactly, in the dtype that ``from_pretrained`` was asked for.
    """

    requires_calibration = False
    quantization_config: Prox24Config

    def __init__(self, quantization_config: Prox24Config, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.pre_quantized = True  # also when the user names the config for a folder that has none in config.json
        self._stored = _Stored({}, {}, {})
        self._sparse: dict[str, tuple[str, tuple[int, int], torch.dtype]] = {}
        self._device_map: Any = None

    @property
    def info(self) -> dict[str, Any]:
        """What the writer of the files added: source, class of the model, and why weights are stored dense."""
        return self._stored.info

    @property
    def entries(self) -> dict[str, PackedEntry]:
        """Packed weights of all files by name."""
        return self._stored.entries

    @override
    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        places = set(device_map.values()) if isinstance(device_map, dict) else {device_map}
        if "disk" in places:
            raise ValueError(
                "device_map offloads layers to disk, and packed 2:4 weights cannot be read from there layer by layer: "
                "give every layer a GPU or the CPU"
            )

    def update_attn_implementation(self, config: Any) -> Any:
        """Name the weight files: called with the config after it is read and before the files are searched.

        Without this package ``from_pretrained`` finds no weights and says so, instead of filling a model with random
        values. Older releases of transformers call :meth:`update_tp_plan` there.
        """
        config.transformers_weights = self.quantization_config.weights_file
        return config

    update_tp_plan = update_attn_implementation

    @override
    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, device_map: Any = None, checkpoint_files: Sequence[str] | None = None, **_: Any
    ) -> None:
        paths = list(checkpoint_files or ())
        files = PackedModel([PackedFile(path) for path in paths], self.quantization_config.weights_file)
        dtypes = {name: files.dtype(name) for name in files.packed}
        self._stored = _Stored(files.info if paths else {}, files.packed, dtypes)
        if not self.entries:
            raise ValueError(f"{', '.join(map(str, paths))} holds no packed weight")
        files.check_tensors()  # transformers reads them itself
        self._sparse = {}
        device = _first_gpu(device_map)
        target = None if device is None else target_of(device)
        if target is None:
            return
        if target.problem is not None:
            log.warning("%s: its 2:4 weights are expanded and run dense", target.problem)
            return
        for verdict in check_model(model, target=target, values=False):
            name = self.stored_name(f"{verdict.name}.weight", model)
            if name is None or not verdict.name or not verdict.runs:
                continue
            layer = model.get_submodule(verdict.name)
            weight = layer.get_parameter("weight")
            along_inputs = self.entries[name].dim == (0 if is_transposed_linear(layer) else 1)
            dtype = self._stored.dtypes[name]
            runs = form_problem(self.entries[name].form, target) is None
            if along_inputs and runs and dtype in DTYPES and weight.dtype == dtype:
                shape = (verdict.shape[0], verdict.shape[1])
                buffer = empty_buffer(shape, self.entries[name].form, "meta")
                layer.weight = nn.Parameter(buffer, requires_grad=False)
                self._sparse[f"{verdict.name}.weight"] = verdict.name, shape, dtype

    @override
    def get_weight_conversions(self) -> list[WeightConverter]:
        parts = [r"\.values$", r"\.indices$"]
        if any(entry.form is not None for entry in self.entries.values()):
            parts.append(r"\.scales$")
        return [WeightConverter(parts, "", [_Unpack(self)])]

    def unpack(
        self, name: str, values: Tensor, indices: Tensor, scales: Tensor | None, model: PreTrainedModel
    ) -> Tensor:
        """The tensor of parameter ``name`` of ``model``: the kernels' buffer, or the dense weight in its dtype."""
        stored = self.stored_name(name, model)
        if stored is None:
            raise ValueError(f"{name} stands packed in the file, and its header does not name it: the file is damaged")
        entry = self.entries[stored]
        packed = entry.packed_weight(values, indices, scales)
        check_packed(packed, name=stored)
        if name in self._sparse:
            return to_buffer(packed)
        parameter = model.get_parameter_or_buffer(name)
        return entry.unpack(packed, stored).to(parameter.dtype)

    @override
    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        for name, shape, dtype in self._sparse.values():
            self._place(model, name, shape, dtype)
        # transformers lets no quantizer name its files, headers and card. Bound methods would not survive a pickle.
        model.save_pretrained = partial(save_pretrained, model)  # type: ignore[method-assign]
        model.push_to_hub = partial(push_to_hub, model)  # type: ignore[assignment]
        return model

    def _place(self, model: PreTrainedModel, name: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
        """Exchange the layer whose weight holds the kernels' buffer by now."""
        layer = model.get_submodule(name)
        buffer = layer.get_parameter("weight").detach()
        if buffer.is_meta:
            raise ValueError(f"{name} is offloaded by device_map: packed 2:4 layers need their GPU's memory")
        stored = str(self.stored_name(f"{name}.weight", model))
        form = self.entries[stored].form
        if not buffer.is_cuda:  # the rest of a device_map that spans GPU and CPU
            layer.weight = nn.Parameter(self.entries[stored].unpack(from_buffer(buffer, shape, dtype, form), stored))
            return
        table = stored_table(shape, dtype, device=buffer.get_device(), form=form)
        kind, bias = transposed_kind(layer), getattr(layer, "bias", None)
        converted = SemiStructuredLinear(buffer, shape, dtype, bias, table.text, transposed=kind, form=form).eval()
        insert_layers(model, [(name, converted)])

    def stored_name(self, name: str, model: PreTrainedModel) -> str | None:
        """The name in the file of a parameter of ``model``, which may be the base of the model that was saved."""
        prefix = f"{model.base_model_prefix}."
        entries = self.entries
        found = (one for one in (name, prefix + name, name.removeprefix(prefix)) if one in entries)
        return next(found, None)

    @override
    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """Make every layer dense again, with the same values; ``save_pretrained`` then writes an ordinary folder."""
        expand_model(model)
        forget_quantization(model)
        return model

    @override
    def is_serializable(self) -> bool:
        return True

    @property
    @override
    def is_trainable(self) -> bool:
        return not self._sparse

    @property
    @override
    def is_compileable(self) -> bool:
        return True


class _Unpack(ConversionOps):
    """Make one parameter from the tensors that hold it: two, or three of a rounded weight."""

    def __init__(self, hf_quantizer: Prox24Quantizer) -> None:
        self.hf_quantizer = hf_quantizer  # by this name transformers knows that stored tensors must not be cast

    def __deepcopy__(self, memo: Any) -> _Unpack:
        return self  # transformers copies the operation for every weight; the quantizer is one

    @override
    def convert(  # type: ignore[override]
        self,
        input_dict: Mapping[str, Any],
        source_patterns: Sequence[str],
        target_patterns: Sequence[str],
        full_layer_name: str = "",
        model: Any = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        parts = [input_dict[pattern] for pattern in source_patterns if pattern in input_dict]
        values, indices, *scales = (part[0] if isinstance(part, list) else part for part in parts)
        scale = scales[0] if scales else None
        return {full_layer_name: self.hf_quantizer.unpack(full_layer_name, values, indices, scale, model)}


def _first_gpu(device_map: Any) -> torch.device | None:
    """The first CUDA device that ``device_map`` names; None where everything stays on the CPU."""
    if device_map is None:
        return None
    if isinstance(device_map, str) and device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None
    places = device_map.values() if isinstance(device_map, dict) else [device_map]
    devices = [torch.device("cuda", place) if isinstance(place, int) else torch.device(place) for place in places]
    return next((device for device in devices if device.type == "cuda"), None)
