"""Likeness and probes of held-out pictures: what is scored, what disturbs nothing, and what is told in one line."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from lightning import Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning_mmgen.callbacks import HeldOut, ReferenceEvaluation, held_out, latest_scores, sample
from lightning_mmgen.callbacks.held_out import gathered
from PIL import Image
from scipy.linalg import sqrtm
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_mmgen.data.datamodule import MultimodalDataModule
from lightning_mmgen.data.images import crop_square, pixels
from lightning_mmgen.metrics import CopyPaste, ReferenceSimilarity
from lightning_mmgen.metrics.probes import hide
from lightning_mmgen.models.features import Features
from lightning_mmgen.pipeline import MultimodalPipeline

from ..conftest import DROPOUT_ROWS
from .test_evaluation import fit


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "evaluation" / "reference.jsonl").read_text().splitlines()]


class Looked(NamedTuple):
    """A run of two steps with an evaluation at each; its folder, and the losses with and without."""

    cli: Any
    run: Path
    losses: list[str]
    plain: list[str]


@pytest.fixture(scope="module")
def looked(experiment: Path, clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Looked:
    folder = tmp_path_factory.mktemp("looked")
    given = {"every": 1, "count": 3, "clip": str(clip), "captions": True, "probes": 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MMGEN_ALLOW", "tests")
        _, plain = fit(experiment, "plain", [], DROPOUT_ROWS, "--trainer.max_steps=2")
        callback = {"class_path": "ReferenceEvaluation", "init_args": given}
        cli, losses = fit(experiment, "looked", [callback], DROPOUT_ROWS, "--trainer.max_steps=2")
    return Looked(cli, folder / "runs" / "looked" / "version_0", losses, plain)


def look(looked: Looked, out: Path, data: MultimodalDataModule | None = None, **given: Any) -> dict[str, float]:
    """What an evaluation without probes says of the model, before a step of another run in ``out``."""
    trainer = Trainer(accelerator="cpu", logger=CSVLogger(str(out), "", ""), enable_checkpointing=False, enable_progress_bar=False)
    trainer.datamodule = data or looked.cli.datamodule  # type: ignore[attr-defined]
    callback = ReferenceEvaluation(**{"count": 3, "probes": 0, **given})
    callback.setup(trainer, looked.cli.model, "fit")
    callback.on_train_start(trainer, looked.cli.model)
    return latest_scores(trainer)


def test_likeness_and_probes_leave_no_trace_and_are_what_they_say(looked: Looked, clip: Path) -> None:
    cli, run = looked.cli, looked.run
    assert looked.losses == looked.plain and len(looked.plain) == 2
    events = EventAccumulator(str(run))
    events.Reload()
    for name in ("clip_i", "clip_t", "copy_paste", "ignored_inside", "ignored_outside", "reworded", "scored", "bad_pictures"):
        assert [e.step for e in events.Scalars(f"held_out/{name}")] == [0, 1, 2], name

    records, pictures = held_out(cli.trainer, cli.model, 3)
    last = [row for row in rows(run) if row["step"] == 2]
    assert [row["id"] for row in last] == [r.id for r in records] and all((run / r["picture"]).is_file() for r in last)
    for name, metric in {"clip_i": ReferenceSimilarity(str(clip)), "copy_paste": CopyPaste(str(clip))}.items():
        expected = metric.score(pictures, records).tolist()
        assert [row["scores"][name] for row in last] == pytest.approx(expected, abs=1e-5)
        assert events.Scalars(f"held_out/{name}")[-1].value == pytest.approx(np.mean(expected), abs=1e-5)
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


def test_a_budget_ends_an_evaluation_after_a_batch(looked: Looked, clip: Path, tmp_path: Path) -> None:
    scores = look(looked, tmp_path, clip=str(clip), budget=0.0, batch_size=1)
    assert scores["held_out/scored"] == 1 and len(rows(tmp_path)) == 1


def test_a_swapped_reference_is_of_another_part_or_another_subject(looked: Looked, clip: Path, tmp_path: Path) -> None:
    for name, size in (("one", 1), ("all", 3)):
        look(looked, tmp_path / name, clip=str(clip), probes=3, hiding="swap", batch_size=size)
    alone, together = ([row["scores"]["ignored"] for row in rows(tmp_path / name)] for name in ("one", "all"))
    assert len(alone) == 3 and min(alone) > 0 and alone == pytest.approx(together, abs=1e-6)

    lines = []
    for i, name in enumerate("aaba"):  # one subject again and again, and one other
        Image.new("RGB", (16, 16), "red" if name == "a" else "blue").save(tmp_path / f"{name}.png")
        lines.append({"instruction": f"[ref#1] toy {i}", "references": [{"marker": 1, "phrase": "toy", "image": f"{name}.png"}]})
    (tmp_path / "held.jsonl").write_text("".join(json.dumps({**line, "target": "a.png"}) + "\n" for line in lines))
    data = MultimodalDataModule("toybox", str(tmp_path / "held.jsonl"), target_size=16, reference_size=16)
    data.setup("fit")
    trainer: Any = SimpleNamespace(datamodule=data, fast_dev_run=False)
    part = HeldOut(data.held_out_records(2), torch.zeros(2, 3, 16, 16))
    hidden = ReferenceEvaluation(count=4, hiding="swap")._hidden(trainer, 0, part, [0, 1])
    assert [record.references[slot].image.getpixel((0, 0)) for slot, record in hidden.values()] == [(0, 0, 255)] * 2  # type: ignore[union-attr]


def test_fid_and_kid_are_of_all_pictures_and_their_targets_on_any_number_of_ranks(looked: Looked, clip: Path, tmp_path: Path) -> None:
    scores = look(looked, tmp_path, clip=str(clip), distribution=str(clip), batch_size=2)
    records, pictures = part = held_out(looked.cli.trainer, looked.cli.model, 3)
    callbacks = [ReferenceEvaluation(clip=str(clip), distribution=str(clip)) for _ in range(2)]
    for rank, callback in enumerate(callbacks):
        callback.setup(looked.cli.trainer, looked.cli.model, "test")
        callback._compare(SimpleNamespace(global_rank=rank, world_size=2), torch.device("cpu"), part, range(3))  # type: ignore[arg-type]
    features = Features(str(clip))
    real = torch.stack([crop_square(pixels(r.target), 16) for r in records])  # type: ignore[arg-type]
    a, b = (features(group).double().numpy() for group in (pictures, real))
    root = sqrtm(np.cov(a.T) @ np.cov(b.T)).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
    first, second = (callback.distances["fid"] for callback in callbacks)
    first.merge_state(second)
    assert float(first.compute()) == pytest.approx(expected, rel=1e-2)
    assert np.isfinite(scores["held_out/fid"]) and np.isfinite(scores["held_out/kid"])


def test_what_ranks_drew_comes_back_in_the_order_of_the_records() -> None:
    for world, count in ((1, 5), (2, 5), (2, 4), (3, 1)):
        shares = [[min(i, count - 1) for i in range(rank, -(-count // world) * world, world)] for rank in range(world)]
        assert len({len(share) for share in shares}) == 1  # or a sharded forward would wait for a rank that has none
        every = torch.tensor(shares, dtype=torch.float32)
        trainer: Any = SimpleNamespace(world_size=world, strategy=SimpleNamespace(all_gather=lambda _, e=every: e, root_device="cpu"))
        assert gathered(trainer, every[0], count).tolist() == list(range(count))


def test_a_picture_that_is_not_finite_is_a_row_and_a_count(
    looked: Looked, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = MultimodalPipeline.draw

    def broken(self: MultimodalPipeline, *args: Any, **kwargs: Any) -> torch.Tensor:
        pictures = whole(self, *args, **kwargs)
        pictures[0] = torch.nan
        return pictures

    monkeypatch.setattr(MultimodalPipeline, "draw", broken)
    scores = look(looked, tmp_path, clip=str(clip))
    assert scores["held_out/bad_pictures"] == 1 and scores["held_out/scored"] == 2 and np.isfinite(scores["held_out/clip_i"])
    assert [bool(row["scores"]) for row in rows(tmp_path)] == [False, True, True] and rows(tmp_path)[0]["picture"] is None


@pytest.mark.parametrize("wrong", ["model", "empty", "unreadable"])
def test_what_is_wrong_is_told_in_one_line_before_a_step(wrong: str, looked: Looked, clip: Path, tmp_path: Path) -> None:
    message = {
        "model": "./nowhere: no such folder",
        "empty": "ReferenceEvaluation: there are no held-out records",
        "unreadable": "held-out row 1: a.png: not a picture",
    }[wrong]
    (tmp_path / "a.png").write_bytes(b"nothing")
    (tmp_path / "held.jsonl").write_text(json.dumps({"instruction": "a cat", "target": "a.png"}) + "\n")
    data = MultimodalDataModule("toybox", None if wrong == "empty" else str(tmp_path / "held.jsonl"), target_size=16, reference_size=16)
    data.setup("fit")
    with pytest.raises((OSError, ValueError), match=message) as caught:
        look(looked, tmp_path, data, clip=str(clip), dino="./nowhere" if wrong == "model" else None)
    assert "\n" not in str(caught.value)
