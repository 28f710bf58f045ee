"""Loss terms that an experiment switches on in its YAML: each is a callback."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

from lightning import LightningModule
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from ..batch import Batch, Condition, QuestionBatch
from ..models.encoder import Prompts


class DenoisingStep(NamedTuple):
    """What one training step knows. Latents are [b, c, h, w], timesteps [b]; ``source``: of what edits start from, if there are any."""

    batch: Batch
    condition: Condition
    z0: Tensor
    z_t: Tensor
    timesteps: Tensor
    noise: Tensor
    prediction: Tensor
    z0_hat: Tensor
    source: Tensor | None = None


class AnsweringStep(NamedTuple):
    """What one step of a VLM's fine-tuning knows.

    Attributes:
        batch: the questions.
        prompts: prompts and answers, as the language model has read them.
        tokens: [b, n], their token ids.
        answered: [b, n], True for the tokens of the answer; token i is predicted in row i - 1.
        logits: [b, n, vocabulary]; zeros where the prompts were packed and a token is padding.
    """

    batch: QuestionBatch
    prompts: Prompts
    tokens: Tensor
    answered: Tensor
    logits: Tensor


class LossTerm(Callback, ABC):
    """A callback that adds named terms to the loss; each is logged under ``loss/<name>``.

    A term with nothing to say returns a zero that is connected to the graph (``step.prediction.sum() * 0``).

    Args:
        weight: factor of every term of this callback.
    """

    def __init__(self, weight: float = 1.0) -> None:
        self.weight = weight

    def parts(self, module: LightningModule) -> dict[str, nn.Module]:
        """Modules of the term's own, by the names that the parameter table uses; asked for once the module has built its parts."""
        return {}

    def start_from(self, state: dict[str, Any]) -> None:
        """A fit starts from another run's weights: take over what goes on of this term's ``state`` there, empty if it had none."""

    def clean(self, batch: Batch, z0: Tensor, source: Tensor | None) -> Tensor:
        """The latents that the step noises and the UNet is to find, in place of ``z0``; a term that changes them says so here."""
        return z0

    def watching(self, module: LightningModule) -> AbstractContextManager[None]:
        """Open around the forward pass of each step, for a term that looks into it."""
        return nullcontext()

    @abstractmethod
    def compute(self, step: Any) -> dict[str, Tensor]:
        """The terms, each a scalar, unweighted; the step is of the kind that the module takes."""
