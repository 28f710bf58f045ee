"""Boxes for the phrases of a caption by GroundingDINO (Liu et al. 2023, arXiv 2303.05499), as MUMU finds its crops (section 4)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from PIL.Image import Image
from torch import Tensor

from ..models.weights import locate

SPECIAL = 2  # [CLS] and [SEP]


class Detection(NamedTuple):
    """One object: the index of its phrase, its box in pixels (it may reach over the picture's edge), and its score from 0 to 1."""

    phrase: int
    left: float
    top: float
    right: float
    bottom: float
    score: float


class Query(NamedTuple):
    """A text for the detector, and of each phrase in it: its index, and the characters [start, end) of the text that it takes."""

    text: str
    spans: list[tuple[int, int, int]]


class Detector:
    """A GroundingDINO of ``transformers``.

    Args:
        pretrained: a hub name or a local folder.
        box_threshold: least score of a box, which is its best token's.
        text_threshold: least score of the best token of the box's phrase.
        device: where it runs.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: a model of another kind.
        OSError: a name that the hub does not have, or a folder without a model.
    """

    def __init__(
        self,
        pretrained: str = "IDEA-Research/grounding-dino-base",
        box_threshold: float = 0.35,
        text_threshold: float = 0.25,
        device: str = "cpu",
    ) -> None:
        from transformers import AutoConfig, AutoModelForZeroShotObjectDetection, AutoProcessor

        folder = locate(pretrained)
        config = AutoConfig.from_pretrained(folder)
        if not config.model_type.endswith("grounding-dino"):
            raise ValueError(f"{pretrained} is a {config.model_type}, not a grounding-dino")
        self.processor: Any = AutoProcessor.from_pretrained(folder)
        self.model: Any = AutoModelForZeroShotObjectDetection.from_pretrained(folder).to(device).eval()
        self.box_threshold, self.text_threshold, self.device = box_threshold, text_threshold, device

    def detect(self, images: Sequence[Image], phrases: Sequence[Sequence[str]]) -> list[list[Detection]]:
        """Find the phrases of each image, ``phrases[i]`` in ``images[i]``; of each image the best score first.

        An image whose phrases do not fit into one text is asked several times; at most ``len(images)`` pairs of image and text go through
        the model at once.
        """
        asked = [(i, query) for i, some in enumerate(phrases) for query in self.queries(some)]
        found: list[list[Detection]] = [[] for _ in images]
        for at in range(0, len(asked), max(len(images), 1)):
            batch = asked[at : at + len(images)]
            for (i, _), some in zip(batch, self._forward([images[i] for i, _ in batch], [query for _, query in batch]), strict=True):
                found[i] += some
        return [sorted(some, key=lambda d: -d.score) for some in found]

    def queries(self, phrases: Sequence[str]) -> list[Query]:
        """The phrases as few texts, "man. dog. scooter.", none over the model's limit of tokens; a phrase without a letter is left out."""
        out: list[Query] = []
        free = 0
        for i, phrase in enumerate(phrases):
            words = re.sub(r"[.?\s]+", " ", phrase.lower()).strip()  # both marks would cut the phrase in two
            tokens = len(self.processor.tokenizer.tokenize(f"{words}."))
            if not words:
                continue
            if not out or tokens > free:
                out.append(Query("", []))
                free = self.model.config.max_text_len - SPECIAL
            text, spans = out[-1]
            start = len(text) + bool(text)
            out[-1] = Query(f"{text} {words}.".lstrip(), [*spans, (i, start, start + len(words))])
            free -= tokens
        return out

    @torch.inference_mode()
    def _forward(self, images: list[Image], queries: list[Query]) -> list[list[Detection]]:
        limit = {"padding": True, "truncation": True, "max_length": self.model.config.max_text_len}
        inputs = self.processor(images=images, text=[q.text for q in queries], return_tensors="pt", return_offsets_mapping=True, **limit)
        offsets = inputs.pop("offset_mapping")  # [b, t, 2]
        output = self.model(**inputs.to(self.device))
        tokens = output.logits.sigmoid().float().cpu()[..., : offsets.shape[1]]  # [b, q, t]
        boxes = output.pred_boxes.float().cpu()  # [b, q, (x, y, w, h)], shares of the picture
        return [self._read(*row) for row in zip(images, queries, offsets, tokens, boxes, strict=True)]

    def _read(self, image: Image, query: Query, offsets: Tensor, tokens: Tensor, boxes: Tensor) -> list[Detection]:
        """The detections of one image from the token scores [q, t] and boxes [q, 4] of its q object queries."""
        start, end = offsets.T
        inside = torch.stack([(start >= a) & (end <= b) & (end > start) for _, a, b in query.spans])  # [p, t]
        scores, phrases = torch.where(inside, tokens[:, None], 0.0).amax(-1).max(-1)  # [q, p, t] -> [q]
        best = tokens.amax(-1)
        keep = (best > self.box_threshold) & (scores > self.text_threshold)
        x, y, w, h = (boxes[keep] * torch.tensor([image.width, image.height] * 2)).T
        edges = torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], -1).tolist()
        rows = zip(phrases[keep].tolist(), edges, best[keep].tolist(), strict=True)
        return [Detection._make((query.spans[p][0], *edge, score)) for p, edge, score in rows]
