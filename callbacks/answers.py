"""Answers to held-out questions, before and after."""

from __future__ import annotations

from math import sqrt
from typing import Any

from lightning import LightningModule, Trainer

from lightning_mmgen.data.questions import VQADataModule

from .ema import evaluation
from .held_out import HeldOutCallback
from .rows import log_scores


def exact_match(said: str, right: str) -> bool:
    """Whether two answers are the same words, whatever their case, their spaces and a full stop at the end."""
    one, other = (" ".join(text.casefold().split()).removesuffix(".") for text in (said, right))
    return one == other


class AnswerEvaluation(HeldOutCallback):
    """The share of held-out questions that the model answers word for word (greedily), before training, every ``every`` steps, and at the
    end; as ``held_out/accuracy``, and as a table at the end.

    Args:
        every: optimizer steps between evaluations; 0 for before and after only.
        count: held-out questions.
        batch_size: questions at a time.
    """

    at_start = True

    def __init__(self, every: int = 0, count: int = 128, batch_size: int = 32) -> None:
        super().__init__(every, count)
        self.batch_size = batch_size
        self.before: float | None = None
        self.after: float | None = None
        self.asked = 0

    def look(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, VQADataModule) or data.held_out is None:
            raise ValueError("AnswerEvaluation asks held-out questions: data must be a VQADataModule with held_out")
        right: list[bool] = []
        with evaluation(trainer, pl_module):
            for batch in data.held_out_batches(2 if trainer.fast_dev_run else self.count, self.batch_size):  # type: ignore[attr-defined]
                said = pl_module.answer(pl_module.transfer_batch_to_device(batch, pl_module.device, 0))  # type: ignore[operator]
                right += [exact_match(*pair) for pair in zip(said, batch.answers, strict=True)]
        self.asked, self.after = len(right), sum(right) / len(right)
        if self.before is None:
            self.before = self.after
        log_scores(trainer, {"held_out/accuracy": self.after})

    def table(self) -> str:
        if self.before is None or self.after is None:
            return ""
        cells = [f"{p:.3f} ± {1.96 * sqrt(p * (1 - p) / self.asked):.3f}" for p in (self.before, self.after)]
        lines = [f"{'held-out questions: ' + str(self.asked):<28}{'before':>16}{'after':>16}"]
        return "\n".join([*lines, f"{'answered word for word':<28}{cells[0]:>16}{cells[1]:>16}"])

    def state_dict(self) -> dict[str, Any]:
        return {"before": self.before, "asked": self.asked}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.before, self.asked = state_dict["before"], state_dict["asked"]
