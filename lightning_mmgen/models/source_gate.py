"""What stays of an edit's source, said by the UNet itself.

InstructPix2Pix's UNet sees the source beside z_t and must draw it anew where nothing is to change: it has to learn to copy. Here a
convolution beside the UNet's last one, on the same features, says where the source's own latents stay instead. The UNet stays a plain
``UNet2DConditionModel``: the convolution is hooked onto its last layer for the length of one forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from diffusers import ConfigMixin, ModelMixin, UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from ..diffusion import Diffusion

BEGIN = 2.0  # the gate's first logit
FLOOR = 0.3  # of s_t, where the gate begins to fade out


class SourceGate(ModelMixin, ConfigMixin):
    """A gate g for every latent channel and place (our choice; the blended latents of Avrahami et al. 2022, with a mask that is learned):

        z_0' = z_0 + g min(s_t / 0.3, 1) (z_s - z_0),  s_t = sqrt(1 - abar_t)

    z_0 is the estimate that the UNet's prediction implies, z_s the source; what comes out is the prediction that implies z_0'. With less
    and less noise left the estimates agree, and the gate fades out: a prediction divides their difference by s_t. g is the sigmoid of a
    convolution whose weights begin as zeros, and begins as 0.88: an edit starts as a copy and learns what to change. Without a source
    (zeros) nothing happens, so that words and references alone are drawn as they were, bit for bit.

    Args:
        width: channels of the UNet's last features.
        channels: of the latents.
        process: arguments of the :class:`~lightning_mmgen.diffusion.Diffusion` that the UNet is trained by.
    """

    @register_to_config
    def __init__(self, width: int, channels: int, process: dict[str, Any]) -> None:
        super().__init__()
        self.diffusion = Diffusion(**process)
        self.conv = nn.Conv2d(width, channels, 3, padding=1)
        nn.init.zeros_(self.conv.weight)
        nn.init.constant_(self.conv.bias, BEGIN)  # type: ignore[arg-type]

    @classmethod
    def of(cls, unet: UNet2DConditionModel, diffusion: Diffusion) -> SourceGate:
        """A new gate for a UNet."""
        config: Any = unet.config
        return cls(config.block_out_channels[0], config.out_channels, asdict(diffusion))

    def forward(self, features: Tensor, prediction: Tensor, z_t: Tensor, timesteps: Tensor, source: Tensor) -> Tensor:
        """The prediction with what stays of the source.

        Args:
            features: what the UNet's last convolution reads, [b, width, h, w].
            prediction, z_t, source: [b, c, h, w].
            timesteps: [b].
        """
        abar = self.diffusion.at(timesteps)
        a, s = abar.sqrt(), (1 - abar).sqrt()
        implied = z_t - a * source if self.diffusion.prediction_type == "epsilon" else a * z_t - source  # s_t times what implies z_s
        given = source.flatten(1).any(1).view(-1, 1, 1, 1)
        gate = given * self.conv(features.to(self.conv.weight.dtype)).sigmoid()
        return prediction + (gate * (implied - s * prediction) / s.clamp(min=FLOOR)).to(prediction.dtype)

    @contextmanager
    def blending(self, unet: UNet2DConditionModel, z_t: Tensor, timesteps: Tensor, source: Tensor) -> Iterator[None]:
        """Within it, forward passes of the UNet keep of the source what the gate says."""

        def blend(last: nn.Module, args: Any, prediction: Tensor) -> Tensor:
            return self(args[0], prediction, z_t, timesteps, source)  # type: ignore[no-any-return]

        hook = unet.conv_out.register_forward_hook(blend)
        try:
            yield
        finally:
            hook.remove()
