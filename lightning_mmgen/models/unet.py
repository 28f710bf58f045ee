"""The diffusion UNet of SDXL or SD1.5, from ``diffusers``."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from torch import Tensor

from ..batch import Condition
from .loading import Weights, awaited, fill, later
from .weights import locate

if TYPE_CHECKING:
    from .references import ReferenceAttention
    from .source_gate import SourceGate


@dataclass
class UNetConfig:
    """Which UNet.

    Args:
        pretrained: hub name or folder of a pipeline, or ``toybox/unet``.
        subfolder: where the UNet lies in it; none for a folder of its own.
        dtype: weights' dtype.
        from_scratch: new weights of the same configuration.
        source_latents: the UNet takes an edit's source beside z_t: its first convolution gets as many channels more, with zeros for
            weights, so that it begins as it was (InstructPix2Pix, Brooks et al. 2023, section 3.2). Nothing changes in one that has them.
    """

    pretrained: str = "stabilityai/stable-diffusion-xl-base-1.0"
    subfolder: str | None = "unet"
    dtype: str = "float32"
    from_scratch: bool = False
    source_latents: bool = False

    def read(self) -> dict[str, Any]:
        """The UNet's own configuration, without its weights."""
        return dict(UNet2DConditionModel.load_config(locate(self.pretrained), subfolder=self.subfolder))

    def build(self, weights: Weights = True) -> UNet2DConditionModel:
        """Load the UNet, or (``weights=False``) create it from its configuration on the default device; see :data:`Weights`."""
        unet = self._load(weights == "later") if weights and not self.from_scratch else self._make()
        if self.source_latents:
            grow_input(unet)
        return unet

    def _make(self) -> UNet2DConditionModel:
        return UNet2DConditionModel.from_config(self.read()).to(getattr(torch, self.dtype))

    def _load(self, wait: bool) -> UNet2DConditionModel:
        if wait and (unet := later(self._make, self.pretrained, SAFETENSORS_WEIGHTS_NAME, self.subfolder)):
            return unet
        kind = getattr(torch, self.dtype)
        return UNet2DConditionModel.from_pretrained(locate(self.pretrained), subfolder=self.subfolder, torch_dtype=kind)


def takes_source(unet: UNet2DConditionModel) -> bool:
    """Whether the UNet reads an edit's source beside z_t."""
    config: Any = unet.config
    return bool(config.in_channels == 2 * config.out_channels)


@torch.no_grad()
def grow_input(unet: UNet2DConditionModel) -> None:
    """Give the UNet's first convolution channels for source latents, with weights of zero."""
    if takes_source(unet):
        return
    old = unet.conv_in
    fill(old, awaited(old), torch.get_default_device())
    new = old.__class__(2 * old.in_channels, old.out_channels, old.kernel_size, padding=old.padding)  # type: ignore[arg-type]
    new = new.to(device=old.weight.device, dtype=old.weight.dtype)
    new.weight.zero_()
    new.weight[:, : old.in_channels].copy_(old.weight)
    new.bias = old.bias
    unet.conv_in = new
    unet.register_to_config(in_channels=new.in_channels)


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


def denoise(
    unet: UNet2DConditionModel,
    z_t: Tensor,
    timesteps: Tensor,
    condition: Condition,
    side: tuple[int, int],
    reference_attention: ReferenceAttention | None = None,
    source_gate: SourceGate | None = None,
) -> Tensor:
    """One forward pass of the UNet.

    Args:
        z_t: [b, c, h, w].
        timesteps: [b].
        condition: the adapter's output.
        side: height and width of the picture in pixels: SDXL's original and target size, with no crop, where the condition has no sizes.
        reference_attention: the layers that read the condition's context, if it has one.
        source_gate: what keeps the condition's source.

    Returns:
        The prediction [b, c, h, w].
    """
    source = torch.zeros_like(z_t) if condition.source is None else condition.source
    x = (torch.cat([z_t, source], dim=1) if takes_source(unet) else z_t).to(unet.dtype)
    with ExitStack() as beside:
        if reference_attention is not None and condition.context is not None:
            beside.enter_context(reference_attention.reading(unet, condition.context))
        if source_gate is not None:  # without a source too: on every process, or on none, it has a pass
            beside.enter_context(source_gate.blending(unet, z_t, timesteps, source))
        return unet(
            x,
            timesteps,
            condition.tokens.to(x.dtype),
            encoder_attention_mask=condition.mask,
            added_cond_kwargs=_added(x, condition, side),
            return_dict=False,
        )[0]


def down_features(unet: UNet2DConditionModel, z_0: Tensor, condition: Condition, side: tuple[int, int]) -> Tensor:
    """The UNet's down blocks alone, at t = 0: what the middle block gets of clean latents (Instruct-Imagen, section 3.1).

    Args:
        z_0: [n, c, h, w].
        condition: n texts, after the adapter.
        side: as in :func:`denoise`.

    Returns:
        Features [n, h' * w', width] of the lowest level.
    """
    x, tokens = z_0.to(unet.dtype), condition.tokens.to(unet.dtype)
    if takes_source(unet):
        x = torch.cat([x, torch.zeros_like(x)], dim=1)
    added = _added(x, condition, side)
    emb = unet.time_embedding(unet.get_time_embed(x, torch.zeros(len(x), dtype=torch.long, device=x.device)))
    if added is not None:
        emb = emb + unet.get_aug_embed(emb, tokens, added)
    bias = ((1 - condition.mask.to(x.dtype)) * -10000.0).unsqueeze(1)  # as UNet2DConditionModel.forward makes it
    x = unet.conv_in(x)
    for block in unet.down_blocks:
        reads: dict[str, Any] = {"encoder_hidden_states": tokens, "encoder_attention_mask": bias} if _has_attention(block) else {}
        x, _ = block(hidden_states=x, temb=emb, **reads)
    return x.flatten(2).transpose(1, 2)


def _has_attention(block: Any) -> bool:
    return bool(getattr(block, "has_cross_attention", False))


def _added(z_t: Tensor, condition: Condition, side: tuple[int, int]) -> dict[str, Tensor] | None:
    """SDXL's pooled vector and sizes; nothing for SD1.5."""
    if condition.pooled is None:
        return None
    if condition.sizes is not None:
        ids = condition.sizes.to(z_t)
    else:
        ids = torch.tensor([*side, 0, 0, *side], dtype=z_t.dtype, device=z_t.device).expand(len(z_t), 6)
    return {"text_embeds": condition.pooled.to(z_t.dtype), "time_ids": ids}
