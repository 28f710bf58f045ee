"""The commands, and what they say when something is wrong: one line that names the file, row or key."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image as PILImage

from lightning_mmgen import cli
from lightning_mmgen.__main__ import other_owners

ROOT = Path(__file__).parent.parent
INSTRUCT = str(ROOT / "experiments" / "instruct.yaml")


def fails(args: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """Run ``lightning`` with arguments that cannot work; the last line of its errors."""
    monkeypatch.setattr("sys.argv", ["lightning", *args])
    assert cli.command() == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: ") and len(line) < 500
    return line


@pytest.mark.parametrize("command", [["lightning", "--help"], ["mmgen", "--help"]], ids=lambda c: c[0])
def test_help_is_quick(command: list[str]) -> None:
    script = Path(sys.executable).parent / command[0]
    start = time.perf_counter()
    out = subprocess.run([str(script), *command[1:]], capture_output=True, text=True, check=True).stdout
    assert time.perf_counter() - start < 1.0
    assert "fit" in out


def test_a_rival_of_the_command_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "lightning_sdk-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lightning-sdk\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[console_scripts]\nlightning = lightning_sdk.cli:main\n")
    assert other_owners() == []
    monkeypatch.syspath_prepend(str(tmp_path))
    assert other_owners() == ["lightning-sdk"]


def test_the_callbacks_are_installed_inside_the_package_only(tmp_path: Path) -> None:
    inside = "import lightning_mmgen.callbacks as c; print(c.PictureGrid.__module__)"
    out = subprocess.run([sys.executable, "-c", inside], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert out.strip() == "lightning_mmgen.callbacks.picture_grid"
    assert subprocess.run([sys.executable, "-c", "import callbacks"], cwd=tmp_path, capture_output=True).returncode != 0


@pytest.mark.parametrize(
    ("args", "names"),
    [
        (["--model.init_args.unett=1"], "unett"),
        (["--model.init_args.schedule.warmupp=1"], "warmupp"),
        (["--data.class_path=NoSuchModule"], "NoSuchModule"),
        (["--data.init_args.train=no/such/file.jsonl"], "no/such/file.jsonl"),
        (["--model.init_args.unet.pretrained=./nowhere"], "nowhere"),
        (["--model.init_args.codec.pretrained=toybox/none"], "toybox/none"),
        (["--model.init_args.diffusion.prediction_type=epsilon"], "zero_terminal_snr"),
        (["--model.init_args.condition_dropout.both=1.5"], "condition_dropout"),
        (["--model.init_args.sampler.scheduler=euler"], "scheduler"),
        (["--model.init_args.sampler.guidance=sometimes"], "guidance"),
        (["--model.init_args.encoder.init_args.max_tokens=9"], "more than max_tokens=9"),
        (["-c", "no_such.yaml"], "no_such.yaml"),
    ],
    ids=lambda v: v[0].split("=")[0].split(".")[-1] if isinstance(v, list) else None,
)
def test_wrong_settings(
    args: list[str], names: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert names in fails(["fit", "-c", INSTRUCT, *args, "--trainer.fast_dev_run=true"], capsys, monkeypatch)


def test_a_yaml_cannot_import_what_it_likes(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.yaml").write_text("trainer: {callbacks: [{class_path: subprocess.Popen, init_args: {args: [touch, owned]}}]}\n")
    fails(["fit", "-c", INSTRUCT, "-c", "bad.yaml"], capsys, monkeypatch)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"instruction": "a [ref#1] toy", "target": "ok.png"}, "marker [ref#1] has no reference"),
        ({"instruction": "", "target": "ok.png"}, "instruction is empty"),
        ({"instruction": "a toy", "target": "gone.png"}, "gone.png: no such file"),
        ({"instruction": "a toy", "target": "cut.jpg"}, "cut.jpg: cannot be read"),
        ({"instruction": "a toy", "target": "../ok.png"}, "leaves the data folder"),
        ({"instruction": "a toy", "target": "ok.png", "colour": "red"}, "unknown key 'colour'"),
    ],
    ids=["marker", "empty", "missing", "truncated", "outside", "key"],
)
def test_bad_rows_stop_before_training(
    row: dict[str, object], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    PILImage.new("RGB", (64, 64), "red").save(folder / "ok.png")
    PILImage.effect_noise((64, 64), 50).save(tmp_path / "whole.jpg")
    (folder / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:400])
    (folder / "records.jsonl").write_text(json.dumps(row) + "\n")
    monkeypatch.chdir(tmp_path)
    args = [
        "fit",
        "-c",
        INSTRUCT,
        "--data.init_args.train=data/records.jsonl",
        "--data.init_args.batch_size=1",
        "--trainer.fast_dev_run=true",
    ]
    assert reason in fails(args, capsys, monkeypatch)


def test_interpolation_survives_overlays_and_overrides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one.yaml").write_text("trainer: {max_steps: 30, log_every_n_steps: '${trainer.max_steps}'}\n")
    (tmp_path / "two.yaml").write_text("trainer: {max_steps: 40}\n")
    for more, steps in (([], 30), (["-c", "two.yaml"], 40), (["-c", "two.yaml", "--trainer.max_steps=50"], 50)):
        made = cli.main(["-c", INSTRUCT, "-c", "one.yaml", *more, "--trainer.callbacks=null"], run=False)
        assert made.trainer.log_every_n_steps == steps


def test_print_config_shows_the_resolved_experiment(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["fit", "-c", INSTRUCT, "--print_config"])
    assert stop.value.code == 0
    assert "encoder.projector" in capsys.readouterr().out
