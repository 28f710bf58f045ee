"""Attention maps of chosen layers: queries and keys are remembered as a pass goes by, and only the shares asked for are computed of them.

The pass computes what it would have (SDPA stays on), and no map of all queries by all keys is held. Shares carry gradients, so that a loss
on a map reaches the layer.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from .packing import BY_SAMPLE

LANGUAGE = ("eager", "sdpa", BY_SAMPLE)
UNET = ("AttnProcessor", "AttnProcessor2_0")
"""The ways of attending, of ``transformers`` and of ``diffusers``, whose maps follow from queries and keys as computed here."""
BUDGET = 2**24
"""Scores held at a time where all queries are asked for."""


class Attention(NamedTuple):
    """What one layer compares in one pass; a map is softmax(scale q k^T + mask).

    Attributes:
        queries: [b, heads, n, d]; after rotary embedding and norms, as ``keys``.
        keys: [b, groups, m, d]: each stands for heads / groups heads.
        scale: of the products.
        mask: [b or 1, heads or 1, n or 1, m], added, or False where a query does not see a key.
        causal: no query sees a later key.
        window: a query sees its own key and so many less one before it.
        lengths: of b samples packed in one row, [1, heads, total, d], each of which sees itself alone.
    """

    queries: Tensor
    keys: Tensor
    scale: float
    mask: Tensor | None = None
    causal: bool = False
    window: int | None = None
    lengths: list[int] | None = None

    @property
    def size(self) -> tuple[int, int, int]:
        """b, n and m; of packed samples, n and m of the longest."""
        if self.lengths is None:
            return len(self.queries), self.queries.shape[2], self.keys.shape[2]
        return len(self.lengths), max(self.lengths), max(self.lengths)

    def rows(self, sample: Tensor, query: Tensor) -> Tensor:
        """Where k queries look.

        Args:
            sample, query: [k] each.

        Returns:
            Shares [k, heads, m], in float32, which sum to 1.
        """
        at, slot = _by_sample(sample, query, self.size[0])
        return self._scores(self._keys(), at).softmax(-1)[sample, :, slot]

    def columns(self, sample: Tensor, key: Tensor) -> Tensor:
        """What k keys get of every query of their sample: over a UNet's pixels, the maps of prompt tokens.

        Args:
            sample, key: [k] each.

        Returns:
            Shares [k, heads, n], in float32: of each query's softmax over all keys. Scores are held for a part of the queries at a time,
            and computed again in the backward pass.
        """
        b, n, m = self.size
        keys, (at, slot) = self._keys(), _by_sample(sample, key, b)
        parts = torch.split(torch.arange(n, device=at.device), max(1, BUDGET // (b * self.queries.shape[1] * m)))
        if len(parts) == 1 or not torch.is_grad_enabled():
            shares = [self._shares(keys, part, at) for part in parts]
        else:
            shares = [checkpoint(self._shares, keys, part, at, use_reentrant=False) for part in parts]  # type: ignore[misc]
        return torch.cat(shares, 2)[sample, :, :, slot]

    def _shares(self, keys: Tensor, queries: Tensor, at: Tensor) -> Tensor:
        """The shares [b, heads, c, w] that keys ``at`` [b, w] get of ``queries`` [c]."""
        scores = self._scores(keys, queries.expand(len(at), -1))
        return (scores.take_along_dim(at[:, None, None], 3) - scores.logsumexp(-1, keepdim=True)).exp()

    def _keys(self) -> Tensor:
        """Keys [b, groups, m, d], of packed samples with zeros after each."""
        if self.lengths is None:
            return self.keys
        return pad_sequence(list(torch.split(self.keys[0].transpose(0, 1), self.lengths)), batch_first=True).transpose(1, 2)

    def _scores(self, keys: Tensor, at: Tensor) -> Tensor:
        """scale q k^T + mask in float32, [b, heads, w, m], for the queries ``at`` [b, w]."""
        first = self._first(at.device)  # [b, 1]
        if self.lengths is None:
            queries = self.queries.take_along_dim(at[:, None, :, None], 2)
        else:
            queries = self.queries[0][:, at + first].transpose(0, 1)
        b, heads, w, d = queries.shape
        grouped = queries.reshape(b, keys.shape[1], -1, d)  # [b, groups, heads / groups * w, d]
        scores = (grouped @ keys.transpose(-1, -2)).view(b, heads, w, -1).float() * self.scale
        if self.mask is not None:
            mask = self._mask(self.mask, at + first, first + torch.arange(keys.shape[2], device=at.device))
            scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
        return scores.masked_fill(~self._seen(at, keys.shape[2]), float("-inf"))

    def _first(self, device: torch.device) -> Tensor:
        """Where each sample begins in its row, [b, 1]."""
        if self.lengths is None:
            return torch.zeros(len(self.queries), 1, dtype=torch.long, device=device)
        lengths = torch.tensor(self.lengths, device=device)
        return (lengths.cumsum(0) - lengths)[:, None]

    def _mask(self, mask: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """The mask at the tokens ``rows`` [b, w] and ``columns`` [b, m] of their rows of samples, [b, heads or 1, w, m]."""
        samples = torch.zeros_like(rows[:, :1]) if len(mask) == 1 else torch.arange(len(rows), device=rows.device)[:, None]
        rows = rows if mask.shape[2] > 1 else torch.zeros_like(rows)
        columns = columns.clamp(max=mask.shape[3] - 1)  # beyond the last sample's end, which _seen hides
        return mask.transpose(1, 3)[samples[..., None], columns[:, None], rows[..., None]].movedim(3, 1)

    def _seen(self, at: Tensor, m: int) -> Tensor:
        """Whether causality, the window and the sample's length let the queries ``at`` [b, w] see each of m keys, [b, 1, w, m]."""
        key, query = torch.arange(m, device=at.device), at[:, :, None]
        seen = torch.ones_like(query, dtype=torch.bool).expand(*at.shape, m)
        if self.causal:
            seen = seen & (key <= query)
        if self.causal and self.window is not None:
            seen = seen & (key > query - self.window)
        if self.lengths is not None:
            seen = seen & (key < torch.tensor(self.lengths, device=at.device)[:, None, None])
        return seen[:, None]


