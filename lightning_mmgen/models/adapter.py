"""The adapter between the VLM and the UNet (MUMU, section 3: a non-causal transformer, fully trained)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..batch import Condition
from .packing import Layout


class Block(nn.Module):
    """A pre-norm transformer layer whose every token attends to all tokens; rotary positions (Su et al. 2021) where angles are given."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))
        self.linear1, self.linear2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, layout: Layout, turns: tuple[Tensor, Tensor] | None) -> Tensor:
        """[b, n, width] in this layout, and cosines and sines [b, 1, n, width / heads / 2] -> [b, n, width]."""
        h = self.norm1(x)
        q, k, v = (project(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for project in (self.q_proj, self.k_proj, self.v_proj))
        if turns is not None:
            q, k = rotate(q, *turns), rotate(k, *turns)
        x = x + self.out_proj(layout.attend(q, k, v).transpose(1, 2).flatten(2))
        return x + self.linear2(F.gelu(self.linear1(self.norm2(x))))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (i, i + d / 2) of ``x`` [..., n, d] by angles of cosines and sines [..., n, d / 2] (Su et al. 2021, equation 34)."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Adapter(ModelMixin, ConfigMixin):
    """VLM hidden states [b, n, in_features] -> UNet tokens [b, n, out_features] and pooled vector [b, pooled_features].

    Args:
        in_features: width of the VLM's hidden states.
        out_features: the UNet's ``cross_attention_dim``.
        pooled_features: width of SDXL's pooled vector; 0 where the UNet takes none.
        layers, heads, width: size of the transformer.
        pooled: ``mean`` projects the masked mean of the output, ``zeros`` gives zeros.
        positions: ``rotary`` tells each token where the others stand, ``none`` leaves that to the VLM.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        in_features: int,
        out_features: int,
        pooled_features: int,
        layers: int,
        heads: int,
        width: int,
        pooled: str = "mean",
        positions: str = "rotary",
    ) -> None:
        super().__init__()
        self.gradient_checkpointing = False
        self.norm_in = nn.LayerNorm(in_features)
        self.project_in = nn.Linear(in_features, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm_out = nn.LayerNorm(width)
        self.project_out = nn.Linear(width, out_features)
        self.project_pooled = nn.Linear(width, pooled_features) if pooled_features and pooled == "mean" else None

    def forward(self, condition: Condition) -> Condition:
        """Tokens and mask in, tokens, mask and pooled vector out; the spans stay where they are."""
        layout = Layout.of(condition.mask, condition.lengths)
        x = layout.pack(condition.tokens).to(self.project_in.weight.dtype)
        x = self.project_in(self.norm_in(x))  # [b, n, width] or [1, total, width]
        turns = self._turns(x, layout) if self.config["positions"] == "rotary" else None
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, layout, turns, use_reentrant=False)
            else:
                x = block(x, layout, turns)
        x = self.norm_out(x)
        return condition._replace(tokens=layout.unpack(self.project_out(x)), pooled=self._pool(layout.unpack(x), condition.mask))

    def _turns(self, x: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the rotary angles, [b, 1, n, width / heads / 2] each, found in float32."""
        half = x.shape[2] // int(self.config["heads"]) // 2
        rates = 10_000 ** (-torch.arange(half, device=x.device) / half)
        count = torch.arange(layout.mask.shape[1], device=x.device).expand(layout.mask.shape)
        angles = layout.pack(count)[:, None, :, None] * rates
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)

    def _pool(self, x: Tensor, mask: Tensor) -> Tensor | None:
        width = int(self.config["pooled_features"])
        if not width:
            return None
        if self.project_pooled is None:
            return x.new_zeros(len(x), width)
        share = mask.to(x.dtype).unsqueeze(-1)
        return self.project_pooled((x * share).sum(1) / share.sum(1))


@dataclass
class AdapterConfig:
    """Size of the adapter; its ends follow from the encoder and the UNet.

    Args:
        layers: 16 in MUMU.
        heads: attention heads (unknown in public).
        width: of the transformer; the UNet's ``cross_attention_dim`` if none is given (unknown in public).
        pooled: SDXL's pooled vector: ``mean`` or ``zeros``.
        positions: ``rotary`` or ``none`` (unknown in public).
        pretrained: hub name or folder of a saved adapter, instead of a new one.
    """

    layers: int = 16
    heads: int = 32
    width: int | None = None
    pooled: Literal["mean", "zeros"] = "mean"
    positions: Literal["rotary", "none"] = "rotary"
    pretrained: str | None = None

    def build(self, in_features: int, out_features: int, pooled_features: int) -> Adapter:
        """Create or load the adapter.

        Raises:
            ValueError: the saved adapter's ends do not fit the encoder and the UNet.
        """
        if self.pretrained is None:
            width = self.width or out_features
            return Adapter(in_features, out_features, pooled_features, self.layers, self.heads, width, self.pooled, self.positions)
        from .weights import locate

        adapter = Adapter.from_pretrained(locate(self.pretrained))
        ends = tuple(adapter.config[k] for k in ("in_features", "out_features", "pooled_features"))
        if ends != (in_features, out_features, pooled_features):
            raise ValueError(
                f"adapter {self.pretrained} has widths {ends}; encoder and UNet need {(in_features, out_features, pooled_features)}"
            )
        return adapter
