"""Idefics2 without its perceiver: every patch is a token (MUMU, section 3: the perceiver's 64 tokens lose detail)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .encoder import Encoder


class Idefics2Encoder(Encoder):
    """``Idefics2ForConditionalGeneration`` of ``transformers``: ``vision`` (SigLIP), ``projector`` (``modality_projection``),
    ``language`` (Mistral).

    Args:
        pretrained: hub name, local folder or ``toybox/vlm``.
        image_tokens: 324 = 18 x 18 patches of 14 px in MUMU's stage 1, 1,296 in stage 2.
        norm: RMS-normalise the projected patches, as the removed perceiver did at its end.
        max_tokens, mix, dtype, attention: see :class:`Encoder`.
    """

    architecture = "Idefics2ForConditionalGeneration"
    transformers_names = {
        "vision": "model.vision_model",
        "projector": "model.connector.modality_projection",
        "language": "model.text_model",
    }
    image_token = "<image>"

    def __init__(
        self,
        pretrained: str = "HuggingFaceM4/idefics2-8b",
        image_tokens: int = 324,
        norm: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(pretrained, image_tokens, **settings)
        self.norm = norm

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "norm": self.norm}

    def take(self, model: Any) -> tuple[nn.Module, nn.Module, nn.Module]:
        return model.vision_model, model.connector.modality_projection, model.text_model

    @property
    def patch_size(self) -> int:
        return int(self.model_config.vision_config.patch_size)

    def spell(self, count: int) -> tuple[str, str]:
        return "<fake_token_around_image>", "<fake_token_around_image>"

    def embed_images(self, pixels: Tensor) -> Tensor:
        n, _, h, w = pixels.shape
        grid = torch.ones(n, h // self.patch_size, w // self.patch_size, dtype=torch.bool, device=pixels.device)
        pixels = pixels.to(next(self.vision.parameters()).dtype)
        patches = self.vision(pixel_values=pixels, patch_attention_mask=grid).last_hidden_state
        tokens = self.projector(patches.to(next(self.projector.parameters()).dtype))
        if self.norm:
            tokens = nn.functional.rms_norm(tokens.float(), tokens.shape[-1:]).to(tokens.dtype)
        return tokens  # type: ignore[no-any-return]
