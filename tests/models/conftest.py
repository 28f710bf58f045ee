"""Tiny vision-language models of every kind, made from configurations with random weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MllamaConfig,
    MllamaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from lightning_mmgen.models.encoder import Encoder
from lightning_mmgen.models.idefics2 import Idefics2Encoder
from lightning_mmgen.models.llava import LlavaEncoder
from lightning_mmgen.models.qwen2_5_vl import Qwen25VLEncoder
from lightning_mmgen.models.weights import locate

WIDE = {"initializer_range": 0.2}  # so that every input shows in the output
TEXT: dict[str, Any] = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, **WIDE}
TEXT |= {"num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3, "vocab_size": 520}
QWEN_TOKENS = ["<|image_pad|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>"]


def save_tokenizer(folder: Path, *more: str) -> Any:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(locate("toybox/vlm")) / name, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(list(more), special_tokens=True)
    tokenizer.save_pretrained(folder)
    return tokenizer


@pytest.fixture(scope="session")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Patches of 4 px, 2 x 2 of them a token, windows of 2 x 2 tokens but in the last layer."""
    folder = tmp_path_factory.mktemp("qwen")
    ids = dict(zip(QWEN_TOKENS, save_tokenizer(folder, *QWEN_TOKENS).convert_tokens_to_ids(QWEN_TOKENS), strict=True))
    vision = {"hidden_size": 16, "out_hidden_size": 24, "intermediate_size": 32, "depth": 2, "num_heads": 2, "patch_size": 4, **WIDE}
    vision |= {"window_size": 16, "fullatt_block_indexes": [1], "spatial_merge_size": 2, "temporal_patch_size": 2}
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [1, 1, 1]}
    config = Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_parameters": rope},
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    torch.manual_seed(0)
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Patches of 4 px; the last layer but one of three is read."""
    folder = tmp_path_factory.mktemp("llava")
    tokenizer = save_tokenizer(folder)
    vision = {"model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, **WIDE}
    vision |= {"num_attention_heads": 2, "image_size": 16, "patch_size": 4}
    text = {**TEXT, "model_type": "llama"}
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=tokenizer.convert_tokens_to_ids("<image>"))
    torch.manual_seed(0)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def mllama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiles of 16 px in patches of 4, at most two of them; the second of three layers attends to pictures."""
    folder = tmp_path_factory.mktemp("mllama")
    tokenizer = save_tokenizer(folder, "<|image|>")
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_global_layers": 1, "attention_heads": 2, **WIDE}
    vision |= {"image_size": 16, "patch_size": 4, "max_num_tiles": 2, "intermediate_layers_indices": [0, 1], "vision_output_dim": 48}
    vision |= {"supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]]}
    rope = {"rope_type": "default", "rope_theta": 10_000.0}
    text = {**TEXT, "num_hidden_layers": 3, "cross_attention_layers": [1], "rope_parameters": rope}
    config = MllamaConfig(vision_config=vision, text_config=text, image_token_id=tokenizer.convert_tokens_to_ids("<|image|>"))
    torch.manual_seed(0)
    model = MllamaForConditionalGeneration(config)
    for name, parameter in model.named_parameters():
        if "gate" in name:  # else they are closed, and pictures do not show
            parameter.data.fill_(0.7)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(params=["idefics2", "qwen2_5_vl", "llava"])
def any_encoder(request: pytest.FixtureRequest) -> Encoder:
    """Each encoder, with a budget of 16 tokens a picture."""
    kinds = {"idefics2": (Idefics2Encoder, "vlm"), "qwen2_5_vl": (Qwen25VLEncoder, "qwen"), "llava": (LlavaEncoder, "llava")}
    kind, folder = kinds[request.param]
    encoder = kind(str(request.getfixturevalue(folder)), image_tokens=16)
    encoder.build()
    return encoder


def picture(rows: int, columns: int, encoder: Encoder) -> Tensor:
    return torch.rand(3, rows * encoder.patch_size, columns * encoder.patch_size) * 2 - 1
