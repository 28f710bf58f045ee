"""CLIP-T and PickScore: how well pictures fit their captions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate, normalize
from torchmetrics import Metric

from ..models.encoder import clip_normalised
from ..models.weights import locate


class CLIPSimilarity(Metric):
    """Mean cosine similarity of picture and caption (CLIP-T of DreamBooth, section 4.2), from any CLIP of ``transformers``.

    Scores of different backbones are never compared.

    Args:
        pretrained: hub name, folder, or ``toybox/clip``.
        tokenizer: the same for the tokenizer; the CLIP's own by default.
    """

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, pretrained: str = "openai/clip-vit-large-patch14", tokenizer: str | None = None) -> None:
        super().__init__()
        from transformers import AutoTokenizer, CLIPModel

        self.clip = CLIPModel.from_pretrained(locate(pretrained)).eval().requires_grad_(False)
        self.tokenizer = AutoTokenizer.from_pretrained(locate(tokenizer or pretrained))
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    @torch.no_grad()
    def embed_pictures(self, pictures: Tensor) -> Tensor:
        """Pictures [b, 3, H, W] in [-1, 1] as vectors of length 1, [b, d]."""
        side = self.clip.config.vision_config.image_size
        pictures = interpolate(pictures.float(), (side, side), mode="bicubic", antialias=True).clamp(-1, 1)
        return normalize(self.clip.get_image_features(pixel_values=clip_normalised(pictures)).pooler_output, dim=-1)

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Texts, cut where the CLIP ends, as vectors of length 1, [b, d]."""
        longest = self.clip.config.text_config.max_position_embeddings
        inputs = self.tokenizer(list(texts), padding=True, truncation=True, max_length=longest, return_tensors="pt").to(self.clip.device)
        out = self.clip.get_text_features(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask)
        return normalize(out.pooler_output, dim=-1)

    def similarity(self, pictures: Tensor, captions: Sequence[str]) -> Tensor:
        """Cosine of each picture [b, 3, H, W] in [-1, 1] with its caption, [b]."""
        return (self.embed_pictures(pictures) * self.embed_texts(captions)).sum(-1)

    def update(self, pictures: Tensor, captions: Sequence[str]) -> None:
        """Pictures [b, 3, H, W] in [-1, 1] and their plain captions."""
        scores = self.similarity(pictures, captions)
        self.total += scores.double().sum()
        self.count += len(scores)

    def compute(self) -> Tensor:
        """The mean over all pictures."""
        return (self.total / self.count).float()


class PickScore(CLIPSimilarity):
    """Mean PickScore (Kirstain et al. 2023, arXiv 2305.01569): the cosine of a CLIP tuned on people's choices, times e to its logit scale.

    Args:
        pretrained: hub name or folder.
        tokenizer: the same for the tokenizer; by default the CLIP's own, and for ``PickScore.HUB`` that of the CLIP it was tuned from,
            as its model card says.
    """

    HUB, TUNED_FROM = "yuvalkirstain/PickScore_v1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"

    def __init__(self, pretrained: str = HUB, tokenizer: str | None = None) -> None:
        super().__init__(pretrained, tokenizer or (self.TUNED_FROM if pretrained == self.HUB else None))

    @torch.no_grad()
    def similarity(self, pictures: Tensor, captions: Sequence[str]) -> Tensor:
        """The score of each picture [b, 3, H, W] in [-1, 1] with its caption, [b]; of an oblong picture the square in its middle counts."""
        h, w = pictures.shape[-2:]
        s = min(h, w)
        square = pictures[..., (h - s) // 2 : (h + s) // 2, (w - s) // 2 : (w + s) // 2]
        return self.clip.logit_scale.exp() * super().similarity(square, captions)
