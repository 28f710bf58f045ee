"""The adapter between the VLM and the UNet (MUMU, section 3: a non-causal transformer, fully trained)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..batch import Condition


class Adapter(ModelMixin, ConfigMixin):
    """VLM hidden states [b, n, in_features] -> UNet tokens [b, n, out_features] and pooled vector [b, pooled_features].

    Args:
        in_features: width of the VLM's hidden states.
        out_features: the UNet's ``cross_attention_dim``.
        pooled_features: width of SDXL's pooled vector; 0 where the UNet takes none.
        layers, heads, width: size of the transformer.
        pooled: ``mean`` projects the masked mean of the output, ``zeros`` gives zeros.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(self, in_features: int, out_features: int, pooled_features: int, layers: int, heads: int, width: int, pooled: str) -> None:
        super().__init__()
        self.gradient_checkpointing = False
        self.norm_in = nn.LayerNorm(in_features)
        self.project_in = nn.Linear(in_features, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, activation=_gelu, batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.norm_out = nn.LayerNorm(width)
        self.project_out = nn.Linear(width, out_features)
        self.project_pooled = nn.Linear(width, pooled_features) if pooled_features and pooled == "mean" else None

    def forward(self, condition: Condition) -> Condition:
        """Tokens and mask in, tokens, mask and pooled vector out; the spans stay where they are."""
        x = self.project_in(self.norm_in(condition.tokens.to(self.project_in.weight.dtype)))  # [b, n, width]
        padding = torch.zeros_like(condition.mask, dtype=x.dtype).masked_fill(~condition.mask, float("-inf"))
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, src_key_padding_mask=padding, use_reentrant=False)
            else:
                x = block(x, src_key_padding_mask=padding)
        x = self.norm_out(x)
        return condition._replace(tokens=self.project_out(x), pooled=self._pool(x, condition.mask))

    def _pool(self, x: Tensor, mask: Tensor) -> Tensor | None:
        width = int(self.config["pooled_features"])
        if not width:
            return None
        if self.project_pooled is None:
            return x.new_zeros(len(x), width)
        share = mask.to(x.dtype).unsqueeze(-1)
        return self.project_pooled((x * share).sum(1) / share.sum(1))


def _gelu(x: Tensor) -> Tensor:
    """GELU under a name of its own: PyTorch fuses a block that it knows for inference, and passes LoRA by."""
    return nn.functional.gelu(x)


@dataclass
class AdapterConfig:
    """Size of the adapter; its ends follow from the encoder and the UNet.

    Args:
        layers: 16 in MUMU.
        heads: attention heads (unknown in public).
        width: of the transformer; the UNet's ``cross_attention_dim`` if none is given (unknown in public).
        pooled: SDXL's pooled vector: ``mean`` or ``zeros``.
        pretrained: hub name or folder of a saved adapter, instead of a new one.
    """

    layers: int = 16
    heads: int = 32
    width: int | None = None
    pooled: Literal["mean", "zeros"] = "mean"
    pretrained: str | None = None

    def build(self, in_features: int, out_features: int, pooled_features: int) -> Adapter:
        """Create or load the adapter.

        Raises:
            ValueError: the saved adapter's ends do not fit the encoder and the UNet.
        """
        if self.pretrained is None:
            return Adapter(in_features, out_features, pooled_features, self.layers, self.heads, self.width or out_features, self.pooled)
        from .weights import locate

        adapter = Adapter.from_pretrained(locate(self.pretrained))
        ends = tuple(adapter.config[k] for k in ("in_features", "out_features", "pooled_features"))
        if ends != (in_features, out_features, pooled_features):
            raise ValueError(
                f"adapter {self.pretrained} has widths {ends}; encoder and UNet need {(in_features, out_features, pooled_features)}"
            )
        return adapter
