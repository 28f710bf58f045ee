from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image as PILImage
from transformers import SamConfig, SamImageProcessorPil, SamModel, SamProcessor

from lightning_mmgen.data.sources import JSONLSource, write_jsonl
from lightning_mmgen.prompt import Box, Record, Reference
from lightning_mmgen.tools.data import check
from lightning_mmgen.tools.main import main

from .conftest import contents, interrupt

BOXES = (Box("cat", 3, 4, 30, 20, start=2), Box("dog", 5.5, 5, 50, 39), Box("dog", 1, 1, 12, 38, kind="person"))


@pytest.fixture(scope="module")
def sam(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a SAM for pictures of 64 px whose masks and expected IoUs differ from box to box."""
    folder = tmp_path_factory.mktemp("sam")
    vision = {"hidden_size": 16, "output_channels": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64, "patch_size": 8}
    vision |= {"mlp_dim": 32, "window_size": 4, "global_attn_indexes": [1], "num_pos_feats": 16}
    prompt = {"hidden_size": 32, "image_size": 64, "patch_size": 8, "mask_input_channels": 4}
    decoder = {"hidden_size": 32, "mlp_dim": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "iou_head_hidden_dim": 8}
    torch.manual_seed(0)
    model = SamModel(SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder))
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(folder)
    SamProcessor(SamImageProcessorPil(size={"longest_edge": 64}, pad_size={"height": 64, "width": 64})).save_pretrained(folder)
    return folder


def noise(seed: int, width: int = 60, height: int = 40) -> PILImage.Image:
    small = np.random.default_rng(seed).integers(0, 255, (height // 10, width // 10, 3), dtype=np.uint8)
    return PILImage.fromarray(small).resize((width, height))


def given() -> list[Record]:
    """Three pictures with three boxes each, one without a box, and one whose box has its mask already."""
    boxed = [Record(f"draw {i}", target=noise(i), caption="a cat", boxes=BOXES, task="crops", id=f"r{i}") for i in range(3)]
    masked = replace(boxed[0], id="masked", boxes=(BOXES[0]._replace(mask=PILImage.new("L", (60, 40), 9)), BOXES[1]))
    rich = Record("[ref#1] here", (Reference(1, noise(7)),), noise(8), mask=noise(9), controls={"edge": noise(10)}, session="s", turn=0)
    return [*boxed, rich, masked]


@pytest.fixture
def records(tmp_path: Path) -> Path:
    return write_jsonl(given(), tmp_path / "in")


@pytest.fixture
def arguments(records: Path, sam: Path, tmp_path: Path) -> list[str]:
    options = ["--model", str(sam), "--min-iou=-100", "--device", "cpu", "--out", str(tmp_path / "out")]
    return ["build", "masks", "--records", str(records), *options]


@torch.no_grad()
def plain(sam: Path, picture: PILImage.Image, box: Box) -> tuple[np.ndarray[Any, Any], float]:
    """A box alone: the library's processor, model and post-processing of all three masks, then the best."""
    model, processor = SamModel.from_pretrained(sam), SamProcessor.from_pretrained(sam)
    inputs = processor(picture, input_boxes=[[list(box[1:5])]], return_tensors="pt")
    out = model(pixel_values=inputs.pixel_values, input_boxes=inputs.input_boxes.float())
    masks = processor.post_process_masks(out.pred_masks, inputs.original_sizes, inputs.reshaped_input_sizes)[0][0]
    best = int(out.iou_scores[0, 0].argmax())
    return masks[best].numpy(), float(out.iou_scores[0, 0, best])


def read(path: str, root: Path) -> np.ndarray[Any, Any]:
    picture = PILImage.open(root / path)
    assert picture.mode == "L"
    return np.asarray(picture)


def test_each_box_gets_the_mask_that_it_would_get_alone(arguments: list[str], sam: Path, tmp_path: Path) -> None:
    assert main(arguments) == 0
    out = tmp_path / "out"
    built, masks = list(JSONLSource(str(out / "records.jsonl"))), []
    for number in range(3):
        for box in built[number].boxes:
            masks.append(read(str(box.mask), out))
            np.testing.assert_array_equal(masks[-1], plain(sam, noise(number), box)[0] * 255)
    assert len({mask.tobytes() for mask in masks}) > 3 and {0, 255} == set(np.unique(masks))
    assert check(str(out / "records.jsonl")) == 0


def test_the_record_and_its_pictures_come_along(arguments: list[str], records: Path, tmp_path: Path) -> None:
    assert main(arguments) == 0
    shutil.rmtree(records.parent)
    out = tmp_path / "out"
    for old, new in zip(given(), JSONLSource(str(out / "records.jsonl")), strict=True):
        assert [box._replace(mask=None) for box in new.boxes] == [box._replace(mask=None) for box in old.boxes]
        assert replace(new.map_pictures(lambda *_: ""), boxes=()) == replace(old.map_pictures(lambda *_: ""), boxes=())
        held = [p for p in old.pictures() if p not in [box.mask for box in old.boxes]]
        for before, path in zip(held, new.pictures(), strict=False):
            assert isinstance(before, PILImage.Image)
            np.testing.assert_array_equal(np.asarray(before), np.asarray(PILImage.open(out / str(path))))
    assert set(np.unique(PILImage.open(out / str(new.boxes[0].mask)))) == {9} and new.boxes[1].mask  # the last one's own mask stays
    assert json.loads((out / "counts.json").read_text()) == {"records": 5, "boxes masked": 10}


def test_masks_under_the_least_iou_are_left_out(arguments: list[str], sam: Path, tmp_path: Path) -> None:
    ious = {(number, k): plain(sam, noise(number), box)[1] for number in range(3) for k, box in enumerate(BOXES)}
    low, high = sorted(ious.values())[4:6]
    assert low < high
    assert main([*arguments, f"--min-iou={(low + high) / 2}"]) == 0
    built = list(JSONLSource(str(tmp_path / "out" / "records.jsonl")))
    assert {(n, k) for n in range(3) for k, box in enumerate(built[n].boxes) if box.mask} == {at for at, iou in ious.items() if iou >= high}
    counts = json.loads((tmp_path / "out" / "counts.json").read_text())
    again = int(ious[0, 1] >= high)  # the record with a mask repeats the first picture
    assert counts == {"records": 5, "boxes masked": 4 + again, "boxes without a good mask": 6 - again}


def test_rows_that_cannot_be_read_are_counted_and_named(
    arguments: list[str], records: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = records.parent / "pictures"
    (folder / "000000_target.png").write_text("text")
    (folder / "000003_ref1.png").unlink()
    PILImage.new("RGB", (2000, 1)).save(folder / "000001_target.png")
    with records.open("a") as file:
        file.write("{\n")
    assert main([*arguments, "--workers", "1"]) == 0
    assert [r.id for r in JSONLSource(str(tmp_path / "out" / "records.jsonl"))] == ["r2", "masked"]
    counts = json.loads((tmp_path / "out" / "counts.json").read_text())
    assert counts == {"records": 6, "unreadable": 4, "boxes masked": 4}
    told = capfd.readouterr().err
    assert "row 1: pictures/000000_target.png: not a picture" in told and "row 4: pictures/000003_ref1.png: no such file" in told


def test_shards_and_a_stopped_build_equal_one_run(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    main(arguments)
    for shard in ("1/2", "0/2"):
        assert main([*arguments, "--out", str(tmp_path / "shards"), "--shard", shard]) == 0
    interrupt(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        main([*arguments, "--out", str(tmp_path / "stopped")])
    monkeypatch.undo()
    assert main([*arguments, "--out", str(tmp_path / "stopped")]) == 0
    whole, shards, stopped = (contents(tmp_path / name, "*.png") for name in ("out", "shards", "stopped"))
    assert whole == shards == stopped
    assert len(whole[0]) == 5


def test_pictures_in_a_parquet_file_become_files(arguments: list[str], sam: Path, tmp_path: Path) -> None:
    noise(0).save(buffer := io.BytesIO(), "PNG")
    box = {"phrase": "cat", "left": 3.0, "top": 4.0, "right": 30.0, "bottom": 20.0}
    rows = [{"instruction": "draw", "target": {"bytes": buffer.getvalue(), "path": None}, "boxes": [box]}]
    Dataset.from_list(rows).to_parquet(str(tmp_path / "rows.parquet"))
    assert main([*arguments, "--records", str(tmp_path / "rows.parquet")]) == 0
    (record,) = JSONLSource(str(tmp_path / "out" / "records.jsonl"))
    np.testing.assert_array_equal(np.asarray(PILImage.open(tmp_path / "out" / str(record.target))), np.asarray(noise(0)))
    np.testing.assert_array_equal(read(str(record.boxes[0].mask), tmp_path / "out"), plain(sam, noise(0), BOXES[0])[0] * 255)


def test_records_are_not_written_over(arguments: list[str], records: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = records.read_text()
    assert main([*arguments, "--out", str(records.parent)]) == 1
    assert "would be written over" in capsys.readouterr().err and records.read_text() == before