def _by_sample(sample: Tensor, token: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """The tokens [k] in a row a sample, [b, w], and the place of each in its row, [k]."""
    slot = (sample[:, None] == sample).tril().sum(1) - 1
    at = token.new_zeros(b, int(slot.max()) + 1 if len(slot) else 0)
    at[sample, slot] = token
    return at, slot


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of a model whose attention can be captured, by name: every attention of a language model of ``transformers``, and every
    cross-attention of a UNet of ``diffusers``.

    Raises:
        ValueError: there is none.
    """
    found = {name: module for name, module in model.named_modules() if _in_unet(module) or _in_language(module)}
    if not found:
        raise ValueError(f"{type(model).__name__} has no attention layer whose maps can be captured")
    return found


def heads_of(layer: Any) -> int:
    """Query heads of an attention layer."""
    return int(layer.heads if _in_unet(layer) else layer.config.num_attention_heads)


def choose(names: Sequence[str], layers: Sequence[str | int] | None) -> list[str]:
    """The names that ``layers`` name: whole names or patterns with ``*``, or places from 0 (from -1: backwards); None for all.

    Raises:
        ValueError: one of them names none.
    """
    if layers is None:
        return list(names)
    chosen: list[str] = []
    for layer in layers:
        if isinstance(layer, int):
            fits = [names[layer]] if -len(names) <= layer < len(names) else []
        else:
            fits = [name for name in names if fnmatchcase(name, layer)]
        if not fits:
            raise ValueError(f"no attention layer {layer!r}; there are {len(names)}, {names[0]} to {names[-1]}")
        chosen += fits
    return [name for name in names if name in chosen]


@contextmanager
def captured(model: nn.Module, layers: Sequence[str | int] | None = None) -> Iterator[dict[str, Attention]]:
    """Within it, what the chosen layers compare, by the layer's name; of several passes, the last.

    Args:
        model: a language model of ``transformers`` or a UNet of ``diffusers``, with LoRA or without.
        layers: names, patterns or places among those of :func:`layers_of`; all if none are given.

    Raises:
        ValueError: no such layer; or the model attends in a way whose maps do not follow from queries and keys alone.
    """
    found, records = layers_of(model), dict[str, Attention]()
    chosen = {name: found[name] for name in choose(list(found), layers)}
    language: dict[Any, str] = {module: name for name, module in chosen.items() if not _in_unet(module)}
    with ExitStack() as stack:
        for name, module in chosen.items():
            if module not in language:
                stack.enter_context(_watched_unet(model, module, name, records))
        for kind in sorted({str(module.config._attn_implementation) for module in language}):
            stack.enter_context(_watched_language(model, kind, language, records))
        yield records


def grid_of(pixels: int, size: tuple[int, int]) -> tuple[int, int]:
    """Height and width of a UNet's level of so many pixels, for latents of this size, which each level halves.

    Raises:
        ValueError: no level has so many.
    """
    height, width = size
    while height * width > pixels:
        height, width = (height + 1) // 2, (width + 1) // 2
    if height * width != pixels:
        raise ValueError(f"no level of latents of {size[0]} x {size[1]} has {pixels} pixels")
    return height, width


def _in_unet(module: nn.Module) -> bool:
    from diffusers.models.attention_processor import Attention as UNetAttention

    return isinstance(module, UNetAttention) and bool(module.is_cross_attention)


def _in_language(module: nn.Module) -> bool:
    named = hasattr(module, "layer_idx") and hasattr(module, "config")
    return named and type(module).__name__.endswith("Attention")


@contextmanager
def _watched_language(model: nn.Module, kind: str, layers: dict[nn.Module, str], records: dict[str, Attention]) -> Iterator[None]:
    """Stand in the place of one way of attending of ``transformers``, and pass everything on to it."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as known

    if kind not in LANGUAGE:
        raise ValueError(f"{type(model).__name__}: maps of attention {kind!r} cannot be captured; {', '.join(LANGUAGE[:2])} can")
    before: Callable[..., Any] | None = known.get(kind)

    def watching(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *args: Any, **settings: Any) -> Any:
        if module in layers:
            records[layers[module]] = _compared(type(model).__name__, kind, module, query, key, mask, settings)
        attend = before or sys.modules[type(module).__module__].eager_attention_forward
        return attend(module, query, key, value, mask, *args, **settings)

    known[kind] = watching
    try:
        yield
    finally:
        del known[kind]
        if before is not None and known.get(kind) is not before:  # within another capture
            known[kind] = before


def _compared(model: str, kind: str, module: Any, q: Tensor, k: Tensor, mask: Tensor | None, settings: dict[str, Any]) -> Attention:
    """What a layer of ``transformers`` hands to its attention.

    Raises:
        ValueError: its scores are changed in a way of its own, or packed samples look at keys that are not packed with them.
    """
    changed = [name for name in ("softcap", "s_aux", "position_bias", "cache") if settings.get(name) is not None]
    lengths = settings.get("lengths")
    if lengths is not None and not (q.shape[2] == k.shape[2] == sum(lengths)):
        changed.append("lengths")
    if changed or (mask is not None and mask.ndim != 4):
        raise ValueError(f"{model}: maps of {type(module).__name__} with {', '.join(changed) or 'such a mask'} cannot be captured")
    causal = settings.get("is_causal")
    causal = bool(getattr(module, "is_causal", True) if causal is None else causal)
    causal = causal and mask is None and kind != "eager" and q.shape[2] > 1
    scale = settings.get("scaling") or q.shape[-1] ** -0.5
    return Attention(q, k, float(scale), mask, causal, settings.get("sliding_window"), lengths)


@contextmanager
def _watched_unet(model: nn.Module, layer: Any, name: str, records: dict[str, Attention]) -> Iterator[None]:
    """Listen to what a layer's ``to_q`` and ``to_k`` give, with the mask that the layer gets."""
    if (way := type(layer.processor).__name__) not in UNET or layer.added_kv_proj_dim is not None:
        raise ValueError(f"{type(model).__name__}: maps of {name} with the processor {way} cannot be captured")
    held: dict[str, Tensor] = {}

    def hold(part: str) -> Callable[..., None]:
        return lambda _module, _args, out: held.update({part: out})

    def remember(module: Any, args: Any, settings: dict[str, Any], out: Any) -> None:
        q, k = (held.pop(part) for part in ("q", "k"))  # [b, n, heads * d]
        q, k = (x.view(*x.shape[:2], module.heads, -1).transpose(1, 2) for x in (q, k))
        q, k = (x if norm is None else norm(x) for x, norm in ((q, module.norm_q), (k, module.norm_k)))
        mask = settings.get("attention_mask")
        if mask is not None:
            mask = mask.view(len(mask), 1, -1, mask.shape[-1])
        records[name] = Attention(q, k, float(module.scale), mask)

    hooks = [layer.to_q.register_forward_hook(hold("q")), layer.to_k.register_forward_hook(hold("k"))]
    hooks.append(layer.register_forward_hook(remember, with_kwargs=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
