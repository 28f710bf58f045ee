"""CLIP-T, PickScore and the direction of an edit: how well pictures fit words."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from ..models.clip import Clip
from .mean import PictureMean


class CLIPMean(PictureMean):
    """Base of the scores by any CLIP of ``transformers``. Scores of different backbones are never compared.

    Args:
        pretrained: hub name, folder, ``toybox/clip``, or a CLIP that several scores share.
        tokenizer: name or folder of another tokenizer than the CLIP's own.
    """

    def __init__(self, pretrained: str | Clip = "openai/clip-vit-large-patch14", tokenizer: str | None = None) -> None:
        super().__init__()
        self.clip = Clip(pretrained, tokenizer) if isinstance(pretrained, str) else pretrained


class CLIPSimilarity(CLIPMean):
    """Mean cosine similarity of picture and caption (CLIP-T of DreamBooth, section 4.2)."""

    def score(self, pictures: Tensor, captions: Sequence[str]) -> Tensor:
        """Cosine of each picture [b, 3, H, W] in [-1, 1] with its plain caption, [b]; nan where the caption is empty."""
        cosines = (self.clip.embed(pictures) * self.clip.embed_texts(captions)).sum(-1)
        return cosines.where(torch.tensor([bool(c.strip()) for c in captions], device=cosines.device), torch.nan)


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
    def score(self, pictures: Tensor, captions: Sequence[str]) -> Tensor:
        """The score of each picture [b, 3, H, W] in [-1, 1] with its caption, [b]; of an oblong picture the square in its middle counts."""
        h, w = pictures.shape[-2:]
        s = min(h, w)
        square = pictures[..., (h - s) // 2 : (h + s) // 2, (w - s) // 2 : (w + s) // 2]
        return self.clip.model.logit_scale.exp() * super().score(square, captions)


class DirectionalSimilarity(CLIPMean):
    """Mean cos(I1 - I0, T1 - T0) (Gal et al. 2021, equation 2, of vectors of length 1 as InstructPix2Pix has it): whether an edit moves
    the picture as its captions move. 0 for a copy of the source, and for two equal captions."""

    def score(self, pictures: Tensor, sources: Tensor, captions: Sequence[str], source_captions: Sequence[str]) -> Tensor:
        """Of edited pictures and their sources, each [b, 3, H, W] in [-1, 1], and the captions of both, [b]."""
        moved = self.clip.embed(pictures) - self.clip.embed(sources)
        told = self.clip.embed_texts(captions) - self.clip.embed_texts(source_captions)
        return cosine_similarity(moved, told, dim=-1)
