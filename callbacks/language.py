"""How well a model still says what it could say before its fine-tuning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer

from lightning_mmgen.answering import VisualInstructionTuning

from .ema import evaluation
from .held_out import HeldOutCallback
from .rows import log_scores


class LanguageEvaluation(HeldOutCallback):
    """The language loss on held-out texts, by themselves and without a picture: mean -log p of a token, before training, every ``every``
    steps, and at the end; as ``held_out/language``, and as a table at the end. It rises where a model forgets.

    Args:
        every: optimizer steps between evaluations; 0 for before and after only.
        count: texts.
        texts: a file of texts, one a line; by default the captions of the held-out records.
        batch_size: texts at a time.
    """

    at_start = True

    def __init__(self, every: int = 0, count: int = 128, texts: str | None = None, batch_size: int = 32) -> None:
        super().__init__(every, count)
        self.texts, self.batch_size = texts, batch_size
        self.before: float | None = None
        self.after: float | None = None

    def look(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not isinstance(pl_module, VisualInstructionTuning):
            raise ValueError("LanguageEvaluation needs a model that speaks: VisualInstructionTuning")
        texts = self._texts(trainer)[: 2 if trainer.fast_dev_run else self.count]  # type: ignore[attr-defined]
        parts = [texts[at : at + self.batch_size] for at in range(0, len(texts), self.batch_size)]
        with evaluation(trainer, pl_module):
            scores = [pl_module.language_score(part) for part in parts]
        self.after = sum(total for total, _ in scores) / sum(count for _, count in scores)
        if self.before is None:
            self.before = self.after
        log_scores(trainer, {"held_out/language": self.after})

    def _texts(self, trainer: Trainer) -> list[str]:
        if self.texts is not None:
            found = [line.strip() for line in Path(self.texts).read_text(encoding="utf-8").splitlines()]
        else:
            source: Any = getattr(trainer.datamodule, "held_out", None) or []  # type: ignore[attr-defined]
            found = [source.record(i).caption or "" for i in range(min(self.count, len(source)))]
        if not (found := [text for text in found if text]):
            raise ValueError(f"LanguageEvaluation: no captions in {self.texts or 'data.held_out'}; give texts, a file of one a line")
        return found

    def table(self) -> str:
        if self.before is None or self.after is None:
            return ""
        return f"{'language loss on texts':<28}{self.before:>16.3f}{self.after:>16.3f}"

    def state_dict(self) -> dict[str, Any]:
        return {"before": self.before}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.before = state_dict["before"]
