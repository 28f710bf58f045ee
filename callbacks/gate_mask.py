"""The edit's mask teaches the source gate where the source stays."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from lightning import LightningModule, Trainer
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from lightning_mmgen.losses import DenoisingStep, LossTerm, counted_mean, touched

if TYPE_CHECKING:
    from lightning_mmgen.module import MultimodalDiffusion


class GateMask(LossTerm):
    """Asks the source gate (:class:`~lightning_mmgen.models.source_gate.SourceGate`) to keep what lies outside an edit's mask:

        L = L_0 + weight E BCE(g, 1 - m)

    with the mask m, given or derived, of the latents that it touches. The diffusion loss teaches the same by the pictures alone, but where
    an instruction points to is learned many times slower from them (our choice). Samples that are no edit, or whose source was dropped, add
    nothing.

    Raises:
        ValueError: a weight of 0 or below; a module without a source gate.
    """

    def __init__(self, weight: float = 1.0) -> None:
        if weight <= 0:
            raise ValueError(f"GateMask: weight must be above 0, not {weight}")
        super().__init__(weight)
        self.logits: Tensor | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.module = cast("MultimodalDiffusion", pl_module)

    @contextmanager
    def watching(self, module: LightningModule) -> Iterator[None]:
        """Keep the gate's logits."""
        if self.module.source_gate is None:
            raise ValueError("GateMask: model.source_gate: true is needed")
        hook = self.module.source_gate.conv.register_forward_hook(self._see)
        try:
            yield
        finally:
            hook.remove()

    def _see(self, conv: Any, inputs: Any, logits: Tensor) -> None:
        self.logits = logits

    def compute(self, step: DenoisingStep) -> dict[str, Tensor]:
        logits, self.logits, edit = self.logits, None, step.batch.edits
        assert logits is not None
        keep = 1 - touched(edit.mask, (logits.shape[-2], logits.shape[-1]))
        each = binary_cross_entropy_with_logits(logits.float(), keep.expand_as(logits), reduction="none").mean(dim=(1, 2, 3))
        return {"gate": counted_mean(each, edit.visible)}
