"""Answers to held-out questions, before and after."""

from __future__ import annotations

from lightning import LightningModule, Trainer

from lightning_mmgen.data.questions import VQADataModule

from .ema import evaluation
from .scoring import Evaluation


def exact_match(said: str, right: str) -> bool:
    """Whether two answers are the same words, whatever their case, their spaces and a full stop at the end."""
    one, other = (" ".join(text.casefold().split()).removesuffix(".") for text in (said, right))
    return one == other


class AnswerEvaluation(Evaluation):
    """The share of held-out questions that the model answers word for word (greedily), as ``held_out/accuracy``.

    Args:
        every: optimizer steps between evaluations; 0 for before and after only.
        count: held-out questions.
        batch_size: questions at a time.
    """

    heading = "held-out questions: {}"
    titles = {"accuracy": "answered word for word"}

    def __init__(self, every: int = 0, count: int = 128, batch_size: int = 32) -> None:
        super().__init__(every, count)
        self.batch_size = batch_size

    def look(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, VQADataModule) or data.held_out is None:
            raise ValueError("AnswerEvaluation asks held-out questions: data must be a VQADataModule with held_out")
        right: list[float] = []
        with evaluation(trainer, pl_module):
            for batch in data.held_out_batches(2 if trainer.fast_dev_run else self.count, self.batch_size):  # type: ignore[attr-defined]
                said = pl_module.answer(pl_module.transfer_batch_to_device(batch, pl_module.device, 0))  # type: ignore[operator]
                right += [float(exact_match(*pair)) for pair in zip(said, batch.answers, strict=True)]
        self.tell(trainer, {"accuracy": right})
