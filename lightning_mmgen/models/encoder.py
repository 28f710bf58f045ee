"""Vision-language encoders: a multimodal prompt in, the hidden states of all its tokens out.

A new VLM is one file: subclass :class:`Encoder`, take the parts of its model of ``transformers`` in :meth:`Encoder.adopt`, and say
how its prompt spells a picture.
"""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, NamedTuple, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import rms_norm
from transformers.utils import SAFE_WEIGHTS_NAME

from ..batch import Condition, PackedImages, Span
from ..prompt import RecordError, split
from .loading import Weights, later
from .packing import Layout, use_by_sample
from .placement import Quantization, keep_backward, placement
from .weights import locate


class Place(NamedTuple):
    """Where a picture stands in a prompt: its first token, and how its tokens lie in the picture."""

    start: int
    rows: int
    columns: int


class Prompts(NamedTuple):
    """Prompts as the language model reads them.

    Attributes:
        inputs: [b, n, d].
        mask: [b, n], True where a token is real; right-padded.
        spans: of the references, by slot.
        places: every place where a picture stands among the n tokens, from left to right.
        lengths: of the prompts, in tokens.
        tokens: [b, n], their ids.
        columns: where each picture's patches lie among what attention looks at, from left to right: ``places``, but for a model that
            sees ``pictures``.
        pictures: [b, m, d], what a language model sees by cross-attention alone; zeros are padding. None for one that reads its pictures.
    """

    inputs: Tensor
    mask: Tensor
    spans: list[list[Span]]
    places: list[list[Place]]
    lengths: list[int]
    tokens: Tensor
    columns: list[list[Place]]
    pictures: Tensor | None = None


