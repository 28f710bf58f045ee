"""DINO: features that tell what is where in a picture, whatever its colours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from transformers import AutoModel

from .encoder import imagenet_normalised
from .weights import locate


class Dino(nn.Module):
    """A frozen DINO of ``transformers`` in float32: DINO (a ``ViTModel``), DINOv2, DINOv3, with register tokens or without.

    Pictures are [b, 3, H, W] in [-1, 1] of any size; each is resized to the square that the model was trained for. Gradients flow to them.

    Args:
        model: the vision transformer.

    Raises:
        ValueError: the model has no patches of a picture of one size.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        config = model.config
        side, patch = getattr(config, "image_size", None), getattr(config, "patch_size", None)
        if not isinstance(side, int) or not isinstance(patch, int):
            raise ValueError(
                f"{config.name_or_path}: a {config.model_type} is no DINO: it needs image_size and patch_size, each one number"
            )
        self.model = model.eval().requires_grad_(False)
        self.side, self.patch_count, self.width = side, (side // patch) ** 2, int(config.hidden_size)

    @classmethod
    def from_pretrained(cls, pretrained: str) -> Dino:
        """Load it by hub name or from a folder."""
        return cls(AutoModel.from_pretrained(locate(pretrained), dtype=torch.float32))

    def train(self, mode: bool = True) -> Dino:
        """Stays in evaluation mode."""
        return super().train(False)

    def cls(self, pictures: Tensor) -> Tensor:
        """The class token of the last layer, after its norm, [b, d]."""
        return self._tokens(pictures)[:, 0]

    def patches(self, pictures: Tensor) -> Tensor:
        """The patch tokens of the last layer, after its norm, row by row, [b, n, d]."""
        return self._tokens(pictures)[:, -self.patch_count :]  # class and register tokens come first

    def keys(self, pictures: Tensor) -> Tensor:
        """The keys of the last layer's attention, heads side by side: class token, registers, patches, [b, 1 + r + n, d]."""
        layers = [module for name, module in self.model.named_modules() if name.endswith((".k_proj", ".key"))]
        seen: list[Tensor] = []
        handle = layers[-1].register_forward_hook(lambda _, __, keys: seen.append(keys))
        try:
            self._tokens(pictures)
        finally:
            handle.remove()
        return seen[0]

    def _tokens(self, pictures: Tensor) -> Tensor:
        size = (self.side, self.side)
        pictures = interpolate(pictures.float(), size, mode="bicubic", antialias=True)
        return self.model(pixel_values=imagenet_normalised(pictures)).last_hidden_state
