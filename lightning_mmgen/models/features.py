"""Vectors of pictures and of their patches, by any picture model of ``transformers``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, normalize
from transformers import AutoConfig, AutoModel, CLIPModel
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from .weights import locate


class Features(nn.Module):
    """A frozen picture model of ``transformers`` in float32: a CLIP, a DINO of any version, a face model, a ResNet, ...

    A picture's vector is the picture embedding of a CLIP, the class token of another transformer, the mean over the places of a
    convolutional network. Mean and deviation of the pictures are those of its ``preprocessor_config.json``, else those of CLIP or ImageNet.

    Args:
        pretrained: hub name, folder, or ``toybox/clip`` or ``toybox/dino``.

    Raises:
        OSError: there is no such model.
        ValueError: it is no model of pictures.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, pretrained: str) -> None:
        super().__init__()
        folder = locate(pretrained)
        config = AutoConfig.from_pretrained(folder)
        self.is_clip = config.model_type == "clip"
        model: Any = (CLIPModel if self.is_clip else AutoModel).from_pretrained(folder, dtype=torch.float32)
        self.model = model.eval().requires_grad_(False)
        if not self.is_clip and model.main_input_name != "pixel_values":
            raise ValueError(f"{pretrained}: a {config.model_type} is no model of pictures")
        usual = (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD) if self.is_clip else (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
        known = _preprocessing(folder)
        for name, key, default in zip(("mean", "std"), ("image_mean", "image_std"), usual, strict=True):
            self.register_buffer(name, torch.tensor(known.get(key) or default).view(3, 1, 1), persistent=False)
        seen = config.vision_config if self.is_clip else model.config
        side, patch = getattr(seen, "image_size", None), getattr(seen, "patch_size", None)
        self.side = side if isinstance(side, int) else 224
        self.patch_count = (self.side // patch) ** 2 if isinstance(patch, int) else 0

    def train(self, mode: bool = True) -> Features:
        """Stays in evaluation mode."""
        return super().train(False)

    def fit(self, pictures: Tensor) -> Tensor:
        """Pictures [b, 3, h, w] resized to the square that the model takes."""
        if pictures.shape[-2:] == (self.side, self.side):
            return pictures.float()
        return interpolate(pictures.float(), (self.side, self.side), mode="bicubic", antialias=True).clamp(-1, 1)

    @torch.no_grad()
    def forward(self, pictures: Tensor) -> Tensor:
        """Pictures [b, 3, h, w] in [-1, 1] as vectors, [b, d]."""
        if self.is_clip:
            return self.model.get_image_features(pixel_values=self._normalised(pictures)).pooler_output  # type: ignore[no-any-return]
        states: Tensor = self.model(pixel_values=self._normalised(pictures)).last_hidden_state
        return states[:, 0] if states.ndim == 3 else states.mean((2, 3))

    def embed(self, pictures: Tensor) -> Tensor:
        """Pictures [b, 3, h, w] in [-1, 1] as vectors of length 1, [b, d]."""
        return normalize(self(pictures), dim=-1)

    @torch.no_grad()
    def patches(self, pictures: Tensor) -> Tensor:
        """The patches of pictures [b, 3, h, w] in [-1, 1] as vectors of length 1, row by row, [b, n, d]."""
        model = self.model.vision_model if self.is_clip else self.model
        states: Tensor = model(pixel_values=self._normalised(pictures)).last_hidden_state
        states = states[:, -self.patch_count :] if states.ndim == 3 else states.flatten(2).mT  # class and register tokens come first
        return normalize(states, dim=-1)

    def _normalised(self, pictures: Tensor) -> Tensor:
        return ((self.fit(pictures) + 1) / 2 - self.mean) / self.std


def as_features(pretrained: str | Features) -> Features:
    """A model by name or folder, or one that several scores share."""
    return Features(pretrained) if isinstance(pretrained, str) else pretrained


def _preprocessing(folder: str) -> dict[str, Any]:
    """What the model's ``preprocessor_config.json`` says; nothing where there is none."""
    try:
        return dict(BaseImageProcessor.get_image_processor_dict(folder)[0])
    except OSError:
        return {}
