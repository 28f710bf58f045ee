"""From prompts to what the UNet attends to: the same way in training, in evaluation and in the pipeline."""

from __future__ import annotations

from typing import NamedTuple

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.nn.functional import interpolate
from torch.nn.utils.rnn import pad_sequence

from .batch import Condition, Context, PackedImages
from .models.adapter import Adapter
from .models.codec import Codec
from .models.encoder import Encoder
from .models.references import ReferenceAttention


class Conditioner(NamedTuple):
    """The parts that make a condition. Without ``reference_attention`` the encoder alone sees the references."""

    encoder: Encoder
    adapter: Adapter
    unet: UNet2DConditionModel
    codec: Codec
    reference_attention: ReferenceAttention | None = None

    def __call__(
        self, instructions: list[str], markers: list[list[int]], references: list[PackedImages], phrases: list[list[str]] | None = None
    ) -> Condition:
        """Encode b prompts.

        Args:
            phrases: for each prompt, what its references show, by slot: the text beside the marker on the way through the UNet.
        """
        if self.reference_attention is None:
            return self.read(instructions, markers, references)
        names = phrases or [[""] * len(marks) for marks in markers]
        texts = [f"[ref#{k}] {name}".strip() for marks, own in zip(markers, names, strict=True) for k, name in zip(marks, own, strict=True)]
        texts = texts or [""]  # a pass through the UNet all the same: every rank must make it
        told = self.read(texts, [[] for _ in texts], [])
        if not self.reference_attention.in_prompt:
            instructed = self.read(instructions, [[] for _ in markers], [])
        else:
            instructed = self.read(instructions, markers, references)
        return instructed._replace(context=self.context(told, markers, references))

    def read(self, instructions: list[str], markers: list[list[int]], references: list[PackedImages]) -> Condition:
        """Through encoder and adapter. Where the encoder has a device of its own, the pictures go there, and its hidden states come to the
        adapter's, with their gradients the way back; nothing else crosses."""
        if self.encoder.device is None:
            return self.adapter(self.encoder(instructions, markers, references))
        there, here = (next(part.parameters()).device for part in (self.encoder, self.adapter))
        moved = [g._replace(pixels=g.pixels.to(there), patches=None if g.patches is None else g.patches.to(there)) for g in references]
        states = self.encoder(instructions, markers, moved)
        return self.adapter(states._replace(tokens=states.tokens.to(here), mask=states.mask.to(here)))

    def context(self, told: Condition, markers: list[list[int]], references: list[PackedImages]) -> Context:
        """References through the down blocks, each with its own text (``told``, a row a reference in the order of the markers)."""
        assert self.reference_attention is not None
        side, first = self.reference_attention.size, [sum(map(len, markers[:b])) for b in range(len(markers))]
        nobody = torch.zeros(1, dtype=torch.long)
        groups = references or [PackedImages(told.tokens.new_zeros(1, 3, side, side), nobody, nobody)]
        rows = [first[b] + slot for g in groups for b, slot in zip(g.sample.tolist(), g.slot.tolist(), strict=True)]
        z_0 = self.codec.encode(torch.cat([_resized(g.pixels, side) for g in groups]))  # one pass: ranks make as many as each other
        own = told._replace(tokens=told.tokens[rows], mask=told.mask[rows], pooled=None if told.pooled is None else told.pooled[rows])
        features = dict(zip(rows, self.unet.down_features(z_0, own, (side, side)), strict=True))  # type: ignore[operator]
        blank = next(iter(features.values()))[:1]
        sets = [torch.cat([features[first[b] + k] for k in range(len(marks))] or [blank]) for b, marks in enumerate(markers)]
        counts = torch.tensor([len(s) if marks else 0 for s, marks in zip(sets, markers, strict=True)], device=blank.device)
        tokens = pad_sequence(sets, batch_first=True)
        return Context(tokens, torch.arange(tokens.shape[1], device=blank.device) < counts[:, None])


def _resized(pixels: Tensor, side: int) -> Tensor:
    """Pictures [n, 3, h, w] at the size at which references go through the UNet."""
    if pixels.shape[-2:] == (side, side):
        return pixels
    return interpolate(pixels, (side, side), mode="bicubic", antialias=True).clamp(-1, 1)
