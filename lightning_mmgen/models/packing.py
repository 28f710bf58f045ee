"""Samples of unequal lengths without padding: one row of tokens, in which each sample attends to itself alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence

BY_SAMPLE = "sdpa_by_sample"
"""The name under which ``transformers`` knows :func:`language_attention`."""


class Layout(NamedTuple):
    """How samples with a mask [b, n] lie before a transformer: padded, [b, n], or packed, [1, total], whichever is cheaper.

    Attributes:
        mask: [b, n], True where a token is real.
        lengths: of the samples in the packed row; none where they stay padded.
    """

    mask: Tensor
    lengths: list[int] | None

    @classmethod
    def of(cls, mask: Tensor, lengths: list[int] | None) -> Layout:
        """The cheaper layout for samples of these lengths, padded on the right; those of unknown lengths stay padded."""
        return cls(mask, lengths if lengths and is_ragged(lengths) else None)

    def pack(self, x: Tensor, dim: int = 0) -> Tensor:
        """[..., b, n, ...], with b at ``dim``, as the transformer reads it: unchanged, or [..., 1, total, ...]."""
        if self.lengths is None:
            return x
        return torch.cat([row.narrow(dim, 0, n) for row, n in zip(x.unbind(dim), self.lengths, strict=True)], dim).unsqueeze(dim)

    def unpack(self, x: Tensor) -> Tensor:
        """What the transformer returns, back as [b, n, d]; zeros in place of padding that it has not seen."""
        return x if self.lengths is None else pad_sequence(list(torch.split(x[0], self.lengths)), batch_first=True)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Non-causal attention of queries, keys and values [b, heads, n, d] in this layout, each sample to its own real tokens."""
        if self.lengths is None:
            return scaled_dot_product_attention(q, k, v, self.mask[:, None, None])
        return by_sample(scaled_dot_product_attention, q, k, v, self.lengths, 2)


def is_ragged(lengths: Sequence[int]) -> bool:
    """Whether padding samples to the longest would add more than a tenth to their tokens. A packed row costs no more arithmetic than its
    samples, but one call of the attention for each of them: where lengths are nearly equal, padding is cheaper."""
    return len(lengths) * max(lengths) > 1.1 * sum(lengths)


def by_sample(attend: Callable[[Tensor, Tensor, Tensor], Tensor], q: Tensor, k: Tensor, v: Tensor, lengths: list[int], dim: int) -> Tensor:
    """Attention of samples of these lengths packed in one row: queries, keys and values [1, heads, total, d], and what ``attend`` makes of
    each sample's joined along ``dim``."""
    samples = zip(*(torch.split(x, lengths, 2) for x in (q, k, v)), strict=True)
    return torch.cat([attend(*sample) for sample in samples], dim)


def language_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    lengths: list[int] | None = None,
    sliding_window: int | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """The attention ``sdpa`` of ``transformers``, in rows of samples of these ``lengths``. Causal, so that no token sees the padding on its
    right, and a mask is only needed where a sliding window is shorter than a sample."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask, n = attention_mask, q.shape[2]
        if mask is None and sliding_window is not None and sliding_window < n:
            mask = q.new_ones(n, n, dtype=torch.bool).tril().triu(1 - sliding_window)[None, None]
        return sdpa_attention_forward(module, q, k, v, mask, **settings)[0]  # type: ignore[no-any-return]

    return (by_sample(attend, query, key, value, lengths, 1) if lengths else attend(query, key, value)), None


def language_mask(attention_mask: Tensor | None = None, **settings: Any) -> Tensor | None:
    """The mask of ``sdpa`` where somebody gives one of padding, else none: :func:`language_attention` is causal by itself."""
    from transformers.masking_utils import sdpa_mask

    return None if attention_mask is None else sdpa_mask(attention_mask=attention_mask, **settings)


def use_by_sample(language: Any) -> None:
    """Let a language model of ``transformers`` that uses ``sdpa`` take ``lengths``, which alone tell samples apart in it. Other ones
    go by positions that start again at 0: flash attention skips what lies between samples, eager attention masks it."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(BY_SAMPLE, language_attention)
    AttentionMaskInterface.register(BY_SAMPLE, language_mask)
    if language.config._attn_implementation == "sdpa":
        language.set_attn_implementation(BY_SAMPLE)
