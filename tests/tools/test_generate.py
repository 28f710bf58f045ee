"""From a run to pictures: the run folder, ``mmgen generate`` and ``mmgen export``."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image as PILImage

from lightning_mmgen import cli
from lightning_mmgen.data.sources import ToyboxSource
from lightning_mmgen.tools.generate import load_module
from lightning_mmgen.tools.main import main

PROMPT = "put the [ref#1] toy beside the [ref#2] toy"


@pytest.fixture(scope="module")
def run(experiment: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a run of two steps with an average, made in a git repository; two pictures ``a.png`` and ``b.png`` lie above it."""
    folder = tmp_path_factory.mktemp("work")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        (folder / ".gitignore").write_text("runs\n*.png\n")
        git = ["git", "-c", "user.name=a", "-c", "user.email=a@example.org"]
        for args in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "start"]):
            subprocess.run([*git, *args], check=True)
        args = ["fit", "-c", str(experiment), "--trainer.callbacks+={class_path: EMA, init_args: {decay: 0.9}}"]
        patch.setattr("sys.argv", ["lightning", *args])
        assert cli.command() == 0
        for name, colour in (("a", "red"), ("b", "blue")):
            PILImage.new("RGB", (20, 30), colour).save(f"{name}.png")
        yield folder / "runs" / "tiny" / "version_0"


@pytest.fixture
def checkpoint(run: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run's last checkpoint; the working directory is where it was started."""
    monkeypatch.chdir(run.parents[2])
    return run / "checkpoints" / "last.ckpt"


def generate(source: Path, out: Path, *more: str, prompt: str = PROMPT) -> list[bytes]:
    """The files that ``mmgen generate`` writes to ``out``."""
    kind = "--model" if source.is_dir() else "--ckpt"
    references = ["--ref", "a.png", "--ref", "b.png"] if prompt == PROMPT else []
    assert main(["generate", kind, str(source), "--prompt", prompt, *references, "--out", str(out), *more]) == 0
    return [p.read_bytes() for p in sorted(out.parent.glob(f"{out.stem}*.png"))]


def pixels(path: Path) -> np.ndarray[tuple[int, ...], np.dtype[np.int16]]:
    with PILImage.open(path) as image:
        return np.asarray(image, np.int16)


def test_the_run_folder_reproduces_the_run(run: Path, experiment: Path) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["seed_everything"] == 7 and config["trainer"]["max_steps"] == 2
    assert config["model"]["init_args"]["parameters"][3]["lr"] == 3e-2
    facts = json.loads((run / "run.json").read_text())
    assert facts["command"][:4] == ["lightning", "fit", "-c", str(experiment)] and facts["seed"] == 7
    assert facts["packages"]["torch"] == torch.__version__ and "lightning_mmgen" in facts["packages"]
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=run, capture_output=True, text=True, check=True).stdout.strip()
    assert facts["revision"] == head
    assert facts["data"] == ToyboxSource({"subject": 0.5, "caption": 0.5}, length=8).fingerprint()
    table = (run / "parameters.txt").read_text()
    assert "encoder.language   LoRA rank 2" in table and "fully trained" in table


def test_the_same_seed_draws_the_same_picture(checkpoint: Path, tmp_path: Path) -> None:
    first, again, other = (generate(checkpoint, tmp_path / f"{i}.png", "--seed", s) for i, s in enumerate("001"))
    assert first == again and first != other
    assert pixels(tmp_path / "0.png").shape == (16, 16, 3)


def test_count_draws_one_picture_a_seed(checkpoint: Path, tmp_path: Path) -> None:
    assert len(generate(checkpoint, tmp_path / "many.png", "--count", "2", "--seed", "5")) == 2
    for i, seed in enumerate("56"):
        generate(checkpoint, tmp_path / "one.png", "--seed", seed)
        assert abs(pixels(tmp_path / "one.png") - pixels(tmp_path / f"many-{i}.png")).max() <= 1
    assert (pixels(tmp_path / "many-0.png") != pixels(tmp_path / "many-1.png")).any()


