"""The benchmarks go with the code: each starts, and the one that looks deepest into a fit runs, at its smallest."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

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
        (["instruct.yaml", "overlays/toybox.yaml"], ["EMA", "CaptionTeacher"]),
        (["edit_alignment.yaml", "overlays/toybox.yaml", "overlays/toybox_edits.yaml"], ["EMA"]),
    ],
)
def test_claims_keep_what_a_recipe_learns_by_and_leave_out_the_rest(files: list[str], learning: list[str]) -> None:
    jobs = runpy.run_path(str(Path(__file__).parent.parent / "benchmarks/claims/jobs.py"))
    assert [c["class_path"] for c in jobs["_learning"](files)] == learning
