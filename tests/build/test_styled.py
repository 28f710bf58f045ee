from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as PILImage

from lightning_mmgen.data.instructions import SHOWN
from lightning_mmgen.data.sources import JSONLSource
from lightning_mmgen.models.clip import Clip
from lightning_mmgen.prompt import Record
from lightning_mmgen.tools.data import check
from lightning_mmgen.tools.main import main

CONTENTS, STYLES = ["a red cat", "a blue box", "a star, on a box"], ["green", "red, blue"]
PLACES = [(i, j) for i in range(3) for j in range(2)]


@pytest.fixture
def arguments(clip: Path, tmp_path: Path) -> list[str]:
    """The six pictures of three contents in two styles, as `mmgen build synthetic` leaves them; each is one grey with some noise."""
    out = tmp_path / "in"
    rows = []
    for i, j in PLACES:
        path = out / "pictures" / f"{i:07d}" / f"{j:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(i * 2 + j).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        PILImage.fromarray(noise).save(path)
        words = f"{CONTENTS[i]}, {STYLES[j]}"
        rows.append(Record(words, target=str(path.relative_to(out)), caption=words, task="synthetic", id=f"{i:07d}/{j:06d}").to_json())
    (out / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, lines in (("contents", CONTENTS), ("styles", STYLES)):
        (tmp_path / f"{name}.txt").write_text("\n".join(lines))
    files = ["--records", f"{out}/records.jsonl", "--contents", f"{tmp_path}/contents.txt", "--styles", f"{tmp_path}/styles.txt"]
    return ["build", "styled", *files, "--clip", str(clip), "--batch-size", "4", "--device", "cpu", "--out", f"{tmp_path}/out"]


def built(out: Path) -> list[Record]:
    return list(JSONLSource(str(out / "records.jsonl")))


def place(picture: object) -> tuple[int, int]:
    path = Path(str(picture))
    return int(path.parent.name), int(path.stem)


def cosines(arguments: list[str], clip: Path) -> dict[tuple[int, int], tuple[float, float]]:
    """Of each picture with that of the next content in its style, and with the words of its content, one by one."""
    model, folder = Clip(str(clip)), Path(arguments[3]).parent
    seen = {}
    for i, j in PLACES:
        array = np.asarray(PILImage.open(folder / "pictures" / f"{i:07d}" / f"{j:06d}.png"))
        seen[i, j] = model.embed(torch.from_numpy(array.copy()).permute(2, 0, 1)[None] / 127.5 - 1)[0]
    return {(i, j): (float(v @ seen[(i + 1) % 3, j]), float(v @ model.embed_texts([CONTENTS[i]])[0])) for (i, j), v in seen.items()}


@pytest.mark.parametrize("task", ["styled", "style_transfer"])
def test_another_content_shows_the_style_and_another_style_the_content(task: str, arguments: list[str], tmp_path: Path) -> None:
    assert main([*arguments, "--task", task]) == 0
    records = built(tmp_path / "out")
    assert [place(r.target) for r in records] == PLACES and {r.task for r in records} == {task}
    for record in records:
        (i, j), roles = place(record.target), [r.role for r in record.references]
        assert place(record.references[0].image) == ((i + 1) % 3, j) and record.caption == CONTENTS[i]
        assert tuple(roles) == SHOWN["transfer" if task == "style_transfer" else "styled"]
        assert [place(r.image) for r in record.references[1:]] == [(i, 1 - j)] * (task == "style_transfer")
        assert STYLES[j] not in record.instruction and (CONTENTS[i] in record.instruction) == (task == "styled")
    assert check(str(tmp_path / "out" / "records.jsonl")) == 0


def test_targets_unlike_their_style_or_caption_are_dropped(arguments: list[str], clip: Path, tmp_path: Path) -> None:
    found = cosines(arguments, clip)
    style, caption = (sorted(c[k] for c in found.values()) for k in (0, 1))
    least = (style[1] + style[2]) / 2, (caption[0] + caption[1]) / 2
    assert main([*arguments, "--min-style", str(least[0]), "--min-caption", str(least[1])]) == 0
    kept = [p for p, (s, c) in found.items() if s >= least[0] and c >= least[1]]
    assert [place(r.target) for r in built(tmp_path / "out")] == kept and 2 < len(kept) < 6
    told = json.loads((tmp_path / "out" / "counts.json").read_text())
    assert (told["pictures"], told["kept"], told["under --min-style"]) == (6, len(kept), 2)


def test_shards_equal_one_run_and_lone_pictures_are_left_out(arguments: list[str], tmp_path: Path) -> None:
    records = Path(arguments[3])
    records.write_text("".join(records.read_text().splitlines(keepends=True)[:-1]))  # the third content has one style alone
    for task, count in (("styled", 5), ("style_transfer", 4)):
        assert main([*arguments, "--task", task, "--out", f"{tmp_path}/{task}"]) == 0
        assert [place(r.target) for r in built(tmp_path / task)] == PLACES[:count]
    for shard in ("1/2", "0/2"):
        assert main([*arguments, "--batch-size", "2", "--out", f"{tmp_path}/shards", "--shard", shard]) == 0
    assert sorted(r.id for r in built(tmp_path / "shards")) == [r.id for r in built(tmp_path / "styled")]


def test_what_a_user_can_mend_is_one_line(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other.txt").write_text("a dog\na box\na star")
    for changes, message in (
        (["--records", f"{tmp_path}/gone.jsonl"], "gone.jsonl: no such file"),
        (["--contents", f"{tmp_path}/other.txt"], "records.jsonl:1: is no picture of these contents and styles"),
        (["--clip", "./gone"], "./gone: no such folder"),
    ):
        assert main([*arguments, *changes]) == 1
        assert message in capsys.readouterr().err
    (tmp_path / "in" / "pictures" / "0000001" / "000001.png").unlink()
    assert main(arguments) == 1 and "000001.png: no such file" in capsys.readouterr().err
