"""The diffusion UNet of SDXL or SD1.5, from ``diffusers``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from ..batch import Condition
from .weights import locate


@dataclass
class UNetConfig:
    """Which UNet.

    Args:
        pretrained: hub name or folder of a pipeline, or ``toybox/unet``.
        subfolder: where the UNet lies in it; none for a folder of its own.
        dtype: weights' dtype.
        from_scratch: new weights of the same configuration.
    """

    pretrained: str = "stabilityai/stable-diffusion-xl-base-1.0"
    subfolder: str | None = "unet"
    dtype: str = "float32"
    from_scratch: bool = False

    def read(self) -> dict[str, Any]:
        """The UNet's own configuration, without its weights."""
        return dict(UNet2DConditionModel.load_config(locate(self.pretrained), subfolder=self.subfolder))

    def build(self, weights: bool = True) -> UNet2DConditionModel:
        """Load the UNet, or (``weights=False``) create it from its configuration on the default device."""
        if weights and not self.from_scratch:
            kind = getattr(torch, self.dtype)
            return UNet2DConditionModel.from_pretrained(locate(self.pretrained), subfolder=self.subfolder, torch_dtype=kind)
        unet = UNet2DConditionModel.from_config(self.read())
        return unet if self.dtype == "float32" else unet.to(getattr(torch, self.dtype))


def pooled_features(unet: UNet2DConditionModel) -> int:
    """Width of the pooled vector that the UNet adds to its time embedding; 0 for SD1.5."""
    config: Any = unet.config
    if config.addition_embed_type is None:
        return 0
    if config.addition_embed_type != "text_time":
        raise ValueError(
            f"UNet with addition_embed_type={config.addition_embed_type!r} is not supported; text_time (SDXL) and none (SD1.5) are"
        )
    return int(config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim)


def denoise(unet: UNet2DConditionModel, z_t: Tensor, timesteps: Tensor, condition: Condition, side: tuple[int, int]) -> Tensor:
    """One forward pass of the UNet.

    Args:
        z_t: [b, c, h, w].
        timesteps: [b].
        condition: the adapter's output.
        side: height and width of the picture in pixels: SDXL's original and target size, with no crop.

    Returns:
        The prediction [b, c, h, w].
    """
    z_t, added = z_t.to(unet.dtype), None
    if condition.pooled is not None:
        ids = torch.tensor([*side, 0, 0, *side], dtype=z_t.dtype, device=z_t.device).expand(len(z_t), 6)
        added = {"text_embeds": condition.pooled.to(z_t.dtype), "time_ids": ids}
    return unet(
        z_t, timesteps, condition.tokens.to(z_t.dtype), encoder_attention_mask=condition.mask, added_cond_kwargs=added, return_dict=False
    )[0]
