"""SC, PQ and O of held-out tasks through the command line: those of the pictures that the model drew."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning_mmgen.callbacks import RatingsEvaluation, held_out, latest_scores
from lightning_mmgen.callbacks.ratings import SCORES

from lightning_mmgen.cli import main
from lightning_mmgen.data.images import pixels
from lightning_mmgen.data.sources import ToyboxSource
from lightning_mmgen.metrics import toybox_rating
from lightning_mmgen.pipeline import to_pil

EVALUATION = Path(__file__).parent.parent.parent / "experiments" / "eval" / "toybox.yaml"
SUITE = "{class_path: ToyboxSource, init_args: {tasks: {caption: 0.6, style: 0.4}, length: 8, held_out: true}}"


def evaluation(cli: Any) -> RatingsEvaluation:
    return next(c for c in cli.trainer.callbacks if isinstance(c, RatingsEvaluation))


def test_every_task_has_the_ratings_of_its_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    callbacks = "--trainer.callbacks={class_path: RatingsEvaluation, init_args: {count: 0}}"
    cli = main(["test", "-c", str(EVALUATION), f"--data.init_args.suite={SUITE}", "--model.init_args.sampler.steps=5", callbacks])
    printed, found = capsys.readouterr().out, evaluation(cli).before
    records, pictures = held_out(cli.trainer, cli.model, 0)
    rated = [toybox_rating(np.asarray(image), r.extra["truth"]) for image, r in zip(to_pil(pictures), records, strict=True)]
    for task in ("caption", "style"):
        sc, pq = np.array([one for one, r in zip(rated, records, strict=True) if r.task == task]).T
        expected = [sc.mean(), pq.mean(), (sc.mean() * pq.mean()) ** 0.5, np.sqrt(sc * pq).mean(), (sc == 1).mean(), len(sc)]
        assert [found[task][name] for name in (*SCORES, "pictures")] == pytest.approx(expected, abs=1e-6)
        assert latest_scores(cli.trainer)[f"ratings/sc/{task}"] == pytest.approx(sc.mean())
        assert f"{task:<18}{len(sc):>10}{sc.mean():>8.2f} ± " in printed
    assert set(found) == {"caption", "style"} and found["caption"]["sc"] > 0.5  # its base draws captions well
    means = [np.mean([found[task][name] for task in found]) for name in SCORES]
    assert f"{'mean of tasks':<28}" + "".join(f"{value:>15.2f}" for value in means) in printed and "O before" not in printed
    (file,) = Path("runs").rglob("evaluation/ratings.jsonl")
    assert [json.loads(line)["scores"] for line in file.read_text().splitlines()] == [{"sc": s, "pq": p} for s, p in rated]


def test_a_fit_is_rated_before_and_after_and_goes_on_with_what_was_before(
    experiment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    callback = json.dumps({"class_path": "RatingsEvaluation", "init_args": {"count": 2}})
    args = ["fit", "-c", str(experiment), f"--trainer.callbacks+={callback}", "--data.init_args.target_size=64"]
    first, second = (evaluation(main([*args, *more])) for more in ([], ["--trainer.max_steps=3", "--ckpt_path=last"]))
    assert first.before == second.before != {} and first.after is not first.before
    assert first.table().splitlines()[0].endswith("O before") and len(first.table().splitlines()) == 3


def test_a_rendered_target_has_all_and_another_world_is_refused() -> None:
    record, evaluation = ToyboxSource({"control": 1.0}, held_out=True).record(0), RatingsEvaluation()
    assert record.target is not None
    target = pixels(record.target)
    scores = evaluation.score(L.Trainer(accelerator="cpu", logger=False), [record, record], torch.stack([target, -target]))
    assert scores["sc"][0] == scores["pq"][0] == 1 and scores["sc"][1] < 1
    with pytest.raises(ValueError, match="RatingsEvaluation reads toybox pictures only"):
        evaluation.score(L.Trainer(accelerator="cpu", logger=False), [type(record)("a photo", (), record.target)], target[None])
