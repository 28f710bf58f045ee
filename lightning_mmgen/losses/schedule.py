"""Weights of loss terms that change in training."""

from __future__ import annotations

import math
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


@dataclass
class ExponentialSchedule:
    """A weight that decays from ``start``: start exp(-rate t / steps) at optimizer step t (Lavender's lambda exp(-f t / T))."""

    start: float
    rate: float
    steps: int

    def __post_init__(self) -> None:
        if self.steps < 1 or self.rate < 0:
            raise ValueError(f"ExponentialSchedule: steps must be 1 or more and rate 0 or more, not {self.steps} and {self.rate}")

    def at(self, step: int) -> float:
        """The weight at an optimizer step, counted from 0."""
        return self.start * math.exp(-self.rate * step / self.steps)
