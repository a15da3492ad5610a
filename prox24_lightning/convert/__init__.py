"""Turn dense layers with 2:4 zeros into layers on sparse tensor cores: eligibility, conversion, files, benchmarks."""

from prox24_lightning.convert.autotune.kernel_table import KernelTable
from prox24_lightning.convert.autotune.tune import kernel_tables
from prox24_lightning.convert.benchmark.report import Report
from prox24_lightning.convert.benchmark.run import run_benchmark
from prox24_lightning.convert.benchmark.settings import ExampleInputs, Settings
from prox24_lightning.convert.convert import Conversion, convert_linear, convert_model, expand_linear, expand_model
from prox24_lightning.convert.doctor import Diagnosis, diagnose
from prox24_lightning.convert.eligibility import LayerVerdict, Target, check_layer, check_model, find_target
from prox24_lightning.convert.format.packed_weight import PackedWeight, pack_24, unpack_24
from prox24_lightning.convert.format.reader import PackedFile
from prox24_lightning.convert.format.shards import PackedModel, open_packed
from prox24_lightning.convert.format.writer import write_packed
from prox24_lightning.convert.input_scales import measure_input_scales
from prox24_lightning.convert.kernel_report import print_kernels
from prox24_lightning.convert.layer_times import layer_times
from prox24_lightning.convert.layers.semi_structured_linear import SemiStructuredLinear
from prox24_lightning.convert.onnx_check import OnnxNode, check_onnx
from prox24_lightning.convert.packed_model import EmptyOnMeta, find_packable, load_packed

__all__ = [
    "Conversion",
    "Diagnosis",
    "EmptyOnMeta",
    "ExampleInputs",
    "KernelTable",
    "LayerVerdict",
    "OnnxNode",
    "PackedFile",
    "PackedModel",
    "PackedWeight",
    "Report",
    "SemiStructuredLinear",
    "Settings",
    "Target",
    "check_layer",
    "check_model",
    "check_onnx",
    "convert_linear",
    "convert_model",
    "diagnose",
    "expand_linear",
    "expand_model",
    "find_packable",
    "find_target",
    "kernel_tables",
    "layer_times",
    "load_packed",
    "measure_input_scales",
    "open_packed",
    "pack_24",
    "print_kernels",
    "run_benchmark",
    "unpack_24",
    "write_packed",
]
