"""What the LightningModules share: learning rates by optimizer step."""

from __future__ import annotations

import pytest

from lightning_mmgen.tuning import LRSchedule


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        (LRSchedule(warmup=4), [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]),
        (LRSchedule(warmup=2, decay="linear"), [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]),
        (LRSchedule(decay="cosine", floor=0.1), [1.0, 0.9397, 0.775, 0.55, 0.325, 0.1603]),
        (LRSchedule(decay="step", gamma=0.5, every=2), [1.0, 1.0, 0.5, 0.5, 0.25, 0.25]),
    ],
    ids=["constant", "linear", "cosine", "step"],
)
def test_schedule(schedule: LRSchedule, factors: list[float]) -> None:
    assert [schedule.factor(i, 6) for i in range(6)] == pytest.approx(factors, abs=1e-4)


def test_a_decay_by_steps_needs_their_number() -> None:
    with pytest.raises(ValueError, match="schedule.every"):
        LRSchedule(decay="step")
