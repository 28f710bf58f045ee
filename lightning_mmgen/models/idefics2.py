"""Idefics2 without its perceiver: every patch is a token (MUMU, section 3: the perceiver's 64 tokens lose detail)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .encoder import Encoder
from .weights import locate


class Idefics2Encoder(Encoder):
    """``Idefics2ForConditionalGeneration`` of ``transformers`` as three parts: ``vision`` (SigLIP), ``projector``
    (``modality_projection``), ``language`` (Mistral). Pictures are not split.

    Args:
        pretrained: hub name, local folder or ``toybox/vlm``.
        image_tokens: 324 = 18 x 18 patches of 14 px in MUMU's stage 1, 1,296 in stage 2.
        max_tokens: longest prompt, pictures included.
        mix: None for the last hidden states (MUMU), or the weight at which they are added to the input embeddings.
        norm: RMS-normalise the projected patches, as the removed perceiver did at its end.
        dtype: weights' dtype (``float32``, ``bfloat16``).
        attention: attention implementation of ``transformers``.
    """

    transformers_names = {
        "vision": "model.vision_model",
        "projector": "model.connector.modality_projection",
        "language": "model.text_model",
    }

    def __init__(
        self,
        pretrained: str = "HuggingFaceM4/idefics2-8b",
        image_tokens: int = 324,
        max_tokens: int = 2048,
        mix: float | None = None,
        norm: bool = False,
        dtype: str = "float32",
        attention: str = "sdpa",
    ) -> None:
        super().__init__(pretrained, image_tokens, max_tokens, mix)
        self.norm, self.dtype, self.attention = norm, dtype, attention
        self._config: Any = None

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "norm": self.norm, "dtype": self.dtype, "attention": self.attention}

    @property
    def config(self) -> Any:
        """The model's ``Idefics2Config``, read once."""
        if self._config is None:
            from transformers import AutoConfig

            self._config = AutoConfig.from_pretrained(locate(self.pretrained))
        return self._config

    def build(self, weights: bool = True) -> None:
        from transformers import Idefics2ForConditionalGeneration, Idefics2Model

        kind = {"dtype": getattr(torch, self.dtype), "attn_implementation": self.attention}
        if weights:
            model = Idefics2ForConditionalGeneration.from_pretrained(locate(self.pretrained), **kind).model
        else:
            model = Idefics2Model._from_config(self.config, **kind)
        self.adopt(model)

    def adopt(self, model: nn.Module, tokenizer: Any = None) -> None:
        """Take the parts of an ``Idefics2Model`` (its perceiver is left behind), and a tokenizer if it has none of its own yet."""
        self._config, self._tokenizer = model.config, tokenizer or self._tokenizer
        self.vision, self.language = model.vision_model, model.text_model  # type: ignore[assignment]
        self.projector = model.connector.modality_projection  # type: ignore[assignment, union-attr]

    @property
    def hidden_size(self) -> int:
        return int(self.config.text_config.hidden_size)

    @property
    def patch_size(self) -> int:
        return int(self.config.vision_config.patch_size)

    @property
    def image_token(self) -> str:
        return "<image>"

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
        return tokens
