"""Where an encoder's weights go, and in how many bits: on a device of its own, quantised by bitsandbytes."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn

Quantization = Literal["nf4", "int8"]


def placement(device: str | None, quantization: Quantization | None, dtype: torch.dtype, kept: list[str]) -> dict[str, Any]:
    """The arguments of ``from_pretrained`` for weights on ``device``, or else the default one, with all linear layers quantised but for
    those in the modules ``kept``.

    Raises:
        ValueError: the device or bitsandbytes is not here.
    """
    if device is not None:
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"encoder.device: {device} is not here ({str(error).splitlines()[0]})") from error
    if quantization is None:
        return {} if device is None else {"device_map": {"": device}}
    return {"device_map": {"": device or torch.get_default_device()}, "quantization_config": _in_bits(quantization, dtype, kept)}


def _in_bits(quantization: Quantization, dtype: torch.dtype, kept: list[str]) -> Any:
    """NF4 with its scales quantised too, computing in ``dtype`` (Dettmers et al. 2023, section 3), or LLM.int8 (Dettmers et al. 2022)."""
    from transformers import BitsAndBytesConfig

    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ValueError(f"encoder.quantization: {quantization} needs bitsandbytes: pip install 'lightning_mmgen[quantization]'") from error
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)
    nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype}
    return BitsAndBytesConfig(load_in_4bit=True, **nf4, llm_int8_skip_modules=kept)


def keep_backward(part: nn.Module) -> None:
    """On some CPUs bitsandbytes packs 4-bit weights anew when first used in evaluation; what is packed has no backward pass, so that a
    picture drawn between two steps would cut the gradient without a word."""
    for layer in part.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def count(parameter: nn.Parameter) -> int:
    """How many weights a parameter stands for: bitsandbytes packs two of 4 bits into a byte, ZeRO-3 leaves none in the parameter itself."""
    state = getattr(parameter, "quant_state", None)
    return int(getattr(parameter, "ds_numel", parameter.numel()) if state is None else state.shape.numel())
