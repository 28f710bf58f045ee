"""Vision-language encoders: a multimodal prompt in, the hidden states of all its tokens out.

A new VLM is one file: subclass :class:`Encoder`, load the parts in :meth:`build`, and say how its prompt spells a picture.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm

from ..batch import Condition, PackedImages, Span
from ..prompt import RecordError, split
from .weights import locate


class Encoder(nn.Module, ABC):
    """A VLM that reads text with pictures in it. Three parts, by the names that the parameter table uses:
    ``vision`` (picture to patches), ``projector`` (patches to the language model's width), ``language``.

    Args:
        pretrained: hub name, local folder or ``toybox/<part>``.
        image_tokens: token budget of a reference; its pictures are squares of ``reference_size`` pixels.
        max_tokens: longest prompt, pictures included; a longer one is an error, never cut.
        mix: what comes out. None: the last hidden states (MUMU). A number w: input embeddings + w x last hidden states, each
            RMS-normalised; the last states of a small language model say much about the next token and little about their own.
    """

    vision: nn.Module
    projector: nn.Module
    language: nn.Module
    transformers_names: dict[str, str]
    """Where the parts lie in the model of ``transformers``, for LoRA that PEFT loads there."""

    def __init__(self, pretrained: str, image_tokens: int, max_tokens: int = 2048, mix: float | None = None) -> None:
        super().__init__()
        if image_tokens < 1 or round(image_tokens**0.5) ** 2 != image_tokens:
            raise ValueError(f"image_tokens must be a square number, not {image_tokens}")
        self.pretrained, self.image_tokens, self.max_tokens, self.mix = pretrained, image_tokens, max_tokens, mix
        self._tokenizer: Any = None

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer; read when first asked for, so that prompts can be checked before the weights are there."""
        if self._tokenizer is None:
            from transformers import AutoTokenizer

            self._tokenizer = AutoTokenizer.from_pretrained(locate(self.pretrained))
        return self._tokenizer

    @abstractmethod
    def build(self, weights: bool = True) -> None:
        """Create the parts, from pretrained weights or (``weights=False``) from the configuration alone, on the default device."""

    def settings(self) -> dict[str, Any]:
        """The arguments that build an encoder like this one."""
        return {"pretrained": self.pretrained, "image_tokens": self.image_tokens, "max_tokens": self.max_tokens, "mix": self.mix}

    @property
    @abstractmethod
    def hidden_size(self) -> int:
        """Width d of the hidden states."""

    @property
    @abstractmethod
    def patch_size(self) -> int:
        """Side in pixels of what becomes one token."""

    @property
    @abstractmethod
    def image_token(self) -> str:
        """The token that stands for one patch."""

    @abstractmethod
    def spell(self, count: int) -> tuple[str, str]:
        """The texts before and after the ``count`` image tokens of a picture."""

    @abstractmethod
    def embed_images(self, pixels: Tensor) -> Tensor:
        """Pictures [n, 3, h, w] in [-1, 1] -> language-model inputs [n, (h / patch) * (w / patch), d]."""

    @property
    def reference_size(self) -> int:
        """Side in pixels of a reference that fills the token budget."""
        return round(self.image_tokens**0.5) * self.patch_size

    def tokens_of(self, height: int, width: int) -> int:
        """How many tokens a picture of this size in pixels takes."""
        return (height // self.patch_size) * (width // self.patch_size)

    def tokenise(self, instruction: str, markers: list[int], counts: list[int]) -> tuple[list[int], list[Span]]:
        """One prompt as token ids, each marker replaced by its picture's tokens; and where each picture's tokens lie.

        Args:
            counts: tokens of each reference, by slot.

        Raises:
            RecordError: the prompt is longer than ``max_tokens``.
        """
        image_id = self.tokenizer.convert_tokens_to_ids(self.image_token)
        ids: list[int] = [self.tokenizer.bos_token_id]
        spans: dict[int, Span] = {}
        for text, slot in split(instruction, markers):
            if slot is None:
                ids += self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids  # "<image>" in it is no picture
                continue
            before, after = self.spell(counts[slot])
            ids += self.tokenizer(before, add_special_tokens=False).input_ids
            spans.setdefault(slot, Span(len(ids), len(ids) + counts[slot]))
            ids += [image_id] * counts[slot]
            ids += self.tokenizer(after, add_special_tokens=False).input_ids
        if len(ids) > self.max_tokens:
            raise RecordError(f"the prompt has {len(ids)} tokens, more than max_tokens={self.max_tokens}: {instruction[:60]!r}")
        return ids, [spans[k] for k in range(len(counts))]

    def embed(
        self, instructions: list[str], markers: list[list[int]], references: list[PackedImages]
    ) -> tuple[Tensor, Tensor, list[list[Span]]]:
        """Language-model inputs [b, n, d], their mask [b, n] (right-padded), and the spans of the references."""
        device = next(self.language.parameters()).device
        features: dict[tuple[int, int], Tensor] = {}
        for group in references:
            images = self.embed_images(group.pixels)  # [n, patches, d]
            for i, key in enumerate(zip(group.sample.tolist(), group.slot.tolist(), strict=True)):
                features[key] = images[i]
        rows, spans = [], []
        for b, (text, marks) in enumerate(zip(instructions, markers, strict=True)):
            ids, where = self.tokenise(text, marks, [features[b, k].shape[0] for k in range(len(marks))])
            rows.append(ids)
            spans.append(where)
        longest = max(map(len, rows))
        padded = torch.tensor([r + [self.tokenizer.pad_token_id] * (longest - len(r)) for r in rows], device=device)
        mask = torch.tensor([[True] * len(r) + [False] * (longest - len(r)) for r in rows], device=device)
        inputs = self.language.get_input_embeddings()(padded)  # type: ignore[operator]
        if features:
            order = [
                features[b, s] for b, (t, m) in enumerate(zip(instructions, markers, strict=True)) for _, s in split(t, m) if s is not None
            ]
            at = (padded == self.tokenizer.convert_tokens_to_ids(self.image_token)).unsqueeze(-1)
            inputs = inputs.masked_scatter(at, torch.cat(order).to(inputs.dtype))
        return inputs, mask, spans

    def forward(self, instructions: list[str], markers: list[list[int]], references: list[PackedImages]) -> Condition:
        """Encode b prompts: hidden states [b, n, d] of text and picture tokens alike."""
        inputs, mask, spans = self.embed(instructions, markers, references)
        out = self.language(inputs_embeds=inputs, attention_mask=mask.long(), use_cache=False)
        tokens = out.last_hidden_state
        if self.mix is not None:
            tokens = rms_norm(inputs, inputs.shape[-1:]) + self.mix * rms_norm(tokens, tokens.shape[-1:])
        return Condition(tokens, mask, spans)
