"""Questions about pictures, their answers, and where the words of an answer look."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..batch import QuestionBatch, pack
from ..models.chat import Chat
from ..models.encoder import Encoder
from ..prompt import Record, RecordError
from .attention import AttentionTargets
from .cache import Caches
from .datamodule import MultimodalDataModule
from .images import pixels
from .order import Position, RecordDataset
from .recipe import BadRow, Recipe
from .sources import Source


class QuestionSample(NamedTuple):
    """One question, ready: pictures are [3, h, w] in [-1, 1]; ``targets`` are word -> map [s, s] in [0, 1] of its first picture."""

    record: Record
    references: list[Tensor]
    seed: int
    targets: dict[str, Tensor] | None


class QuestionRecipe(Recipe):
    """Turns a record of a question into a sample.

    Args:
        reference_size: side in pixels of every picture, padded to a square.
        encoder: whose chat template and limit of tokens a question and its answer must fit; not checked if none is given.
        targets: where words look; every question needs its own.
    """

    def __init__(self, reference_size: int, encoder: Encoder | None = None, targets: AttentionTargets | None = None) -> None:
        super().__init__(reference_size, reference_size, encoder)
        self.chat, self.targets = Chat(encoder) if encoder else None, targets

    def __call__(  # type: ignore[override]
        self, record: Record, root: Path | None, seed: int, size: tuple[int, int] | None = None
    ) -> QuestionSample:
        """Raises: RecordError: no question, no picture, an empty answer, a prompt that is too long, a picture that cannot be read, or
        targets that are not there or of another picture."""
        if record.question is None or record.answer is None:
            raise RecordError("is no question: 'question' and 'answer' are missing")
        if not record.references:
            raise RecordError("the question has no picture")
        if not record.answer.strip():
            raise RecordError("the answer is empty")
        if self.tokenise and self.chat:
            markers = [r.marker for r in record.references]
            text = self.chat.answered(record.prompt().instruction, markers, record.answer)
            self.tokenise(text, markers, [self.tokens] * len(markers), self.chat.template is not None)
        references = [pixels(r.image, self.reference_size, root) for r in record.references]
        targets = None if self.targets is None else self.targets[record.id, record.references[0].image]
        return QuestionSample(record, references, seed, targets)


def collate_questions(samples: list[QuestionSample | BadRow], caches: Caches = Caches()) -> tuple[QuestionBatch | None, list[BadRow]]:
    """Samples to a batch, and the rows that had to be left out; no batch where nothing is left."""
    bad = [s for s in samples if isinstance(s, BadRow)]
    good = [s for s in samples if isinstance(s, QuestionSample)]
    if not good:
        return None, bad
    targets = [s.targets for s in good if s.targets is not None]
    batch = QuestionBatch(
        [s.record.prompt().instruction for s in good],
        [[r.marker for r in s.record.references] for s in good],
        pack([s.references for s in good], caches.patches),
        [s.record.answer or "" for s in good],
        [s.record.id for s in good],
        torch.tensor([s.seed for s in good], dtype=torch.int64),
        targets or None,
    )
    return batch, bad


class VQADataModule(MultimodalDataModule):
    """Questions about pictures for training and evaluation.

    Args:
        train, held_out: sources, or paths of them; ``toybox`` is the embedded world: which colour, which shape, how many, where; held-out
            questions are of combinations of toys that training never sees.
        targets: folder of attention targets of the training questions, by their ids (``mmgen build attention``).
        settings: of :class:`~lightning_mmgen.data.datamodule.MultimodalDataModule`; ``target_size`` has no meaning here.
    """

    toybox: ClassVar = {"tasks": {"short question": 1.0}}
    toybox_held_out: ClassVar = {"tasks": {"short question": 1.0}, "length": 256}
    collate = staticmethod(collate_questions)
    squares = True

    def __init__(self, train: Source | str, held_out: Source | str | None = None, targets: str | None = None, **settings: Any) -> None:
        super().__init__(train, held_out, **settings)
        self.targets = None if targets is None else AttentionTargets(targets, self.train.root)

    def make_recipe(self, reference_size: int, encoder: Encoder | None, held_out: bool) -> Recipe:
        return QuestionRecipe(reference_size, encoder, None if held_out else self.targets)

    def held_out_batches(self, count: int, batch_size: int) -> list[QuestionBatch]:
        """The first ``count`` held-out questions.

        Raises:
            RecordError: one is bad.
        """
        if self.held_out is None:
            return []
        rows = RecordDataset(self.held_out, self.held_out_recipe, self.seed)
        samples: list[Any] = [rows[Position(i, 0)] for i in range(min(count, len(rows)))]
        batches = []
        for at in range(0, len(samples), batch_size):
            batch, bad = collate_questions(samples[at : at + batch_size])
            if bad:
                raise RecordError(f"a held-out row is bad: {bad[0].reason}")
            assert batch is not None
            batches.append(batch)
        return batches
