"""A page of run folders that were written here: whole, of another logger, of another version, and broken."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from lightning_mmgen.tools.main import main
from lightning_mmgen.tools.report import Page, mean
from lightning_mmgen.tools.runs import find_run, read_run

TABLE = """module   training       learning rate  trainable  parameters
------------------------------------------------------------
adapter  fully trained          {rate}     10,000      10,000
unet     not trained                -          0     500,000
"""


def row(step: int, i: int, score: float, **more: Any) -> dict[str, Any]:
    base = {"step": step, "id": f"r{i}", "task": "subject" if i % 2 else "style", "instruction": f"draw <b>{i}</b>", "picture": f"{i}.png"}
    return {**base, "references": [f"{i}.png"], "target": None, "scores": {"clip_i": score, "drift_mse": 1 - score}, **more}


def write_run(folder: Path, scores: list[float], rate: str = "1e-05", csv: bool = False) -> Path:
    """A run of two evaluations, the second with ``scores``."""
    (folder / "evaluation").mkdir(parents=True)
    rows = [row(0, i, 0.0) for i in range(len(scores))] + [row(20, i, s) for i, s in enumerate(scores)]
    (folder / "evaluation" / "reference.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    for i in range(len(scores)):
        Image.new("RGB", (8, 8), (i * 20, 0, 0)).save(folder / f"{i}.png")
    (folder / "config.yaml").write_text(f"model: {{lr: {rate}, name: same}}\n")
    (folder / "parameters.txt").write_text(TABLE.format(rate=rate))
    (folder / "run.json").write_text(json.dumps({"seed": 7, "revision": "abc", "packages": {"torch": "2"}}))
    if csv:
        (folder / "metrics.csv").write_text("loss,step,throughput/hours\n0.5,9,\n0.25,19,0.5\n")
    else:
        with SummaryWriter(str(folder)) as writer:
            for step, value in ((9, 0.75), (19, 0.125)):
                writer.add_scalar("loss", value, step)
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    a = write_run(tmp_path / "a" / "version_1", [0.1, 0.2, 0.3, 0.4, 0.9])
    b = write_run(tmp_path / "b", [0.3, 0.4, 0.5, 0.6, 0.8], rate="3e-05", csv=True)
    return [a.parent, b]


def page(runs: list[Path], *args: str) -> str:
    out = runs[0].parent / "page.html"
    assert main(["report", *map(str, runs), "--out", str(out), *args]) == 0
    return out.read_text()


def test_scores_are_of_the_last_step_and_differences_are_paired(runs: list[Path]) -> None:
    read = [read_run(run) for run in runs]
    assert find_run(runs[0]).name == "version_1" and read[0].name == "a/version_1" and read[0].notes == []
    (clip, drift) = Page(read, 16, "clip_i").table()
    assert [m.mean for m in clip[1] if m] == pytest.approx([0.38, 0.52]) and clip[0] == "clip_i" and drift[0] == "drift_mse"
    (paired,) = clip[2]
    assert paired is not None and paired.mean == pytest.approx(0.14) and paired.n == 5
    picks = np.random.default_rng(1).integers(5, size=(4000, 5))  # a bootstrap of its own
    low, high = np.percentile(np.array([0.2, 0.2, 0.2, 0.2, -0.1])[picks].mean(1), [2.5, 97.5])
    assert paired.half == pytest.approx((high - low) / 2, abs=0.02)
    assert mean([]) is None and np.isnan(mean([1.0]).half)  # type: ignore[union-attr]


def test_cases_tasks_curves_and_differences(runs: list[Path]) -> None:
    first = Page([read_run(run) for run in runs], 16, "clip_i")
    assert [c.id for c in first.extremes(first.runs[0], best=True, count=2)] == ["r4", "r3"]
    lowest = Page(first.runs, 16, "drift_mse").extremes(first.runs[0], best=True, count=2)
    assert [c.id for c in lowest] == ["r4", "r3"]  # where a lower score is better
    ((_, cells, average), _) = first.by_task("clip_i")
    assert first.tasks == ["style", "subject"] and [c.mean for c in cells if c] == pytest.approx([1.3 / 3, 0.3])
    assert average == pytest.approx((1.3 / 3 + 0.3) / 2)
    assert first.runs[0].curves["loss"] == [(9, 0.75), (19, 0.125)] and first.runs[1].curves["loss"] == [(9, 0.5), (19, 0.25)]
    assert list(first.differences()) == [("model.lr", ["1e-05", "3e-05"])]
    assert dict(first.parameters())["adapter"] == [("fully trained", rate, "10,000", "10,000") for rate in ("1e-05", "3e-05")]
    assert dict(first.cost())["hours"] == ["-", "0.5"]


def test_the_page_is_self_contained_and_escapes_what_it_shows(runs: list[Path]) -> None:
    text = page(runs)
    assert "draw &lt;b&gt;0&lt;/b&gt;" in text and "<b>0</b>" not in text and "&lt;img" not in text
    assert not re.search(r"""(src|href)=["'](?!data:)""", text) and "<script" not in text
    assert text.count("data:image/png;base64,") >= 2 * 5 and text.count("<svg") >= 3
    assert len(re.findall(r"<polyline", text)) == 2  # the loss of both in one chart
    assert "Best and worst by drift_mse" in page(runs, "--score", "drift_mse")


