"""LLaVA: CLIP's patches through a small MLP into Llama (Liu et al. 2023)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .encoder import Encoder, clip_normalised


class LlavaEncoder(Encoder):
    """``LlavaForConditionalGeneration`` of ``transformers``: ``vision`` (CLIP, without the layers that LLaVA does not read), ``projector``
    (``multi_modal_projector``), ``language`` (Llama).

    Args:
        pretrained: hub name or local folder.
        image_tokens: 576 = 24 x 24 patches of 14 px is what it was trained with; at other sizes CLIP's positions are interpolated.
        max_tokens, mix, dtype, attention, quantization, device: see :class:`Encoder`.
    """

    architecture = "LlavaForConditionalGeneration"
    transformers_names = {"vision": "model.vision_tower", "projector": "model.multi_modal_projector", "language": "model.language_model"}
    image_token = "<image>"

    def __init__(self, pretrained: str = "llava-hf/llava-1.5-7b-hf", image_tokens: int = 576, **settings: Any) -> None:
        super().__init__(pretrained, image_tokens, **settings)

    def take(self, model: Any) -> tuple[nn.Module, nn.Module, nn.Module]:
        layer, strategy = model.config.vision_feature_layer, model.config.vision_feature_select_strategy
        if not isinstance(layer, int) or strategy != "default":
            raise ValueError(f"{self.pretrained}: reads layers {layer} of its tower by {strategy!r}; one layer by 'default' is supported")
        tower = model.vision_tower
        encoder = tower.encoder if hasattr(tower, "encoder") else tower.vision_model.encoder
        encoder.layers = encoder.layers[: layer + 1 + (len(encoder.layers) if layer < 0 else -1)]  # states 0 are the embeddings
        return tower, model.multi_modal_projector, model.language_model

    @property
    def patch_size(self) -> int:
        return int(self.model_config.vision_config.patch_size)

    def spell(self, count: int) -> tuple[str, str]:
        return "", ""

    def see(self, pixels: Tensor) -> Tensor:
        pixels = clip_normalised(pixels).to(next(self.vision.parameters()).dtype)
        patches = self.vision(pixel_values=pixels, interpolate_pos_encoding=True).last_hidden_state
        return patches[:, 1:]  # type: ignore[no-any-return]  # without the class token

    def project(self, patches: Tensor) -> Tensor:
        return self.projector(patches.to(next(self.projector.parameters()).dtype))  # type: ignore[no-any-return]
