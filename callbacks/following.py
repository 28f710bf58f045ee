"""Instruction following and object consistency on the toybox's held-out instructions, before and after."""

from __future__ import annotations

from typing import Any

from lightning import LightningModule, Trainer

from lightning_mmgen.metrics.following import ToyboxFollowing

from .held_out import HeldOutCallback, held_out
from .rows import log_scores, write_rows


class FollowingEvaluation(HeldOutCallback):
    """Lets the oracle read the pictures of held-out toybox instructions; prints a table of before and after at the end.

    Args:
        every: optimizer steps between evaluations; 0 for before and after only.
        count: held-out instructions.
    """

    def __init__(self, every: int = 0, count: int = 64) -> None:
        super().__init__(every, count)
        self.before: dict[str, float] = {}
        self.after: dict[str, float] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.before = self.before or self._evaluate(trainer, pl_module)

    def look(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.after = self._evaluate(trainer, pl_module)

    def _evaluate(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        records, pictures = looked = held_out(trainer, pl_module, self.count)
        if not records or any("truth" not in r.extra for r in records):
            raise ValueError("FollowingEvaluation reads toybox pictures only: data.held_out must be a ToyboxSource")
        metric = ToyboxFollowing()
        rows = metric.score(pictures, [record.extra["truth"] for record in records])
        metric.include(rows)
        write_rows(trainer, "following", looked, rows)
        scores = {k: float(v) for k, v in metric.compute().items()}
        log_scores(trainer, {f"held_out/{k}": v for k, v in scores.items() if not k.endswith("_ci")})
        return scores

    def table(self) -> str:
        """Before and after, with 95 % confidence intervals."""
        if not self.after:
            return ""
        lines = [f"{'held-out instructions: ' + str(self.count):<28}{'before':>16}{'after':>16}"]
        names = {
            "following": "instruction following",
            "strict": "all conditions met",
            "consistency": "object consistency",
            "success": "edits brought about",
        }
        for key, name in names.items():
            if key in self.after:
                cells = [f"{s[key]:.3f} ± {s[key + '_ci']:.3f}" if key in s else "-" for s in (self.before, self.after)]
                lines.append(f"{name:<28}{cells[0]:>16}{cells[1]:>16}")
        return "\n".join(lines)

    def state_dict(self) -> dict[str, Any]:
        return {"before": self.before}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.before = state_dict["before"]
