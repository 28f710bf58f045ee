"""CLIP-T: how well pictures fit their captions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from ..models.encoder import clip_normalised
from ..models.weights import locate


class CLIPSimilarity(Metric):
    """Mean cosine similarity of picture and caption (CLIP-T of DreamBooth, section 4.2), from any CLIP of ``transformers``.

    Scores of different backbones are never compared.

    Args:
        pretrained: hub name, folder, or ``toybox/clip``.
    """

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, pretrained: str = "openai/clip-vit-large-patch14") -> None:
        super().__init__()
        from transformers import AutoTokenizer, CLIPModel

        self.clip = CLIPModel.from_pretrained(locate(pretrained)).eval().requires_grad_(False)
        self.tokenizer = AutoTokenizer.from_pretrained(locate(pretrained))
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    @torch.no_grad()
    def similarity(self, pictures: Tensor, captions: Sequence[str]) -> Tensor:
        """Cosine of each picture [b, 3, H, W] in [-1, 1] with its caption, [b]."""
        config = self.clip.config
        side = config.vision_config.image_size
        pictures = torch.nn.functional.interpolate(pictures.float(), (side, side), mode="bicubic", antialias=True).clamp(-1, 1)
        text = self.tokenizer(
            list(captions), padding=True, truncation=True, max_length=config.text_config.max_position_embeddings, return_tensors="pt"
        )
        out = self.clip(
            input_ids=text.input_ids.to(pictures.device),
            attention_mask=text.attention_mask.to(pictures.device),
            pixel_values=clip_normalised(pictures),
        )
        return (out.image_embeds * out.text_embeds).sum(-1)  # both have length 1

    def update(self, pictures: Tensor, captions: Sequence[str]) -> None:
        """Pictures [b, 3, H, W] in [-1, 1] and their plain captions."""
        scores = self.similarity(pictures, captions)
        self.total += scores.double().sum()
        self.count += len(scores)

    def compute(self) -> Tensor:
        """The mean over all pictures."""
        return (self.total / self.count).float()
