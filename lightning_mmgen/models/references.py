"""References through the UNet's own encoder (Hu et al. 2024, Instruct-Imagen, section 3.1).

Each reference, with the text of its marker, runs through the UNet's down blocks at t = 0; new cross-attention layers, one at the bottleneck
by default, read the features as keys and values. The UNet stays a plain ``UNet2DConditionModel``: the layers are hooked onto its blocks
for the length of one forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any, Literal

from diffusers import ConfigMixin, ModelMixin, UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from ..batch import Context
from .unet import down_features
from .weights import locate


class ReferenceLayer(nn.Module):
    """Cross-attention from the UNet's hidden states to the context; zero at the start, and for samples without references."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm, self.norm_context = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, width, heads=heads, dim_head=width // heads)
        out: Any = self.attention.to_out
        nn.init.zeros_(out[0].weight)
        nn.init.zeros_(out[0].bias)

    def forward(self, hidden: Tensor, context: Context) -> Tensor:
        """[b, width, h, w] -> the same with what the context adds."""
        kind = self.norm.weight.dtype
        some = context.mask.any(1, keepdim=True)  # softmax over nothing is not a number
        x = self.norm(hidden.flatten(2).transpose(1, 2).to(kind))
        x = self.attention(x, self.norm_context(context.tokens.to(kind)), attention_mask=(context.mask | ~some)[:, None])
        return hidden + (x * some[:, :, None]).transpose(1, 2).unflatten(2, hidden.shape[2:]).to(hidden.dtype)


class ReferenceAttention(ModelMixin, ConfigMixin):
    """The layers, and how references come to them.

    Args:
        width: channels of the UNet's lowest level.
        heads: of each layer.
        at: ``bottleneck``, one layer after the middle block, or ``lowest``, one after the lowest level's down block and one after its up
            block (the paper's appendix).
        size: side in pixels of the references on their way through the UNet.
        in_prompt: the encoder sees the references too, in the markers' places; else it reads the markers as words.
    """

    @register_to_config
    def __init__(self, width: int, heads: int, at: str = "bottleneck", size: int = 512, in_prompt: bool = False) -> None:
        super().__init__()
        places = {"bottleneck": ("mid",), "lowest": ("down", "up")}
        if at not in places:
            raise ValueError(f"reference_attention.at must be bottleneck or lowest, not {at!r}")
        self.layers = nn.ModuleDict({place: ReferenceLayer(width, heads) for place in places[at]})
        self.size, self.in_prompt = size, in_prompt

    @contextmanager
    def reading(self, unet: UNet2DConditionModel, context: Context) -> Iterator[None]:
        """Within it, forward passes of the UNet read the context."""
        blocks: dict[str, nn.Module] = {"down": unet.down_blocks[-1], "mid": unet.mid_block, "up": unet.up_blocks[0]}  # type: ignore[dict-item]
        with ExitStack() as hooks:
            for place, layer in self.layers.items():
                hooks.callback(blocks[place].register_forward_hook(_adding(layer, context)).remove)
            yield


def _adding(layer: nn.Module, context: Context) -> Callable[..., Any]:
    def hook(block: nn.Module, args: Any, out: Any) -> Any:
        if isinstance(out, tuple):  # a down block: hidden states, and what its up block will get
            return (layer(out[0], context), *out[1:])
        return layer(out, context)

    return hook


@dataclass
class ReferenceAttentionConfig:
    """References through the UNet's own encoder; arguments as of :class:`ReferenceAttention`.

    Args:
        heads: of each layer; as many as the UNet's middle block has if none are given.
        pretrained: hub name or folder of saved layers, instead of new ones.
    """

    at: Literal["bottleneck", "lowest"] = "bottleneck"
    size: int = 512
    in_prompt: bool = False
    heads: int | None = None
    pretrained: str | None = None

    def build(self, unet: UNet2DConditionModel) -> ReferenceAttention:
        """Create or load the layers.

        Raises:
            ValueError: saved layers that do not fit.
        """
        config: Any = unet.config
        width, head_dim = config.block_out_channels[-1], config.attention_head_dim
        own = head_dim if isinstance(head_dim, int) else head_dim[-1]  # the number of heads, whatever its name says
        layers = ReferenceAttention(width, self.heads or own, self.at, self.size, self.in_prompt)
        if self.pretrained is not None:
            saved = ReferenceAttention.from_pretrained(locate(self.pretrained))
            ends = [(x.config["width"], x.config["at"]) for x in (saved, layers)]
            if ends[0] != ends[1]:
                raise ValueError(f"reference_attention {self.pretrained} has width and place {ends[0]}; {ends[1]} are needed")
            layers.load_state_dict(saved.state_dict())
        return layers


def give_partial_pass(unet: UNet2DConditionModel) -> None:
    """Make :func:`down_features` a method of this UNet: FSDP2's ``register_fsdp_forward_method`` takes methods alone."""
    if not hasattr(unet, "down_features"):
        unet.down_features = MethodType(down_features, unet)  # type: ignore[assignment]
