from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image as PILImage

from lightning_mmgen.build.synthetic import Pair, cross
from lightning_mmgen.data.sources import JSONLSource
from lightning_mmgen.metrics import PickScore
from lightning_mmgen.tools.data import check
from lightning_mmgen.tools.main import main

from .conftest import interrupt

CONTENTS, STYLES = ["a red cat", "a blue box", "a star on a box"], ["green", "red", "blue blue"]


@pytest.fixture
def arguments(painter: Path, clip: Path, tmp_path: Path) -> list[str]:
    """A build of all nine pairs; what comes later in the list wins."""
    (tmp_path / "contents.txt").write_text("\n".join([*CONTENTS, "", CONTENTS[0]]))
    (tmp_path / "styles.txt").write_text("\n".join(STYLES) + "\n")
    files = ["--contents", str(tmp_path / "contents.txt"), "--styles", str(tmp_path / "styles.txt")]
    small = ["--dtype", "float32", "--steps", "2", "--batch-size", "2", "--seed", "3", "--device", "cpu"]
    return ["build", "synthetic", *files, "--model", str(painter), "--pickscore", str(clip), *small, "--out", str(tmp_path / "out")]


def contents_of(out: Path) -> dict[str, tuple[str, bytes]]:
    """Caption and pixels of each record by its id."""
    rows = [(r, PILImage.open(out / str(r.target))) for r in JSONLSource(str(out / "records.jsonl"))]
    return {r.id: (r.instruction, picture.tobytes()) for r, picture in rows}


def test_every_content_is_drawn_in_every_style_with_noise_of_its_own(arguments: list[str], painter: Path, tmp_path: Path) -> None:
    assert main(arguments) == 0
    out = tmp_path / "out"
    records = list(JSONLSource(str(out / "records.jsonl")))
    assert {r.instruction for r in records} == {f"{content}, {style}" for content in CONTENTS for style in STYLES}
    assert {r.task for r in records} == {"synthetic"} and all(r.caption == r.instruction for r in records)
    assert len({pixels for _, pixels in contents_of(out).values()}) == 9
    assert check(str(out / "records.jsonl")) == 0
    pipe = StableDiffusionPipeline.from_pretrained(painter)
    pipe.set_progress_bar_config(disable=True)
    pair = Pair((1, 2), CONTENTS[1], STYLES[2])
    alone = pipe(pair.caption, num_inference_steps=2, generator=torch.Generator().manual_seed(pair.seed(3))).images[0]
    drawn = PILImage.open(out / "pictures" / f"{pair.name}.png")
    np.testing.assert_allclose(np.asarray(alone, int), np.asarray(drawn, int), atol=1)


def test_pictures_under_the_least_score_are_dropped(
    arguments: list[str], clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(arguments)
    out, scorer, scores = tmp_path / "out", PickScore(str(clip)), {}
    for r in JSONLSource(str(out / "records.jsonl")):
        picture = torch.from_numpy(np.array(PILImage.open(out / str(r.target)))).permute(2, 0, 1)[None] / 127.5 - 1
        scores[r.id] = float(scorer.score(picture, [r.instruction]))
    low, middle = sorted(scores.values())[3:5]
    capsys.readouterr()
    assert main([*arguments, "--out", str(tmp_path / "high"), "--min-pickscore", str((low + middle) / 2)]) == 0
    assert set(contents_of(tmp_path / "high")) == {name for name, score in scores.items() if score >= middle}
    counts = json.loads((tmp_path / "high" / "counts.json").read_text())
    assert counts == {"drawn": 9, "kept": 5, "under --min-pickscore": 4}
    assert f"50% below {np.median(list(scores.values())):.3g}" in capsys.readouterr().out


def test_shards_and_a_stopped_build_give_the_pictures_of_one_run(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    main(arguments)
    whole = contents_of(tmp_path / "out")
    for shard in ("1/2", "0/2"):
        assert main([*arguments, "--out", str(tmp_path / "shards"), "--shard", shard]) == 0
    interrupt(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        main([*arguments, "--out", str(tmp_path / "stopped")])
    monkeypatch.undo()
    assert len((tmp_path / "stopped" / "journal.jsonl").read_text().splitlines()) == 1 + 2
    assert main([*arguments, "--out", str(tmp_path / "stopped")]) == 0
    assert contents_of(tmp_path / "shards") == contents_of(tmp_path / "stopped") == whole and len(whole) == 9


def test_few_styles_a_content_are_different_and_balanced() -> None:
    contents, styles = [f"c{i}" for i in range(40)], [f"s{i}" for i in range(7)]
    pairs = cross(contents, styles, 3, seed=1)
    assert pairs == cross(contents, styles, 3, seed=1) != cross(contents, styles, 3, seed=2)
    assert Counter(p.content for p in pairs) == dict.fromkeys(contents, 3)
    assert len({(p.content, p.style) for p in pairs}) == 120
    uses = Counter(p.style for p in pairs)
    assert set(uses.values()) == {17, 18}
    together = {frozenset(p.style for p in pairs[i : i + 3]) for i in range(0, 120, 3)}
    assert len(together) > 15  # of 35: not always the same styles


def test_a_pictures_seed_depends_on_its_words_alone() -> None:
    assert Pair((0, 0), "a cat", "red").seed(1) == Pair((5, 7), "a cat", "red").seed(1)
    seeds = {Pair((0, 0), c, s).seed(k) for c in ("a", "a, b") for s in ("b, c", "c") for k in (0, 1)}
    assert len(seeds) == 8


def test_blank_pictures_are_counted_and_long_captions_too(arguments: list[str], painter: Path, tmp_path: Path) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(painter)
    pipe.vae.decoder.conv_out.weight.data.fill_(float("nan"))
    pipe.save_pretrained(tmp_path / "broken")
    (tmp_path / "styles.txt").write_text("green " * 12)
    assert main([*arguments, "--model", str(tmp_path / "broken"), "--pickscore", ""]) == 0
    counts = json.loads((tmp_path / "out" / "counts.json").read_text())
    assert counts == {"drawn": 3, "blank": 3, "captions that the text encoder cut": 3}
    assert not list((tmp_path / "out").rglob("*.png"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--styles-per-content", "4"], "--styles-per-content 4: there are 3 styles"),
        (["--styles-per-content", "0"], "--styles-per-content must be 1 or more"),
        (["--contents", "gone.txt"], "gone.txt: no such file"),
        (["--model", "./gone"], "./gone: no such folder"),
        (["--pickscore", "", "--min-pickscore", "20"], "--min-pickscore needs a --pickscore"),
        (["--batch-size", "0"], "--batch-size must be 1 or more"),
        (["--shard", "2/2"], "--shard '2/2'"),
    ],
)
def test_wrong_arguments_are_one_line(arguments: list[str], changes: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*arguments, *changes]) == 1
    assert message in capsys.readouterr().err


def test_a_line_with_a_marker_or_no_line_is_refused_by_its_place(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for text, message in (("red\na [ref#1] style", "styles.txt:2: holds a [ref#k] marker"), ("\n \n", "styles.txt: holds no lines")):
        (tmp_path / "styles.txt").write_text(text)
        assert main(arguments) == 1
        assert message in capsys.readouterr().err