def test_settings_show_in_the_picture(checkpoint: Path, tmp_path: Path) -> None:
    plain = generate(checkpoint, tmp_path / "plain.png")
    assert generate(checkpoint, tmp_path / "same.png", "--steps", "2", "--guidance", "2") == plain  # the experiment's own
    assert generate(checkpoint, tmp_path / "steps.png", "--steps", "3") != plain
    assert generate(checkpoint, tmp_path / "guidance.png", "--guidance", "1") != plain
    assert generate(checkpoint, tmp_path / "words.png", prompt="a red cat") != plain
    assert generate(checkpoint, tmp_path / "own.png", "--scheduler", "ddim", "--guidance-rule", "constant") == plain
    assert generate(checkpoint, tmp_path / "noise.png", "--scheduler", "ddpm") != plain
    assert generate(checkpoint, tmp_path / "rule.png", "--guidance-rule", "alternating") != plain


def test_another_aspect(checkpoint: Path, tmp_path: Path) -> None:
    generate(checkpoint, tmp_path / "wide.png", "--height", "8", "--width", "24")
    assert pixels(tmp_path / "wide.png").shape == (8, 24, 3)


def test_an_export_draws_the_same_bytes(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "--ckpt", str(checkpoint), "--out", str(tmp_path / "model")]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "model")
    settings = ("--count", "2", "--seed", "3")
    assert generate(tmp_path / "model", tmp_path / "a.png", *settings) == generate(checkpoint, tmp_path / "b.png", *settings)
    assert main(["export", "--ckpt", str(checkpoint), "--out", str(tmp_path / "model")]) == 1
    assert capsys.readouterr().err.endswith(f"error: {tmp_path / 'model'}: is not empty\n")


def test_the_averaged_weights_are_drawn_with(checkpoint: Path) -> None:
    saved = torch.load(checkpoint, weights_only=True)
    module = load_module(checkpoint)
    for name, mean in saved["callbacks"]["EMA"]["mean"].items():
        assert torch.equal(module.get_parameter(name), mean)
        assert not name.startswith("adapter.") or not torch.equal(mean, saved["state_dict"][name])
    assert not any(m.training for m in module.modules())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--prompt", PROMPT, "--ref", "a.png"], "marker [ref#2] has no reference"),
        (["--prompt", "a cat", "--ref", "a.png"], "reference 1 has no marker [ref#1] in the instruction"),
        (["--prompt", "a cat", "--count", "0"], "--count must be 1 or more, not 0"),
        (["--prompt", "a cat", "--steps", "0"], "--steps must be 1 or more, not 0"),
        (["--prompt", "a cat", "--width", "-16"], "--width must be 1 or more, not -16"),
        (["--prompt", "a cat", "--width", "17"], "multiples of 4"),
        (["--prompt", "the [ref#1] cat", "--ref", "gone.png"], "gone.png"),
        (["--prompt", "the [ref#1] cat", "--ref", ".gitignore"], "not a picture"),
        (["--prompt", "cat " * 3000], "more than max_tokens=2048"),
    ],
    ids=["marker", "reference", "count", "steps", "negative", "width", "missing", "text", "long"],
)
def test_a_wrong_argument_is_one_line(
    args: list[str], message: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "--ckpt", str(checkpoint), "--out", str(tmp_path / "no.png"), *args]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["missing", "alone", "damaged", "other", "foreign"])
def test_a_wrong_checkpoint_is_one_line(kind: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run" / "checkpoints" / "x.ckpt"
    path.parent.mkdir(parents=True)
    whole, config = checkpoint.read_bytes(), checkpoint.parents[1] / "config.yaml"
    if kind != "missing":
        path.write_bytes(whole[: len(whole) // 2] if kind == "damaged" else whole)
    if kind == "other":
        text = config.read_text().replace("match: adapter\n", "match: adapter.blocks\n")
        (path.parents[1] / "config.yaml").write_text(text)
    if kind == "foreign":
        (path.parents[1] / "config.yaml").write_text(config.read_text().replace(".MultimodalDiffusion", ".OtherDiffusion"))
    assert main(["generate", "--ckpt", str(path), "--prompt", "a cat", "--out", str(tmp_path / "no.png")]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    reasons = {"missing": "no such checkpoint", "alone": "no config.yaml", "damaged": "x.ckpt: not a checkpoint"}
    reasons |= {"other": "falls under no row", "foreign": "OtherDiffusion"}
    assert error.startswith("error: ") and reasons[kind] in error and len(error) < 450


def test_a_folder_that_is_no_export_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--model", str(tmp_path), "--prompt", "a cat", "--out", str(tmp_path / "no.png")]) == 1
    assert capsys.readouterr().err == f"error: {tmp_path}: holds no model_index.json\n"
