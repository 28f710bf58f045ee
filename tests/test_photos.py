"""Photographs as people have them: every mode and size, upright or not, whole or not; from a folder to a few steps of training."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lightning.pytorch.cli import LightningCLI
from PIL import Image as PILImage
from PIL.Image import Image
from skimage import data
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_mmgen.cli import main
from lightning_mmgen.data.images import open_picture
from lightning_mmgen.prompt import RecordError
from lightning_mmgen.tools.main import main as mmgen

ROWS = 30


def save(photo: Image, kind: int, folder: Path, name: str) -> str:
    """Write a photograph in the ``kind``-th of the ways that people write them."""
    if kind == 0:
        photo.save(path := folder / f"{name}.jpg", quality=90)
    elif kind == 1:
        photo.convert("CMYK").save(path := folder / f"{name}.jpeg")
    elif kind == 2:
        photo.quantize(64).save(path := folder / f"{name}.png")
    elif kind == 3:
        PILImage.fromarray(np.asarray(photo.convert("L"), np.uint16) * 257).save(path := folder / f"{name}.png")
    elif kind == 4:
        photo.putalpha(PILImage.linear_gradient("L").resize(photo.size))
        photo.save(path := folder / f"{name}.png")
    else:
        exif = PILImage.Exif()
        exif[0x0112] = 6  # stored on its side
        photo.transpose(PILImage.Transpose.ROTATE_90).save(path := folder / f"{name}.JPG", exif=exif, quality=90)
    return path.name


@pytest.fixture
def records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Thirty rows; each shows two photographs in two of six ways, and wants a third."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "photos"
    folder.mkdir()
    names = ["astronaut", "chelsea", "coffee", "rocket", "coins"]
    photos = [PILImage.fromarray(getattr(data, name)()).convert("RGB") for name in names]
    rows = []
    for i in range(ROWS):
        files = []
        for k in range(3):
            photo = photos[(i + k) % len(photos)].copy()
            photo.thumbnail((31 + 7 * i % 90, 200 - 5 * i))
            files.append(save(photo, (i + 2 * k) % 6, folder, f"{i:02d}-{k}"))
        references = [{"marker": k + 1, "image": files[k], "phrase": names[(i + k) % len(names)]} for k in range(2)]
        rows.append({"instruction": "the [ref#1] thing beside the [ref#2] thing", "references": references, "target": files[2]})
    path = folder / "records.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def fit(experiment: Path, records: Path, *args: str) -> tuple[LightningCLI, list[float]]:
    recorder = {"class_path": "tests.recorder.LossRecorder", "init_args": {"out": "losses.jsonl"}}
    source = [f"--data.init_args.train={records}", "--data.init_args.held_out=null", f"--trainer.callbacks+={json.dumps(recorder)}"]
    cli = main(["fit", "-c", str(experiment), *source, *args])
    return cli, [float.fromhex(json.loads(line)["loss"]) for line in Path("losses.jsonl").read_text().splitlines()]


def truncate(records: Path, row: int) -> None:
    """Cut the target of a row, counted from 0, in half."""
    target: dict[str, Any] = json.loads(records.read_text().splitlines()[row])
    path = records.parent / target["target"]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_photographs_of_all_kinds_pass_the_check(records: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert mmgen(["data", "check", str(records)]) == 0
    assert f"{ROWS} rows, {ROWS} good, 0 bad" in capsys.readouterr().out
    modes = set()
    for path in records.parent.glob("0*.*"):
        with PILImage.open(path) as image:
            modes.add(image.mode)
    assert modes == {"RGB", "CMYK", "P", "I;16", "RGBA"}


def test_a_photograph_on_its_side_is_read_upright(records: Path) -> None:
    wide = PILImage.fromarray(data.chelsea())  # type: ignore[no-untyped-call]
    name = save(wide, 5, records.parent, "side")
    with PILImage.open(records.parent / name) as stored:
        assert stored.width < stored.height
    read = np.asarray(open_picture(name, records.parent), np.int16)
    assert np.abs(read - np.asarray(wide)).mean() < 5


def test_a_model_trains_on_photographs(experiment: Path, records: Path) -> None:
    _, losses = fit(experiment, records, "--trainer.max_steps=3")
    assert len(losses) == 3 and all(map(math.isfinite, losses)) and len(set(losses)) == 3


def test_a_bad_row_is_left_out_counted_and_listed(experiment: Path, records: Path) -> None:
    truncate(records, 17)
    args = ["--trainer.max_steps=15", "--data.init_args.bad_rows=0.05", "--data.init_args.check=8"]
    cli, losses = fit(experiment, records, *args)
    assert len(losses) == ROWS // 2 and all(map(math.isfinite, losses))  # an epoch: every row once
    run = Path("runs/tiny/version_0")
    (listed,) = map(json.loads, (run / "bad_rows.0.jsonl").read_text().splitlines())
    assert listed["index"] == 17 and "17-2" in listed["reason"]
    assert cli.datamodule.bad == {17: listed["reason"]}
    events = EventAccumulator(str(run))
    events.Reload()
    counts = [e.value for e in events.Scalars("data/bad_rows")]
    assert counts == sorted(counts) and counts[0] in (0, 1) and counts[-1] == 1 and len(counts) == ROWS // 2


def test_more_bad_rows_than_allowed_stop_the_training(experiment: Path, records: Path) -> None:
    truncate(records, 17)
    with pytest.raises(RecordError) as stop:
        fit(experiment, records, "--trainer.max_steps=15", "--data.init_args.check=8")
    message = str(stop.value)
    assert message.startswith("1 of 30 rows are bad, more than bad_rows=0.01") and "17-2" in message and "\n" not in message
