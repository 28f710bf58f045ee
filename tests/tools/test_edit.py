"""From a run on edits to ``mmgen edit``: turns, drift, and an export that takes sources."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PILImage

from lightning_mmgen import cli
from lightning_mmgen.data.images import pixels
from lightning_mmgen.metrics.drift import MaskedMSE
from lightning_mmgen.tools.edit import drift_table
from lightning_mmgen.tools.main import main

EDITS = """
model:
  class_path: MultimodalDiffusion
  init_args:
    unet: {source_latents: true}
    source_gate: true
    parameters:
      - {match: encoder, train: frozen}
      - {match: adapter, train: full, lr: 3.0e-2}
      - {match: unet, train: lora, rank: 2, lr: 4.0e-2}
      - {match: unet.conv_in, train: full, lr: 0.1}
      - {match: source_gate, train: full, lr: 0.1}
data:
  class_path: EditDataModule
  init_args:
    train: {class_path: ToyboxSource, init_args: {tasks: {edit turn: 1.0}, length: 8}}
    held_out: null
    target_size: 16
    batch_size: 2
"""


@pytest.fixture(scope="module")
def checkpoint(experiment: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Of two steps on edits, with a UNet that takes sources; ``a.png`` of 30 x 20 pixels lies in the working directory."""
    folder = tmp_path_factory.mktemp("edits")
    (folder / "edits.yaml").write_text(EDITS)
    args = ["fit", "-c", str(experiment), "-c", str(folder / "edits.yaml")]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("sys.argv", ["lightning", *args])
        assert cli.command() == 0
        noise = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
        PILImage.fromarray(noise).save("a.png")
        PILImage.new("L", (30, 20), 255).save("full.png")
        PILImage.new("L", (30, 20), 0).save("empty.png")
        PILImage.new("L", (20, 30), 255).save("turned.png")
        yield folder / "runs" / "tiny" / "version_0" / "checkpoints" / "last.ckpt"


def edit(checkpoint: Path, out: Path, *more: str) -> list[bytes]:
    source = "--model" if checkpoint.is_dir() else "--ckpt"
    assert main(["edit", source, str(checkpoint), "--image", "a.png", "--out", str(out), *more]) == 0
    return [p.read_bytes() for p in sorted(out.parent.glob(f"{out.stem}*.png"))]


def test_each_turn_edits_what_the_one_before_left(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both = edit(checkpoint, tmp_path / "two.png", "--instruction", "make it red", "--instruction", "make it round")
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2:] == [str(tmp_path / "two-1.png"), str(tmp_path / "two-2.png")]
    (first,) = edit(checkpoint, tmp_path / "one.png", "--instruction", "make it red")
    assert both[0] == first and both[1] != first
    capsys.readouterr()
    (tmp_path / "one.png").replace("a-1.png")
    assert (
        main(["edit", "--ckpt", str(checkpoint), "--image", "a-1.png", "--out", "o.png", "--seed", "1", "--instruction", "make it round"])
        == 0
    )
    assert Path("o.png").read_bytes() == both[1]


def test_the_picture_keeps_about_its_aspect_and_the_unets_area(checkpoint: Path, tmp_path: Path) -> None:
    edit(checkpoint, tmp_path / "wide.png", "--instruction", "make it red")
    with PILImage.open(tmp_path / "wide.png") as image:
        assert image.size == (20, 12)  # of 30 x 20, in multiples of 4, about 16 x 16 pixels


def test_the_report_is_the_drift_of_what_is_written(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(checkpoint, tmp_path / "x.png", "--instruction", "make it red", "--instruction", "make it round")
    head, first, second = capsys.readouterr().out.splitlines()[-5:-2]
    pictures = [
        PILImage.open("a.png").resize((20, 12), PILImage.Resampling.BICUBIC),
        *(PILImage.open(tmp_path / f"x-{k}.png") for k in (1, 2)),
    ]
    arrays = [np.asarray(p.convert("RGB"), np.float64) / 255 for p in pictures]
    assert head.split()[:3] == ["turn", "PSNR", "before"] and head.endswith("instruction")
    assert float(first.split()[3]) == pytest.approx(((arrays[1] - arrays[0]) ** 2).mean(), rel=1e-3)
    assert float(second.split()[3]) == pytest.approx(((arrays[2] - arrays[1]) ** 2).mean(), rel=1e-3)
    assert float(second.split()[6]) == pytest.approx(((arrays[2] - arrays[0]) ** 2).mean(), rel=1e-3)
    assert first.split()[1:4] == first.split()[4:7] and second.endswith("make it round")


def test_with_a_mask_what_it_covers_is_no_drift() -> None:
    before, after = (PILImage.new("RGB", (16, 16), colour) for colour in ("red", "red"))
    after.paste((0, 0, 255), (0, 0, 8, 16))
    mask = pixels(PILImage.new("L", (16, 16), 0))[None, :1] * 0
    mask[..., :8] = 1
    table = drift_table([before, after], ["make the left blue"], mask, True)
    assert table.splitlines()[1].split()[3] == "0" and "outside the mask" in table
    assert float(MaskedMSE()(pixels(after)[None], pixels(before)[None], mask * 0)) > 0.3


def test_guidance_of_the_picture_shows(checkpoint: Path, tmp_path: Path) -> None:
    plain = edit(checkpoint, tmp_path / "plain.png", "--instruction", "make it red")
    assert edit(checkpoint, tmp_path / "scaled.png", "--instruction", "make it red", "--image-guidance", "1.5") != plain
    assert edit(checkpoint, tmp_path / "same.png", "--instruction", "make it red", "--guidance", "2") == plain


def test_an_export_takes_sources_and_draws_the_same_bytes(checkpoint: Path, tmp_path: Path) -> None:
    assert main(["export", "--ckpt", str(checkpoint), "--out", str(tmp_path / "model")]) == 0
    args = ["--instruction", "make it red", "--image-guidance", "1.5"]
    assert edit(tmp_path / "model", tmp_path / "a.png", *args) == edit(checkpoint, tmp_path / "b.png", *args)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--instruction", " "], "--instruction is empty"),
        (["--instruction", "x", "--mask", "turned.png"], "turned.png: is 20 x 30, a.png 30 x 20"),
        (["--instruction", "x", "--mask", "empty.png"], "empty.png: is empty, the edit may change nothing"),
        (["--instruction", "x", "--mask", "gone.png"], "gone.png"),
    ],
)
def test_a_wrong_argument_is_one_line(more: list[str], message: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["edit", "--ckpt", str(checkpoint), "--image", "a.png", "--out", "never.png", *more]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert errors[-1].startswith("error: ") and message in errors[-1] and not Path("never.png").exists()


def test_a_full_mask_leaves_nothing_to_measure(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(checkpoint, tmp_path / "m.png", "--instruction", "make it red", "--mask", "full.png")
    assert capsys.readouterr().out.splitlines()[-2].split()[1] == "nan"
