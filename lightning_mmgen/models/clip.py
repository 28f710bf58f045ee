"""CLIP: pictures and texts as vectors of one space."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, normalize
from transformers import AutoTokenizer, CLIPModel

from .encoder import clip_normalised
from .weights import locate


class Clip(nn.Module):
    """A frozen CLIP of ``transformers`` and its tokenizer.

    Args:
        pretrained: hub name, folder, or ``toybox/clip``.
        tokenizer: the same for the tokenizer; the CLIP's own by default.
    """

    def __init__(self, pretrained: str, tokenizer: str | None = None) -> None:
        super().__init__()
        self.model = CLIPModel.from_pretrained(locate(pretrained)).eval().requires_grad_(False)
        self.tokenizer = AutoTokenizer.from_pretrained(locate(tokenizer or pretrained))
        self.side = int(self.model.config.vision_config.image_size)
        self.width = int(self.model.config.projection_dim)

    def train(self, mode: bool = True) -> Clip:
        """Stays in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def embed_pictures(self, pictures: Tensor) -> Tensor:
        """Pictures [b, 3, H, W] in [-1, 1] as vectors of length 1, [b, d]."""
        pictures = interpolate(pictures.float(), (self.side, self.side), mode="bicubic", antialias=True).clamp(-1, 1)
        return normalize(self.model.get_image_features(pixel_values=clip_normalised(pictures)).pooler_output, dim=-1)

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Texts, cut where the CLIP ends, as vectors of length 1, [b, d]."""
        longest = self.model.config.text_config.max_position_embeddings
        inputs = self.tokenizer(list(texts), padding=True, truncation=True, max_length=longest, return_tensors="pt").to(self.model.device)
        out = self.model.get_text_features(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask)
        return normalize(out.pooler_output, dim=-1)
