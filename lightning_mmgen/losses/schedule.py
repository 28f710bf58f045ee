"""Weights of loss terms that change in training."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class LinearSchedule:
    """A weight that goes from ``start`` to ``end`` in ``steps`` optimizer steps, and stays there."""

    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"LinearSchedule: steps must be 1 or more, not {self.steps}")

    def at(self, step: int) -> float:
        """The weight at an optimizer step, counted from 0."""
        return self.start + (self.end - self.start) * min(step / self.steps, 1.0)
