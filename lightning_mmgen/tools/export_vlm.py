"""``mmgen export`` of a fine-tuned vision-language model: a folder that plain ``transformers`` loads."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from transformers.utils import cached_file

from ..models.encoder import Encoder
from ..models.idefics2 import Idefics2Encoder
from ..models.weights import locate
from .export import _plain, _rename

if TYPE_CHECKING:
    from ..answering import VisualInstructionTuning

BESIDE = (
    *(
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "merges.txt",
    ),
    *("chat_template.jinja", "chat_template.json", "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"),
)
"""What lies beside a model's weights: tokenizer, chat template, processor."""
WITHOUT_PERCEIVER = "was tuned without Idefics2's perceiver, which transformers puts back: read it with Idefics2Encoder alone"


def export_vlm(module: VisualInstructionTuning, out: str | Path, dtype: torch.dtype | None = None) -> Path:
    """Write the model to ``out`` with its LoRA merged, as ``AutoModelForImageTextToText`` and ``AutoProcessor`` read it (and lmms-eval and
    VLMEvalKit with them). An Idefics2 without its perceiver is no model of ``transformers``, which is said in a line: only this package
    reads it, as an encoder.

    Args:
        dtype: of all weights; the encoder's by default.

    Raises:
        FileExistsError: ``out`` holds files, which would mix with the export.
        ValueError: the weights are quantised, so that LoRA cannot be merged into them.
    """
    import transformers

    root, encoder = Path(out), module.encoder
    if encoder.quantization is not None:
        raise ValueError(f"encoder.quantization: {encoder.quantization}: LoRA is merged into whole weights; set it to null in config.yaml")
    root.mkdir(parents=True, exist_ok=True)
    if any(root.iterdir()):
        raise FileExistsError(f"{out}: is not empty")
    kind = dtype or getattr(torch, encoder.dtype)
    model = getattr(transformers, encoder.architecture).from_pretrained(locate(encoder.pretrained), dtype=kind)
    weights = trained_weights(encoder) | {f"lm_head.{n}": p.detach() for n, p in module.head.named_parameters() if p.requires_grad}
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, weight in weights.items():
            own[name].copy_(weight)
    model.config._name_or_path = ""  # where the weights once lay is nobody's business
    model.save_pretrained(root)
    copy_beside(encoder.pretrained, root)
    if isinstance(encoder, Idefics2Encoder) and (encoder.norm or not encoder.keep_perceiver):
        print(f"warning: {out}: {WITHOUT_PERCEIVER}", file=sys.stderr)
    return root


def trained_weights(encoder: Encoder) -> dict[str, Tensor]:
    """What was trained of an encoder, LoRA merged, by its names in the model of ``transformers``."""
    found: dict[str, Tensor] = {}
    for name, layer in encoder.named_modules():
        if isinstance(layer, BaseTunerLayer):
            weight = layer.get_base_layer().weight.float()
            found[f"{name}.weight"] = weight + layer.get_delta_weight("default").float()  # type: ignore[operator]
    found |= {n: p.detach() for n, p in encoder.named_parameters() if p.requires_grad and ".lora_" not in n}
    return {_rename(_plain(name), encoder.transformers_names): weight for name, weight in found.items()}


def copy_beside(pretrained: str, out: Path) -> None:
    """Copy a model's files that are no weights and that it has; those of a hub name are downloaded."""
    for name in BESIDE:
        quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
        if (path := cached_file(locate(pretrained), name, **quiet)) is not None:
            shutil.copyfile(path, out / name)
