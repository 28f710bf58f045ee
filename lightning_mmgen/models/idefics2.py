"""Idefics2, without its perceiver unless asked for: every patch is a token (MUMU, section 3: the perceiver's 64 tokens lose detail)."""

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
        keep_perceiver: keep it, as a fourth part ``perceiver``: the patches of every picture become as many tokens as it has latents.
        norm: RMS-normalise the projected patches, as the removed perceiver did at its end.
        max_tokens, mix, dtype, attention, quantization, device: see :class:`Encoder`.
    """

    architecture = "Idefics2ForConditionalGeneration"
    transformers_names = {
        "vision": "model.vision_model",
        "projector": "model.connector.modality_projection",
        "language": "model.text_model",
        "perceiver": "model.connector.perceiver_resampler",
    }
    image_token = "<image>"

    def __init__(
        self,
        pretrained: str = "HuggingFaceM4/idefics2-8b",
        image_tokens: int = 324,
        norm: bool = False,
        keep_perceiver: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(pretrained, image_tokens, **settings)
        self.norm, self.keep_perceiver = norm, keep_perceiver

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "norm": self.norm, "keep_perceiver": self.keep_perceiver}

    def take(self, model: Any) -> tuple[nn.Module, nn.Module, nn.Module]:
        if self.keep_perceiver:
            self.perceiver = model.connector.perceiver_resampler
        return model.vision_model, model.connector.modality_projection, model.text_model

    @property
    def patch_size(self) -> int:
        return int(self.model_config.vision_config.patch_size)

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        return (1, int(self.model_config.perceiver_config.resampler_n_latents)) if self.keep_perceiver else super().grid_of(height, width)

    def spell(self, count: int) -> tuple[str, str]:
        return "<fake_token_around_image>", "<fake_token_around_image>"

    def see(self, pixels: Tensor) -> Tensor:
        n, _, h, w = pixels.shape
        grid = torch.ones(n, h // self.patch_size, w // self.patch_size, dtype=torch.bool, device=pixels.device)
        pixels = pixels.to(next(self.vision.parameters()).dtype)
        return self.vision(pixel_values=pixels, patch_attention_mask=grid).last_hidden_state  # type: ignore[no-any-return]

    def project(self, patches: Tensor) -> Tensor:
        tokens = self.projector(patches.to(next(self.projector.parameters()).dtype))
        if self.keep_perceiver:
            tokens = self.perceiver(tokens, torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device))
        if self.norm:
            tokens = nn.functional.rms_norm(tokens.float(), tokens.shape[-1:]).to(tokens.dtype)
        return tokens  # type: ignore[no-any-return]
