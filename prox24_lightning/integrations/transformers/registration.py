"""Make transformers load packed folders."""

from __future__ import annotations

_NEEDED = "loading packed folders by from_pretrained needs transformers 5.17 or newer"


def register_with_transformers() -> None:
    """Let ``from_pretrained`` of every auto class load packed 2:4 folders; calling it again changes nothing.

    Raises:
        ImportError: if transformers is missing or too old, with the version that is needed.
    """
    try:
        from transformers.core_model_loading import WeightConverter  # noqa: F401
        from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
        from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
    except ImportError as error:
        raise ImportError(f"{_NEEDED}: {error}") from error
    if not any(hasattr(HfQuantizer, hook) for hook in ("update_attn_implementation", "update_tp_plan")):
        raise ImportError(f"{_NEEDED}: update transformers")

    from prox24_lightning.integrations.transformers.quantizer import Prox24Config, Prox24Quantizer
    from prox24_lightning.io.packed_folder import QUANT_METHOD

    if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(QUANT_METHOD)(Prox24Config)
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(QUANT_METHOD)(Prox24Quantizer)
