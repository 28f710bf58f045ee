"""Mllama (Llama 3.2 Vision): pictures enter by cross-attention layers, and stand in the text as one token each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from .encoder import Encoder, Place, Prompts, clip_normalised


class MllamaEncoder(Encoder):
    """``MllamaForConditionalGeneration`` of ``transformers``: ``vision`` (its tower), ``projector`` (``multi_modal_projector``),
    ``language`` (Llama with cross-attention layers).

    A picture is one tile; the tower sees the empty tiles beside it, as the published processor has it. The hidden state of a picture's
    token is all that a generator sees of it directly; its patches reach the words around it.

    Args:
        pretrained: hub name or local folder.
        image_tokens: patches of a tile, which is as large as the tower was built for: 1,600 = 40 x 40 patches of 14 px.
        max_tokens, mix, dtype, attention, quantization, device: see :class:`Encoder`.
    """

    architecture = "MllamaForConditionalGeneration"
    transformers_names = {
        "vision": "model.vision_model",
        "projector": "model.multi_modal_projector",
        "language": "model.language_model",
    }
    image_token = "<|image|>"

    def __init__(self, pretrained: str = "meta-llama/Llama-3.2-11B-Vision-Instruct", image_tokens: int = 1600, **settings: Any) -> None:
        super().__init__(pretrained, image_tokens, **settings)

    def take(self, model: Any) -> tuple[nn.Module, nn.Module, nn.Module]:
        return model.vision_model, model.multi_modal_projector, model.language_model

    @property
    def patch_size(self) -> int:
        return int(self.model_config.vision_config.patch_size)

    def tokens_of(self, height: int, width: int) -> int:
        return 1

    def cells(self, grid: tuple[int, int]) -> tuple[int, int]:
        return 1, 1

    def spell(self, count: int) -> tuple[str, str]:
        return "", ""

    def see(self, pixels: Tensor) -> Tensor:
        """Pictures [n, 3, h, w] in [-1, 1] through ``vision``, [n, tiles * (1 + patches), width]: of each tile a class token and its
        patches, the picture's own tile first.

        Raises:
            ValueError: they are not of a tile's size.
        """
        n, c, *size = pixels.shape
        config = self.model_config.vision_config
        side, tiles = int(config.image_size), int(config.max_num_tiles)
        if size != [side, side]:
            patches = (side // self.patch_size) ** 2
            raise ValueError(
                f"{self.pretrained} reads pictures of {side} x {side} px (image_tokens: {patches}), not of {size[1]} x {size[0]}"
            )
        shown = pixels.new_zeros(n, 1, tiles, c, side, side)
        shown[:, 0, 0] = clip_normalised(pixels)
        first = torch.zeros(n, 1, tiles, dtype=torch.long, device=pixels.device)
        first[..., 0] = 1
        one_tile = torch.ones(n, 1, dtype=torch.long, device=pixels.device)
        states = self.vision(pixel_values=shown, aspect_ratio_ids=one_tile, aspect_ratio_mask=first).last_hidden_state
        return states.flatten(1, 3)  # type: ignore[no-any-return]

    def project(self, patches: Tensor) -> Tensor:
        return self.projector(patches.to(next(self.projector.parameters()).dtype))  # type: ignore[no-any-return]

    def show(self, prompts: Prompts, at: Tensor, pictures: list[list[Tensor]], grids: list[list[tuple[int, int]]]) -> Prompts:
        if not any(pictures):
            return prompts
        none = next(image for of in pictures for image in of).new_zeros(0, self.hidden_size)
        states = pad_sequence([torch.cat([none, *of]) for of in pictures], batch_first=True)  # [b, m, d]
        columns = [
            [Place(k * len(image) + 1, *grid) for k, (image, grid) in enumerate(zip(*row, strict=True))]
            for row in zip(pictures, grids, strict=True)
        ]
        return prompts._replace(pictures=states, columns=columns)

    def read(self, prompts: Prompts) -> Tensor:
        seen: dict[str, Tensor] = {}
        if prompts.pictures is not None:
            mask = self._looks(prompts, prompts.pictures.shape[1])  # [b, n, m]
            looking = mask.any(-1, keepdim=True)
            own = torch.tensor([[len(of)] for of in prompts.places], device=mask.device) * self._width()
            mask |= ~looking & (torch.arange(mask.shape[-1], device=mask.device) < own)[:, None]  # transformers lets them look everywhere
            mask |= ~mask.any(-1, keepdim=True)  # a prompt without pictures, at zeros
            least = torch.finfo(prompts.inputs.dtype).min
            seen["cross_attention_states"] = prompts.pictures
            seen["cross_attention_mask"] = prompts.inputs.new_zeros(mask.shape).masked_fill(~mask, least)[:, None]
            seen["full_text_row_masked_out_mask"] = looking.to(prompts.inputs.dtype)[:, None]
        positions = self.positions(prompts.mask, prompts.places)
        return self.language(inputs_embeds=prompts.inputs, position_ids=positions, use_cache=False, **seen).last_hidden_state  # type: ignore[no-any-return]

    def _width(self) -> int:
        """Columns of a picture, those of empty tiles among them."""
        config = self.model_config.vision_config
        return int(config.max_num_tiles) * (1 + (int(config.image_size) // self.patch_size) ** 2)

    def _looks(self, prompts: Prompts, columns: int) -> Tensor:
        """Which tokens look at which columns, [b, n, m]: from a picture's token on until the next picture's, where that does not
        follow at once."""
        b, n = prompts.tokens.shape
        looks = torch.zeros(b, n, columns, dtype=torch.bool, device=prompts.inputs.device)
        width = self._width()
        tile = width // int(self.model_config.vision_config.max_num_tiles)
        for of, places in zip(looks, prompts.places, strict=True):
            end = n
            for k, place in reversed(list(enumerate(places))):
                after = places[k + 1].start if k + 1 < len(places) else n
                end = end if after == place.start + 1 else after
                of[place.start : end, k * width : k * width + tile] = True
        return looks
