"""Tiny parts of the builders, made from configurations with random weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import (
    BertTokenizer,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoImageProcessorPil,
    GroundingDinoProcessor,
)

DETECTOR_WORDS = ["man", "dog", "scooter", "ball", "red", "big", "head", "woman", "##s"]


@pytest.fixture(scope="session")
def grounding_dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a GroundingDINO for texts of 24 tokens, with 12 object queries; [CLS], [SEP] and the full stop have their usual numbers."""
    folder = tmp_path_factory.mktemp("grounding_dino")
    words = ["[PAD]", *(f"[unused{i}]" for i in range(99)), "[UNK]", "[CLS]", "[SEP]", "[MASK]", *DETECTOR_WORDS]
    words += [f"[filler{i}]" for i in range(1012 - len(words))] + ["."]
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(words)})
    images = GroundingDinoImageProcessorPil(size={"shortest_edge": 32, "longest_edge": 48})
    GroundingDinoProcessor(images, tokenizer).save_pretrained(folder)
    text = {"model_type": "bert", "vocab_size": len(words), "hidden_size": 16, "intermediate_size": 32}
    text |= {"num_hidden_layers": 1, "num_attention_heads": 2, "initializer_range": 0.5}
    swin = {"model_type": "swin", "image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2]}
    swin |= {"window_size": 4, "initializer_range": 0.2, "out_features": ["stage1", "stage2"]}
    small = {"encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "d_model": 32}
    small |= {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "num_queries": 12, "num_feature_levels": 2, "max_text_len": 24}
    config = GroundingDinoConfig(backbone_config=swin, text_config=text, **small)
    torch.manual_seed(0)
    model = GroundingDinoForObjectDetection(config)
    for weight in model.bbox_embed[0].parameters():  # the library begins with boxes of one size
        torch.nn.init.normal_(weight, std=0.4)
    model.save_pretrained(folder)
    return folder
