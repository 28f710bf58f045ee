"""Questions and answers in the words that a model was tuned on: its tokenizer's chat template."""

from __future__ import annotations

import json
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..batch import PackedImages
from ..prompt import RecordError, split, without_markers
from .encoder import Encoder, Prompts
from .weights import locate


class Chat:
    """How an encoder's model reads questions. Where its tokenizer has no chat template (the toybox's), a question is followed by its answer
    and the letters of the end-of-text token.

    Args:
        encoder: whose tokenizer, and whose picture's placeholder.
    """

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder

    @cached_property
    def template(self) -> str | None:
        """The chat template: the tokenizer's own, or that of ``chat_template.json`` beside it."""
        if (own := self.encoder.tokenizer.chat_template) is not None:
            return str(own["default"] if isinstance(own, dict) else own)
        from transformers.utils import cached_file

        path = cached_file(locate(self.encoder.pretrained), "chat_template.json", _raise_exceptions_for_missing_entries=False)
        if path is None:
            return None
        with open(path, encoding="utf-8") as file:
            return str(json.load(file)["chat_template"])

    def asked(self, question: str, markers: list[int]) -> str:
        """A question with ``[ref#k]`` markers as a prompt, up to where the answer begins.

        Raises:
            RecordError: the question is empty, or holds a special token of the model.
            ValueError: the template shows no pictures.
        """
        if not without_markers(question):
            raise RecordError("the question is empty")
        self._check(question)
        return question if self.template is None else self._render(question, markers, None)

    def answered(self, question: str, markers: list[int], answer: str) -> str:
        """The prompt with its answer, and the token that ends it.

        Raises:
            RecordError: the question or the answer is empty, or holds a special token of the model.
            ValueError: the template shows no pictures, or does not put an answer after its prompt.
        """
        if not (answer := answer.strip()):
            raise RecordError("the answer is empty")
        self._check(answer)
        prompt = self.asked(question, markers)
        if self.template is None:
            return f"{prompt} {answer}{self.encoder.tokenizer.eos_token}"
        whole = self._render(question, markers, answer)
        at = whole.find(answer, len(prompt))
        if not whole.startswith(prompt) or at < 0:
            raise ValueError(f"the chat template of {self.encoder.pretrained} does not put the answer after its prompt")
        return whole[: at + len(answer)] + self._ends(whole[at + len(answer) :])

    def spoken(self, text: str) -> str:
        """What the model has answered, of the text of its tokens: up to a token that ends it."""
        for end in self.ends:
            text = text.partition(end)[0]
        return text.strip()

    @cached_property
    def ends(self) -> set[str]:
        """What ends an answer."""
        eos = str(self.encoder.tokenizer.eos_token)
        return {eos} if self.template is None else {eos, self._ends(self._render("a", [], "b").rpartition("b")[2])}

    def _ends(self, after: str) -> str:
        """The first special token after an answer, or the end of text where the template has none there."""
        found = [(after.index(token), token) for token in self._special if token in after]
        return min(found)[1] if found else str(self.encoder.tokenizer.eos_token)

    @cached_property
    def _special(self) -> list[str]:
        return [token.content for token in self.encoder.tokenizer.added_tokens_decoder.values() if token.special]

    def _check(self, text: str) -> None:
        if self.template is not None and (held := [token for token in self._special if token in text]):
            raise RecordError(f"{text[:60]!r} holds {held[0]!r}, a special token of the model")

    def _render(self, question: str, markers: list[int], answer: str | None) -> str:
        pieces = split(question, markers)
        asked: list[dict[str, str]] = [{"type": "image"} if slot is not None else {"type": "text", "text": text} for text, slot in pieces]
        messages: list[dict[str, Any]] = [{"role": "user", "content": asked}]
        if answer is not None:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        tokenizer, token = self.encoder.tokenizer, self.encoder.image_token
        text = tokenizer.apply_chat_template(messages, chat_template=self.template, add_generation_prompt=answer is None, tokenize=False)
        text = str(text).removeprefix(tokenizer.bos_token or "")
        before, after = self.encoder.spell(1)
        shown = [markers[slot] for _, slot in pieces if slot is not None]
        for spelt in (f"{before}{token}{after}", token):
            if text.count(spelt) == len(shown):
                first, *rest = text.split(spelt)
                return first + "".join(f"[ref#{k}]{piece}" for k, piece in zip(shown, rest, strict=True))
        raise ValueError(f"the chat template of {self.encoder.pretrained} has not {token} for each picture of a question")


def following(
    encoder: Encoder, prompts: Prompts, asked: list[str], markers: list[list[int]], references: list[PackedImages], special: bool = False
) -> Tensor:
    """The tokens [b, n] of prompts that follow what they began with: an answer's, after its question; all but the first after "".

    Args:
        asked: what the prompts began with, spelt as they are (``special``: see :meth:`Encoder.tokenise`).
    """
    starts = []
    for ids, text, marks, counts in zip(prompts.tokens.tolist(), asked, markers, encoder.counts(markers, references), strict=True):
        begun, _ = encoder.tokenise(text, marks if text else [], counts if text else [], special)
        starts.append(next((i for i, (a, b) in enumerate(zip(begun, ids, strict=False)) if a != b), len(begun)))
    at = torch.tensor(starts, device=prompts.mask.device)
    return prompts.mask & (torch.arange(prompts.mask.shape[1], device=at.device) >= at[:, None])