class Encoder(nn.Module, ABC):
    """A VLM that reads text with pictures in it. Three parts, by the names that the parameter table uses:
    ``vision`` (picture to patches), ``projector`` (patches to the language model's width), ``language``. Pictures are not split.

    Args:
        pretrained: hub name, local folder or ``toybox/<part>``.
        image_tokens: token budget of a reference; its pictures are squares of ``reference_size`` pixels.
        max_tokens: longest prompt, pictures included; a longer one is an error, never cut.
        mix: what comes out. None: the last hidden states (MUMU). A number w: input embeddings + w x last hidden states, each
            RMS-normalised; the last states of a small language model say much about the next token and little about their own.
        dtype: weights' dtype (``float32``, ``bfloat16``).
        attention: attention implementation of ``transformers``.
        quantization: of the frozen linear layers of ``language``, by bitsandbytes: ``nf4`` (4 bit, its scales quantised too, arithmetic in
            ``dtype``; Dettmers et al. 2023) or ``int8`` (Dettmers et al. 2022). ``vision`` and ``projector`` stay as they are: they hold
            under a tenth of the weights. LoRA may train on top.
        device: a device of the encoder's own (``cuda:1``), in the same process: it stays there wherever the rest of the model moves.
            None: it moves with the rest.
    """

    vision: nn.Module
    projector: nn.Module
    language: nn.Module
    architecture: ClassVar[str]
    """The model's class in ``transformers``."""
    transformers_names: ClassVar[dict[str, str]]
    """Where the parts lie in the model of ``transformers``, for LoRA that PEFT loads there."""
    is_loaded_in_4bit: bool = False
    is_loaded_in_8bit: bool = False
    """By these names PEFT asks how the linear layers are quantised."""
    in_step: bool = False
    """Whether every rank must go through the tower equally often; set by a strategy."""

    def __init__(
        self,
        pretrained: str,
        image_tokens: int,
        max_tokens: int = 2048,
        mix: float | None = None,
        dtype: str = "float32",
        attention: str = "sdpa",
        quantization: Quantization | None = None,
        device: str | None = None,
    ) -> None:
        super().__init__()
        if image_tokens < 1 or round(image_tokens**0.5) ** 2 != image_tokens:
            raise ValueError(f"image_tokens must be a square number, not {image_tokens}")
        self.pretrained, self.image_tokens, self.max_tokens, self.mix = pretrained, image_tokens, max_tokens, mix
        if quantization not in (None, *get_args(Quantization)):
            raise ValueError(f"encoder.quantization must be {' or '.join(get_args(Quantization))}, not {quantization!r}")
        self.dtype, self.attention, self.quantization, self.device = dtype, attention, quantization, device
        self._tokenizer: Any = None
        self._config: Any = None

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer; read when first asked for, so that prompts can be checked before the weights are there."""
        if self._tokenizer is None:
            from transformers import AutoTokenizer

            self._tokenizer = AutoTokenizer.from_pretrained(locate(self.pretrained))
        return self._tokenizer

    @property
    def model_config(self) -> Any:
        """The configuration of the model of ``transformers``, read once (PEFT would misread one named ``config``)."""
        if self._config is None:
            from transformers import AutoConfig

            self._config = AutoConfig.from_pretrained(locate(self.pretrained))
        return self._config

    def build(self, weights: Weights = True) -> nn.Module:
        """Create the parts: from pretrained weights, on the encoder's device or else the default one; or (``weights=False``) from the
        configuration alone, on the default device and not quantised; see :data:`Weights`.

        Returns:
            The model's output head, hidden states -> scores of the next token; it is no part of the encoder.

        Raises:
            ValueError: the model is of another architecture, the device is not here, or bitsandbytes is not.
        """
        import transformers

        dtype, kept = getattr(torch, self.dtype), [name for part, name in self.transformers_names.items() if part != "language"]
        placed = placement(self.device, self.quantization, dtype, [*kept, "lm_head"]) if weights else {}  # before anything is downloaded
        found = (self.model_config.architectures or [self.architecture])[0]
        if found != self.architecture:
            raise ValueError(f"{self.pretrained} is a {found}; {type(self).__name__} reads {self.architecture}")
        whole, kind = getattr(transformers, self.architecture), {"dtype": dtype, "attn_implementation": self.attention}
        make = partial(whole._from_config, self.model_config, **kind)
        model = later(make, self.pretrained, SAFE_WEIGHTS_NAME) if weights == "later" and not placed else None
        if model is None:
            model = whole.from_pretrained(locate(self.pretrained), **kind, **placed) if weights else make()
        self.adopt(model.model)
        if not weights:
            return model.lm_head  # type: ignore[no-any-return]
        self.is_loaded_in_4bit, self.is_loaded_in_8bit = self.quantization == "nf4", self.quantization == "int8"
        keep_backward(self.language)
        return model.lm_head  # type: ignore[no-any-return]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Encoder:
        """With a device of its own, the encoder takes on another dtype, but does not move with what it is part of."""
        if self.device is None:
            return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

        def in_place(tensor: Tensor) -> Tensor:
            return tensor.to(fn(tensor.detach().new_empty(0)).dtype) if tensor.is_floating_point() else tensor

        return super()._apply(in_place, recurse)  # type: ignore[no-untyped-call]

    def adopt(self, model: Any, tokenizer: Any = None) -> None:
        """Take the parts of a model of ``transformers`` (its output head is not needed), and a tokenizer if it has none of its own yet."""
        self._config, self._tokenizer = model.config, tokenizer or self._tokenizer
        self.vision, self.projector, self.language = self.take(model)
        use_by_sample(self.language)

    @abstractmethod
    def take(self, model: Any) -> tuple[nn.Module, nn.Module, nn.Module]:
        """``vision``, ``projector`` and ``language`` of the model."""

    def settings(self) -> dict[str, Any]:
        """The arguments that build an encoder like this one."""
        names = ("pretrained", "image_tokens", "max_tokens", "mix", "dtype", "attention", "quantization", "device")
        return {name: getattr(self, name) for name in names}

    @property
    def hidden_size(self) -> int:
        """Width d of the hidden states."""
        return int(self.model_config.text_config.hidden_size)

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
    def see(self, pixels: Tensor) -> Tensor:
        """Pictures [n, 3, h, w] in [-1, 1] through ``vision``: patches [n, m, width]."""

    @abstractmethod
    def project(self, patches: Tensor) -> Tensor:
        """Patches [n, m, width] through ``projector``: language-model inputs [n, tokens_of(h, w), d]."""

    def embed_images(self, pixels: Tensor, patches: Tensor | None = None) -> Tensor:
        """Pictures [n, 3, h, w] in [-1, 1] -> language-model inputs [n, tokens_of(h, w), d].

        Args:
            patches: of these pictures, where they are known.
        """
        return self.project(self.see(pixels) if patches is None else patches)

    @property
    def reference_size(self) -> int:
        """Side in pixels of a reference that fills the token budget."""
        return round(self.image_tokens**0.5) * self.patch_size

    def positions(self, mask: Tensor, places: list[list[Place]]) -> Tensor:
        """The position of every token, [b, n] or [k, b, n], for prompts with a mask [b, n] and pictures at ``places``."""
        return torch.arange(mask.shape[1], device=mask.device).expand(mask.shape)

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the tokens of a picture of this size in pixels."""
        return height // self.patch_size, width // self.patch_size

    def tokens_of(self, height: int, width: int) -> int:
        """How many tokens a picture of this size in pixels takes."""
        rows, columns = self.grid_of(height, width)
        return rows * columns

    def counts(self, markers: list[list[int]], references: list[PackedImages]) -> list[list[int]]:
        """Tokens of each reference of b prompts, by slot."""
        counts = [[0] * len(marks) for marks in markers]
        for group in references:
            for b, slot in zip(group.sample.tolist(), group.slot.tolist(), strict=True):
                counts[b][slot] = self.tokens_of(*group.pixels.shape[-2:])
        return counts

    def tokenise(self, instruction: str, markers: list[int], counts: list[int], special: bool = False) -> tuple[list[int], list[Span]]:
        """One prompt as token ids, each marker replaced by its picture's tokens; and where each picture's tokens lie.

        Args:
            counts: tokens of each reference, by slot.
            special: whether a special token's name in the text is that token (a chat template's), and not its letters.

        Raises:
            RecordError: the prompt is longer than ``max_tokens``.
        """
        image_id = self.tokenizer.convert_tokens_to_ids(self.image_token)
        begin = self.tokenizer.bos_token_id
        ids: list[int] = [self.tokenizer.pad_token_id if begin is None else begin]  # never empty
        spans: dict[int, Span] = {}
        for text, slot in split(instruction, markers):
            if slot is None:
                ids += self.tokenizer(text, add_special_tokens=False, split_special_tokens=not special).input_ids  # "<image>" is no picture
                continue
            before, after = self.spell(counts[slot])
            ids += self.tokenizer(before, add_special_tokens=False).input_ids
            spans.setdefault(slot, Span(len(ids), len(ids) + counts[slot]))
            ids += [image_id] * counts[slot]
            ids += self.tokenizer(after, add_special_tokens=False).input_ids
        if len(ids) > self.max_tokens:
            raise RecordError(f"the prompt has {len(ids)} tokens, more than max_tokens={self.max_tokens}: {instruction[:60]!r}")
        return ids, [spans[k] for k in range(len(counts))]

    def embed(self, instructions: list[str], markers: list[list[int]], references: list[PackedImages], special: bool = False) -> Prompts:
        """What the language model reads: words, and in the markers' places the pictures' tokens. ``special``: see :meth:`tokenise`."""
        device = next(self.language.parameters()).device
        missing = self._passes_of_others(len(references), device) if self.in_step else 0
        features: dict[tuple[int, int], Tensor] = {}
        grids: dict[tuple[int, int], tuple[int, int]] = {}
        for group in references:
            images = self.embed_images(group.pixels, group.patches)  # [n, patches, d]
            for i, key in enumerate(zip(group.sample.tolist(), group.slot.tolist(), strict=True)):
                features[key] = images[i]
                grids[key] = self.grid_of(*group.pixels.shape[-2:])
        blank = (1, 3, self.reference_size, self.reference_size)
        zeros = [0 * self.embed_images(torch.zeros(blank, device=device)).sum() for _ in range(missing)]  # of the graph
        given = zip(instructions, markers, self.counts(markers, references), strict=True)
        rows, spans = zip(*(self.tokenise(text, marks, counts, special) for text, marks, counts in given), strict=True)
        lengths = [len(ids) for ids in rows]
        tokens = torch.tensor([r + [self.tokenizer.pad_token_id] * (max(lengths) - len(r)) for r in rows], device=device)
        mask = torch.arange(max(lengths), device=device) < torch.tensor(lengths, device=device)[:, None]
        inputs = self.language.get_input_embeddings()(tokens)  # type: ignore[operator]
        for zero in zeros:
            inputs = inputs + zero.to(inputs.dtype)
        image_id = self.tokenizer.convert_tokens_to_ids(self.image_token)
        slots = [[s for _, s in split(t, m) if s is not None] for t, m in zip(instructions, markers, strict=True)]  # left to right
        shown = [[grids[b, s] for s in of] for b, of in enumerate(slots)]
        places = [_places(ids, image_id, [self.cells(grid) for grid in of]) for ids, of in zip(rows, shown, strict=True)]
        prompts = Prompts(inputs, mask, list(spans), places, lengths, tokens, places)
        return self.show(prompts, tokens == image_id, [[features[b, s] for s in of] for b, of in enumerate(slots)], shown)

    def cells(self, grid: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of a picture's tokens in the text."""
        return grid

    def show(self, prompts: Prompts, at: Tensor, pictures: list[list[Tensor]], grids: list[list[tuple[int, int]]]) -> Prompts:
        """The prompts with their pictures in them.

        Args:
            prompts: their words.
            at: [b, n], True where a picture's tokens are to stand.
            pictures: what :meth:`embed_images` made of each, from left to right.
            grids: how these lie.
        """
        if not any(pictures):
            return prompts
        order = torch.cat([image for of in pictures for image in of])
        return prompts._replace(inputs=prompts.inputs.masked_scatter(at.unsqueeze(-1), order.to(prompts.inputs.dtype)))

    def _passes_of_others(self, passes: int, device: torch.device) -> int:
        """How often more another rank's pictures go through the tower. Ranks that gather weights from each other do so in the same order,
        or wait for ever: this asks before any pass, and blank pictures stand in for those of others."""
        most = torch.tensor(passes, device=device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return int(most) - passes

    def read(self, prompts: Prompts) -> Tensor:
        """The last hidden states [b, n, d]."""
        layout, positions = Layout.of(prompts.mask, prompts.lengths), self.positions(prompts.mask, prompts.places)
        inputs, positions = layout.pack(prompts.inputs), layout.pack(positions, positions.ndim - 2)
        out = self.language(inputs_embeds=inputs, position_ids=positions, lengths=layout.lengths, use_cache=False)
        return layout.unpack(out.last_hidden_state)

    def forward(self, instructions: list[str], markers: list[list[int]], references: list[PackedImages]) -> Condition:
        """Encode b prompts: hidden states [b, n, d] of text and picture tokens alike."""
        prompts = self.embed(instructions, markers, references)
        tokens = self.read(prompts)
        if self.mix is not None:
            tokens = rms_norm(prompts.inputs, tokens.shape[-1:]) + self.mix * rms_norm(tokens, tokens.shape[-1:])
        return Condition(tokens, prompts.mask, prompts.spans, lengths=prompts.lengths)


def _places(ids: list[int], image_id: int, grids: list[tuple[int, int]]) -> list[Place]:
    """Where pictures of these rows and columns, from left to right, stand among a prompt's tokens."""
    places, at = [], 0
    for rows, columns in grids:
        at = ids.index(image_id, at)
        places.append(Place(at, rows, columns))
        at += rows * columns
    return places


def encoders() -> list[type[Encoder]]:
    """Every encoder in this package, by name; a new file among its modules is enough to be one."""
    package = __name__.rpartition(".")[0]
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__, f"{package}."):
        importlib.import_module(module.name)
    return sorted((e for e in Encoder.__subclasses__() if e.__module__.startswith(f"{package}.")), key=lambda e: e.__name__)


def clip_normalised(pixels: Tensor) -> Tensor:
    """Pixels in [-1, 1] with the mean and the standard deviation that CLIP's pictures have, [..., 3, H, W]."""
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    return _normalised(pixels, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)


def imagenet_normalised(pixels: Tensor) -> Tensor:
    """Pixels in [-1, 1] with the mean and the standard deviation of ImageNet's, as DINO wants them, [..., 3, H, W]."""
    from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    return _normalised(pixels, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)


def _normalised(pixels: Tensor, mean: list[float], std: list[float]) -> Tensor:
    return ((pixels + 1) / 2 - pixels.new_tensor(mean)[:, None, None]) / pixels.new_tensor(std)[:, None, None]
