"""How well a model still says what it could say before its fine-tuning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer

from lightning_mmgen.answering import VisualInstructionTuning

from .ema import evaluation
from .scoring import Evaluation


class LanguageEvaluation(Evaluation):
    """The language loss on held-out texts, by themselves and without a picture: mean -log p of a token, as ``held_out/language``. It rises
    where a model forgets.

    Args:
        every: optimizer steps between evaluations; 0 for before and after only.
        count: texts.
        texts: a file of texts, one a line; by default the captions of the held-out records.
        batch_size: texts at a time.
    """

    heading = "held-out texts"
    titles = {"language": "language loss on texts"}

    def __init__(self, every: int = 0, count: int = 128, texts: str | None = None, batch_size: int = 32) -> None:
        super().__init__(every, count)
        self.texts, self.batch_size = texts, batch_size

    def look(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not isinstance(pl_module, VisualInstructionTuning):
            raise ValueError("LanguageEvaluation needs a model that speaks: VisualInstructionTuning")
        texts = self._texts(trainer)[: 2 if trainer.fast_dev_run else self.count]  # type: ignore[attr-defined]
        parts = [texts[at : at + self.batch_size] for at in range(0, len(texts), self.batch_size)]
        with evaluation(trainer, pl_module):
            scores = [pl_module.language_score(part) for part in parts]
        self.tell(trainer, {"language": [sum(total for total, _ in scores) / sum(count for _, count in scores)]})

    def _texts(self, trainer: Trainer) -> list[str]:
        if self.texts is not None:
            found = [line.strip() for line in Path(self.texts).read_text(encoding="utf-8").splitlines()]
        else:
            source: Any = getattr(trainer.datamodule, "held_out", None) or []  # type: ignore[attr-defined]
            found = [source.record(i).caption or "" for i in range(min(self.count, len(source)))]
        if not (found := [text for text in found if text]):
            raise ValueError(f"LanguageEvaluation: no captions in {self.texts or 'data.held_out'}; give texts, a file of one a line")
        return found
