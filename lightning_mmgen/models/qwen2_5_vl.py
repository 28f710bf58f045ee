"""Qwen2.5-VL: a vision tower of any resolution whose patches are merged four to a token, and rotary positions in three dimensions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .encoder import Encoder, Place, clip_normalised


class Rows(nn.Module):
    """Joins every ``unit`` rows of [n * unit, c] to one, [n, unit * c]: stands where the vision tower had its merger, which is the
    ``projector`` here, so that the tower still puts its windows back in order."""

    def __init__(self, unit: int) -> None:
        super().__init__()
        self.unit = unit

    def forward(self, patches: Tensor) -> Tensor:
        return patches.view(-1, self.unit * patches.shape[-1])


class Qwen25VLEncoder(Encoder):
    """``Qwen2_5_VLForConditionalGeneration`` of ``transformers``: ``vision`` (its tower), ``projector`` (the tower's ``merger``),
    ``language`` (Qwen2.5).

    Args:
        pretrained: hub name or local folder.
        image_tokens: of 28 x 28 px each (2 x 2 patches of 14 px).
        max_tokens, mix, dtype, attention, quantization, device: see :class:`Encoder`.
    """

    architecture = "Qwen2_5_VLForConditionalGeneration"
    transformers_names = {"vision": "model.visual", "projector": "model.visual.merger", "language": "model.language_model"}
    image_token = "<|image_pad|>"

    def __init__(self, pretrained: str = "Qwen/Qwen2.5-VL-7B-Instruct", image_tokens: int = 324, **settings: Any) -> None:
        super().__init__(pretrained, image_tokens, **settings)

    def take(self, model: Any) -> tuple[nn.Module, nn.Module, nn.Module]:
        projector, model.visual.merger = model.visual.merger, Rows(model.visual.spatial_merge_unit)
        return model.visual, projector, model.language_model

    @property
    def patch_size(self) -> int:
        return int(self.model_config.vision_config.patch_size * self.model_config.vision_config.spatial_merge_size)

    def spell(self, count: int) -> tuple[str, str]:
        return "<|vision_start|>", "<|vision_end|>"

    def see(self, pixels: Tensor) -> Tensor:
        vision = self.model_config.vision_config
        p, m = int(vision.patch_size), int(vision.spatial_merge_size)
        n, c, rows, columns = len(pixels), pixels.shape[1], pixels.shape[2] // self.patch_size, pixels.shape[3] // self.patch_size
        pixels = clip_normalised(pixels)[..., : rows * m * p, : columns * m * p]
        patches = pixels.reshape(n, c, rows, m, p, columns, m, p).permute(0, 2, 5, 3, 6, 1, 4, 7)  # [n, rows, columns, m, m, c, p, p]
        frames = patches.unsqueeze(6).expand(*patches.shape[:6], vision.temporal_patch_size, p, p).flatten(5).flatten(0, 4)  # a still film
        grid = torch.tensor([[1, rows * m, columns * m]] * n, device=pixels.device)
        merged = self.vision(frames.to(next(self.vision.parameters()).dtype), grid_thw=grid).pooler_output  # [n * tokens, m * m * width]
        return merged.view(n, rows * columns * m * m, -1)  # type: ignore[no-any-return]

    def project(self, patches: Tensor) -> Tensor:
        tokens = self.projector(patches.flatten(0, 1).to(next(self.projector.parameters()).dtype))
        return tokens.view(len(patches), -1, tokens.shape[-1])  # type: ignore[no-any-return]

    def positions(self, mask: Tensor, places: list[list[Place]]) -> Tensor:
        """Count, time, row and column of every token, [4, b, n]: a word advances the last three, a picture by its longer side (Qwen2-VL,
        2.1). The count tells packed prompts apart."""
        ids = torch.zeros(3, *mask.shape, dtype=torch.long, device=mask.device)
        for b, pictures in enumerate(places):
            at, now = 0, 0  # the next token, and its position
            for start, rows, columns in pictures:
                ids[:, b, at:start] = torch.arange(now, now + start - at, device=mask.device)
                now, at = now + start - at, start + rows * columns
                ids[0, b, start:at] = now
                ids[1, b, start:at] = now + torch.arange(rows, device=mask.device).repeat_interleave(columns)
                ids[2, b, start:at] = now + torch.arange(columns, device=mask.device).repeat(rows)
                now += max(rows, columns)
            ids[:, b, at:] = torch.arange(now, now + mask.shape[1] - at, device=mask.device)
        return torch.cat([super().positions(mask, places)[None], ids])
