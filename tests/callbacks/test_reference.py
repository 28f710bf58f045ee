"""Likeness and probes of held-out pictures: what is scored, what disturbs nothing, and what is told in one line."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning_mmgen.callbacks import ReferenceEvaluation, held_out, sample
from lightning_mmgen.callbacks.held_out import gathered
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_mmgen.metrics import CopyPaste, ReferenceSimilarity
from lightning_mmgen.metrics.probes import hide
from lightning_mmgen.pipeline import MultimodalPipeline

from ..conftest import DROPOUT_ROWS
from .test_evaluation import fit, scalars


def reference(clip: Path, **more: Any) -> dict[str, Any]:
    return {"class_path": "ReferenceEvaluation", "init_args": {"every": 1, "count": 3, "clip": str(clip), "probes": 2, **more}}


def rows(run: str) -> list[dict[str, Any]]:
    text = (Path("runs") / run / "version_0" / "evaluation" / "reference.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def value(run: str, tag: str) -> float:
    events = EventAccumulator(str(Path("runs") / run / "version_0"))
    events.Reload()
    return float(events.Scalars(f"held_out/{tag}")[-1].value)


def test_likeness_and_probes_leave_no_trace_and_are_what_they_say(
    experiment: Path, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _, plain = fit(experiment, "plain", [], DROPOUT_ROWS)
    cli, looked = fit(experiment, "looked", [reference(clip, captions=True)], DROPOUT_ROWS)
    assert looked == plain and len(plain) == 3
    for name in ("clip_i", "clip_t", "copy_paste", "ignored_inside", "ignored_outside", "reworded", "scored", "bad_pictures"):
        assert scalars("looked", f"held_out/{name}") == [0, 1, 2, 3], name

    records, pictures = held_out(cli.trainer, cli.model, 3)
    last = [row for row in rows("looked") if row["step"] == 3]
    assert [row["id"] for row in last] == [r.id for r in records] and all(
        Path("runs/looked/version_0", r["picture"]).is_file() for r in last
    )
    for name, metric in {"clip_i": ReferenceSimilarity(str(clip)), "copy_paste": CopyPaste(str(clip))}.items():
        expected = metric.score(pictures, records).tolist()
        assert [row["scores"][name] for row in last] == pytest.approx(expected, abs=1e-5)
        assert value("looked", name) == pytest.approx(np.mean(expected), abs=1e-5)
    assert [sorted(k for k in row["scores"] if k.startswith(("ignored", "reworded"))) for row in last] == [
        ["ignored", "ignored_inside", "ignored_outside", "reworded"],
        ["ignored", "ignored_inside", "ignored_outside", "reworded"],
        [],
    ]

    ema = next(c for c in cli.trainer.callbacks if type(c).__name__ == "EMA")  # type: ignore[attr-defined]
    slot = 1 % len(records[1].references)
    cli.model.eval()
    with ema.swapped(cli.model):
        (again,) = sample(MultimodalPipeline.of(cli.model), [hide(records[1], slot)], side=16, places=[1])  # type: ignore[arg-type]
    assert last[1]["scores"]["ignored"] == pytest.approx(float((again - pictures[1]).abs().mean() / 2), abs=1e-6)

    (callback,) = (c for c in cli.trainer.callbacks if isinstance(c, ReferenceEvaluation))  # type: ignore[attr-defined]
    assert "each reference, CLIP-I" in callback.table() and "after" in callback.table() and "one word changed" in callback.table()


def test_a_budget_ends_an_evaluation_after_a_batch(experiment: Path, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fit(experiment, "run", [reference(clip, budget=0.0, batch_size=1, probes=0, every=0)], DROPOUT_ROWS, "--trainer.max_steps=1")
    assert value("run", "scored") == 1 and len(rows("run")) == 2  # before and after


def test_what_ranks_drew_comes_back_in_the_order_of_the_records() -> None:
    for world, count in ((1, 5), (2, 5), (2, 4), (3, 1)):
        shares = [[min(i, count - 1) for i in range(rank, -(-count // world) * world, world)] for rank in range(world)]
        assert len({len(share) for share in shares}) == 1  # or a sharded forward would wait for a rank that has none
        every = torch.tensor(shares, dtype=torch.float32)
        trainer: Any = SimpleNamespace(world_size=world, strategy=SimpleNamespace(all_gather=lambda _, e=every: e, root_device="cpu"))
        assert gathered(trainer, every[0], count).tolist() == list(range(count))


def test_a_picture_that_is_not_finite_is_a_row_and_a_count(
    experiment: Path, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    whole = MultimodalPipeline.draw

    def broken(self: MultimodalPipeline, *args: Any, **kwargs: Any) -> torch.Tensor:
        pictures = whole(self, *args, **kwargs)
        pictures[0] = torch.nan
        return pictures

    monkeypatch.setattr(MultimodalPipeline, "draw", broken)
    fit(experiment, "run", [reference(clip, every=0, probes=0)], DROPOUT_ROWS, "--trainer.max_steps=1")
    assert value("run", "bad_pictures") == 1 and value("run", "scored") == 2 and np.isfinite(value("run", "clip_i"))
    assert [bool(row["scores"]) for row in rows("run")] == [False, True, True] * 2 and rows("run")[0]["picture"] is None


@pytest.mark.parametrize("wrong", ["model", "empty", "unreadable"])
def test_what_is_wrong_is_told_in_one_line_before_a_step(
    wrong: str, experiment: Path, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    args, message, more = [], "./nowhere: no such folder", {"dino": "./nowhere"} if wrong == "model" else {}
    if wrong == "empty":
        args, message = ["--data.init_args.held_out=null"], "ReferenceEvaluation: there are no held-out records"
    if wrong == "unreadable":
        (tmp_path / "a.png").write_bytes(b"nothing")
        Path("held.jsonl").write_text(json.dumps({"instruction": "a cat", "target": "a.png"}) + "\n")
        args, message = ["--data.init_args.held_out=held.jsonl"], "held-out row 1: a.png: not a picture"
    with pytest.raises((OSError, ValueError), match=message) as caught:
        fit(experiment, "run", [reference(clip, **more)], DROPOUT_ROWS, *args)
    assert "\n" not in str(caught.value)
