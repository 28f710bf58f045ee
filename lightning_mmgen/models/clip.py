"""CLIP: pictures and texts as vectors of one space."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoTokenizer

from .features import Features
from .weights import locate


class Clip(Features):
    """A frozen CLIP of ``transformers`` and its tokenizer.

    Args:
        pretrained: hub name, folder, or ``toybox/clip``.
        tokenizer: the same for the tokenizer; the CLIP's own by default.

    Raises:
        ValueError: it is no CLIP.
    """

    def __init__(self, pretrained: str, tokenizer: str | None = None) -> None:
        super().__init__(pretrained)
        if not self.is_clip:
            raise ValueError(f"{pretrained}: a {self.model.config.model_type} is no CLIP")
        self.tokenizer = AutoTokenizer.from_pretrained(locate(tokenizer or pretrained))
        self.width = int(self.model.config.projection_dim)

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Texts, cut where the CLIP ends, as vectors of length 1, [b, d]."""
        longest = self.model.config.text_config.max_position_embeddings
        inputs = self.tokenizer(list(texts), padding=True, truncation=True, max_length=longest, return_tensors="pt").to(self.model.device)
        out = self.model.get_text_features(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask)
        return normalize(out.pooler_output, dim=-1)
