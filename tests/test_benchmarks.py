"""The benchmarks go with the code: each starts, and the one that looks deepest into a fit runs, at its smallest."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
import torch
from lightning_mmgen.callbacks import ConsistencyPenalty

from lightning_mmgen.cli import main

BENCHMARKS = [p for p in sorted((Path(__file__).parent.parent / "benchmarks").rglob("*.py")) if "__main__" in p.read_text()]


@pytest.mark.parametrize("script", BENCHMARKS, ids=lambda p: p.stem)
def test_it_says_what_it_measures(script: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(script.parent)
    monkeypatch.setattr("sys.argv", [str(script), "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(script), run_name="__main__")
    assert stop.value.code == 0 and f"usage: {script.name}" in capsys.readouterr().out


def test_the_steps_overhead_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    script = next(p for p in BENCHMARKS if p.stem == "step_overhead")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [str(script), "--pairs", "2"])
    runpy.run_path(str(script), run_name="__main__")
    assert "2 pairs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("files", "learning"),
    [
        (["instruct.yaml"], ["EMA", "CaptionTeacher"]),
        (["instruct.yaml", "overlays/toybox.yaml"], ["EMA", "CaptionTeacher"]),
        (["edit_alignment.yaml", "overlays/toybox.yaml", "overlays/toybox_edits.yaml"], ["EMA"]),
    ],
)
def test_claims_keep_what_a_recipe_learns_by_and_leave_out_the_rest(files: list[str], learning: list[str]) -> None:
    jobs = runpy.run_path(str(Path(__file__).parent.parent / "benchmarks/claims/jobs.py"))
    assert [c["class_path"] for c in jobs["learning"](files)] == learning


@pytest.mark.parametrize("terms", [{}, {"turns": 20.0}, {"weight": 0.1, "spatial": 10.0, "temporal": 10.0, "pixels": 150.0}])
def test_an_arm_of_the_penalty_has_its_own_terms_alone(terms: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    script = next(p for p in BENCHMARKS if p.parts[-2:] == ("claims", "edit.py"))
    monkeypatch.syspath_prepend(script.parent)
    edit = runpy.run_path(str(script))
    recipe = f"--trainer.callbacks={json.dumps(edit['learning'](edit['TOYBOX']))}"  # what fit gives before
    layers = [x for file in edit["TOYBOX"] for x in ("-c", str(script.parents[2] / "experiments" / file))]
    cli = main([*layers, recipe, *edit["penalised"](terms)], run=False)
    found = [c for c in cli.trainer.callbacks if isinstance(c, ConsistencyPenalty)]
    assert len(found) == bool(terms)
    for penalty in found:
        weights = {name: schedule.end for name, schedule in penalty.schedules.items()}
        assert {"weight": penalty.weight, **weights} == {"weight": 1.0, **dict.fromkeys(weights, 0.0)} | terms
        assert penalty.floor == 0.5


def test_a_training_that_was_stopped_goes_on(tmp_path: Path) -> None:
    jobs = runpy.run_path(str(Path(__file__).parent.parent / "benchmarks/claims/jobs.py"))
    few, small = ["instruct.yaml"], [jobs["UNTAUGHT"], f"{jobs['DATA']}.batch_size=2", f"{jobs['DATA']}.workers=0"]

    def after(runs: str, *steps: int) -> dict[str, torch.Tensor]:
        for k in steps:
            job = jobs["Job"]("after", 1, str(tmp_path / runs), k, 1, 1)
            module = jobs["fit"](job, few, small)
            assert jobs["steps_done"](job) == k
        return module.trainable()  # type: ignore[no-any-return]

    torch.testing.assert_close(after("stopped", 1, 3), after("whole", 3), rtol=0, atol=1e-6)
