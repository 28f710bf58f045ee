"""What a caption's words make of a noisy picture teaches how to read an instruction's pictures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning import LightningModule, Trainer
from torch import Tensor, nn

from lightning_mmgen.batch import Batch
from lightning_mmgen.losses import DenoisingStep, LossTerm, counted_mean, error_along, relative_error, squared_error
from lightning_mmgen.models.attention import layers_of
from lightning_mmgen.models.unet import pooled_features
from lightning_mmgen.prompt import without_stop

from .ema import copies, pieces
from .teacher import taught

if TYPE_CHECKING:
    from lightning_mmgen.module import MultimodalDiffusion


class CaptionTeacher(LossTerm):
    """Asks of a prompt with pictures what the model, as the fit found it, predicts when it reads the target's description in their place
    (``Record.description``; its caption where there is none).

    The teacher has the weights that the fit began with (one that starts from a run with a teacher goes on with that one, which may know
    more words), and reads the same z_t. Its prediction e_T is a function of words alone, where the target holds all that no prompt tells
    (score distillation of Kosmos-G, Pan et al. 2024, section 2.3); the outputs f_l of the UNet's cross-attention layers say at each layer
    what is to be read (feature distillation of BK-SDM, Kim et al. 2024, equation 3, here relative to the teacher's:
    d(f, g) = || f - g ||^2 / || g ||^2), and SDXL's pooled vector p says it at once:
    L = L_0 + weight (prediction || e - e_T ||^2 + features mean_l d(f_l, f_l,T) + pooled d(p, p_T)).

    Details move these outputs little beside a subject's kind or colour, so that all else drowns them. Where a record has a ``foil``, the
    teacher reads it too, and what tells its outputs from those of the description is the one direction in which details count:
    details mean_l a(f_l, f_l,T, f_l,foil), the error along it (:func:`~lightning_mmgen.losses.error_along`; our choice).

    What the descriptions leave out is learned from the targets, by L_0. Of a prompt without pictures, or whose pictures were dropped, the
    teacher reads the caption alone where the prompt holds it (an instruction's other words are for the student to learn), else all as it
    is, so that words go on being read as they were (learning without forgetting, Li & Hoiem 2016, section 3); a prompt with pictures but
    no description adds nothing. A step costs one more forward pass without gradients, through which samples with foils go
    twice. The teacher's weights are part of the checkpoint.

    Args:
        weight: factor of all terms.
        prediction, features, pooled, details: their shares; one of 0 is neither computed nor logged.

    Raises:
        ValueError: a share below 0, or all of them 0; a share of the pooled vector where the UNet takes none.
    """

    def __init__(
        self, weight: float = 1.0, prediction: float = 1.0, features: float = 1.0, pooled: float = 0.0, details: float = 0.0
    ) -> None:
        super().__init__(weight)
        self.shares = {"taught": prediction, "taught_features": features, "taught_pooled": pooled, "taught_details": details}
        if min(self.shares.values()) < 0 or not any(self.shares.values()):
            given = ", ".join(map(str, self.shares.values()))
            raise ValueError(f"CaptionTeacher: the shares must be 0 or more, and not all 0, not {given}")
        self.first: dict[str, Tensor] = {}
        self.layers: list[nn.Module] = []  # of the UNet's cross-attention, where their outputs are asked for
        self.seen: dict[Any, Tensor] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.module = cast("MultimodalDiffusion", pl_module)

    def start_from(self, state: dict[str, Any]) -> None:
        self.first = state.get("first", {})

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.first = copies(pl_module, self.first)
        self.layers = list(layers_of(self.module.unet).values()) if self.shares["taught_features"] or self.shares["taught_details"] else []
        if self.shares["taught_pooled"] and not pooled_features(self.module.unet):
            raise ValueError("CaptionTeacher: pooled must be 0, as this UNet takes no pooled vector")

    @contextmanager
    def watching(self, module: LightningModule) -> Iterator[None]:
        """Keep the outputs of the cross-attention layers; of several passes, the last."""
        self.seen, kept = {}, [layer.register_forward_hook(self._see) for layer in self.layers]
        try:
            yield
        finally:
            for hook in kept:
                hook.remove()

    def _see(self, layer: Any, inputs: Any, output: Tensor) -> None:
        self.seen[layer] = output

    def compute(self, step: DenoisingStep) -> dict[str, Tensor]:
        own, self.seen = self.seen, {}
        if not self.first or not self.module.training:
            return {}
        batch, size = step.batch, step.batch.size
        texts = words(batch)
        foils = foils_of(batch, texts) if self.shares["taught_details"] else {}
        rows, unlike = [*range(size), *foils], [*foils]  # the descriptions first
        read, source = in_words(batch, rows, [*texts, *foils.values()]), step.condition.source
        source = None if source is None else source[rows]
        with self.watching(self.module):
            prediction, condition = taught(self.module, self.first, read, step.z_t[rows], step.timesteps[rows], source)
        told, self.seen = {layer: (output[:size], output[size:]) for layer, output in self.seen.items()}, {}
        terms = {
            "taught": lambda: squared_error(step.prediction, prediction[:size]),
            "taught_features": lambda: mean(relative_error(own[layer], f) for layer, (f, _) in told.items()),
            "taught_pooled": lambda: relative_error(*(cast("Tensor", c.pooled)[:size] for c in (step.condition, condition))),
            "taught_details": lambda: mean(error_along(own[layer][unlike], f[unlike], foil) for layer, (f, foil) in told.items()),
        }
        known = torch.tensor([text is not None for text in texts], device=prediction.device)
        counts = dict.fromkeys(terms, known) | {"taught_details": known[unlike]}
        return {name: share * counted_mean(terms[name](), counts[name]) for name, share in self.shares.items() if share}

    def state_dict(self) -> dict[str, Any]:
        return {"first": pieces(self.module, self.first)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.first = state_dict["first"]


def mean(values: Iterable[Tensor]) -> Tensor:
    """Of tensors of one shape."""
    return torch.stack([*values]).mean(0)


def in_words(batch: Batch, rows: list[int], texts: Sequence[str | None]) -> Batch:
    """The batch with texts in place of its prompts, each of the size of the target in one of these ``rows``; nothing where there is nothing
    to be read."""
    sizes = None if batch.sizes is None else batch.sizes[rows]
    read = [text or "" for text in texts]
    return batch._replace(instructions=read, markers=[[] for _ in read], references=[], phrases=None, sizes=sizes)


def words(batch: Batch) -> list[str | None]:
    """What a teacher reads of each sample: the target's description in the place of a prompt with pictures, None where it has none; the
    caption that a prompt without pictures puts in words of its own (a template's, say); any other as it is."""
    captions = map(without_stop, batch.captions)
    described = batch.captions if batch.descriptions is None else batch.descriptions
    rows = zip(described, captions, batch.markers, batch.instructions, strict=True)
    return [(said or None) if marks else caption if caption and caption in text else text for said, caption, marks, text in rows]


def foils_of(batch: Batch, texts: Sequence[str | None]) -> dict[int, str]:
    """The foil of each row that has one, something else to read (:func:`words`), and pictures that tell the two apart."""
    foils = batch.foils or [""] * batch.size
    known = zip(foils, batch.markers, texts, strict=True)
    return {row: foil for row, (foil, marks, said) in enumerate(known) if foil and marks and said}