def test_people_s_ratings_are_those_that_all_raters_gave(runs: list[Path]) -> None:
    folder = runs[1] / "ratings"
    folder.mkdir()
    (folder / "ann.tsv").write_text("uid\tb\nr0\t[1, 0.5]\nr1\t[0.5, 1]\nr2\t[0, 1]\n")
    (folder / "bob.tsv").write_text("uid\tb\nr1\t[0.5, 0.5]\nr0\t[1, 1]\n")
    run = read_run(runs[1])
    scores = Page([run], 16, "clip_i").rated(run)
    assert scores is not None and scores["n"] == 2 and scores["sc"] == 0.75 and scores["pq"] == 0.75
    assert scores["accuracy"] == 0.5 and Page([run], 16, None).rated(run, "subject")["sc"] == 0.5  # type: ignore[index]
    assert "ann, bob" in page(runs) and "2 of 5" in page(runs)


def test_what_is_missing_or_broken_is_told_in_the_page(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = find_run(runs[0]), runs[1]
    empty = tmp_path / "empty"
    empty.mkdir()
    (b / "config.yaml").write_text("a: [")
    (b / "parameters.txt").write_text("another table\n")
    (b / "run.json").write_text("[]")
    (b / "metrics.csv").write_text("loss,step\nmany,1\n")
    (b / "1.png").write_bytes(b"no picture")
    (b / "ratings").mkdir()
    (b / "ratings" / "ann.tsv").write_text("uid\tb\nr0\t[2, 1]\n")
    with (b / "evaluation" / "reference.jsonl").open("a") as file:
        file.write(
            '{"step": 20}\nnot json\n[]\n'
            + json.dumps(row(20, 3, 0.8, picture=3))
            + "\n"
            + json.dumps(row(20, 4, 0.8, picture=None))
            + "\n"
        )
    with (a / "evaluation" / "other.jsonl").open("w") as file:
        file.write(json.dumps(row(10, 0, 0.5, scores={"older": 1.0, "none": None})) + "\n")
    text = page([*runs, empty])
    for told in (
        "b: reference.jsonl: 4 rows cannot be read",
        "b: config.yaml: cannot be read",
        "b: parameters.txt: cannot be read (ValueError: not a parameter table)",
        "b: run.json: cannot be read",
        "b: curves: cannot be read",
        "b: ratings: cannot be read (ValueError: ",
        "empty: evaluation: no rows",
        "empty: curves: not there",
        "a/version_1: evaluations of different steps: other 10, reference 20",
        ">unreadable<",
        ">no picture<",
    ):
        assert told in text, told
    assert "0.140" in text  # the two whole ones are compared all the same
    assert main(["report", str(tmp_path / "nowhere"), "--out", str(tmp_path / "x.html")]) == 1
    assert main(["report", str(a), "--out", str(tmp_path / "x.html"), "--score", "beauty"]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: --score beauty: no run has it; there are older, clip_i")
    assert main(["report", str(empty), "--out", str(tmp_path / "x.html")]) == 0
