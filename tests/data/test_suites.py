"""Sets of prompts to test on: small folders in the published layouts, and each YAML of ``experiments/eval`` through the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lightning_mmgen.callbacks.ema import averaged
from PIL import Image
from transformers import ViTConfig, ViTModel

from lightning_mmgen.cli import main
from lightning_mmgen.data.suites import DreamBenchSource, PartiPromptsSource
from lightning_mmgen.prompt import MultimodalPrompt

EVAL = Path(__file__).parents[2] / "experiments" / "eval"
SUITES = sorted(EVAL.glob("*.yaml"))
PROMPTS = """Classes

subject_name,class
backpack,backpack
bear_plushie,stuffed animal
cat,cat

Prompts

Object Prompts

prompt_list = [
'a {0} {1} in the jungle'.format(unique_token, class_token),
'a red {0} {1}'.format(unique_token, class_token)
]

Live Subject Prompts

prompt_list = [
'a {0} {1} wearing a red hat'.format(unique_token, class_token),
'a cube shaped {0} {1}'.format(unique_token, class_token)
]
"""
PARTI = 'Prompt\tCategory\tChallenge\tNote\na red cat\tAnimals\tBasic\t\na "blue box\tArtifacts\tQuantity\tcount\n'


@pytest.fixture(scope="module")
def run(experiment: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder, with an average of the weights."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main(["fit", "-c", str(experiment), "--trainer.max_steps=1", "--trainer.callbacks+={class_path: EMA, init_args: {decay: 0.5}}"])
    return folder / "runs" / "tiny" / "version_0"


@pytest.fixture
def dreambench(tmp_path: Path) -> Path:
    folder = tmp_path / "dreambooth" / "dataset"
    rng = np.random.default_rng(0)
    for subject, photos in (("cat", 3), ("bear_plushie", 2)):
        (folder / subject).mkdir(parents=True)
        for i in range(photos):
            Image.fromarray(rng.integers(0, 255, (24, 30, 3), dtype=np.uint8)).save(folder / subject / f"{i:02d}.jpg")
    (folder / "prompts_and_classes.txt").write_text(PROMPTS)
    return folder.parent


@pytest.fixture
def parti(tmp_path: Path) -> Path:
    (tmp_path / "PartiPrompts.tsv").write_text(PARTI)
    return tmp_path / "PartiPrompts.tsv"


@pytest.mark.filterwarnings("ignore:.*subjects are there")
def test_dreambench_has_every_prompt_of_every_subject_four_times(dreambench: Path) -> None:
    source = DreamBenchSource(str(dreambench))
    records = list(source)
    assert len(source) == len(records) == 2 * 2 * 4 and len({r.id for r in records}) == 16
    bear, cat = records[0], records[12]
    assert (bear.instruction, bear.caption, bear.task) == (
        "a [ref#1] stuffed animal in the jungle",
        "a stuffed animal in the jungle",
        "object",
    )
    assert (cat.instruction, cat.caption, cat.task) == ("a cube shaped [ref#1] cat", "a cube shaped cat", "live")
    assert len(cat.extra["real"]) == 3 and cat.references[0].image is cat.extra["real"][0] and cat.target is cat.extra["real"][1]
    assert isinstance(cat.prompt(), MultimodalPrompt)


@pytest.mark.filterwarnings("ignore:.*subjects are there")
def test_a_broken_dreambench_is_told_in_one_line(dreambench: Path) -> None:
    folder = dreambench / "dataset"
    (folder / "unicorn").mkdir()
    with pytest.raises(ValueError, match=r"has no class for the folder 'unicorn'$"):
        DreamBenchSource(str(dreambench))
    (folder / "unicorn").rmdir()
    (folder / "bear_plushie" / "00.jpg").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"^bear_plushie:1: bear_plushie/00.jpg: not a picture"):
        DreamBenchSource(str(dreambench)).record(0)
    (folder / "prompts_and_classes.txt").write_text("Classes")
    with pytest.raises(ValueError, match="two lists of prompts"):
        DreamBenchSource(str(dreambench))
    with pytest.raises(FileNotFoundError, match="./nowhere: no such folder"):
        DreamBenchSource("./nowhere")


def test_parti_prompts_are_words_by_category(parti: Path) -> None:
    source = PartiPromptsSource(str(parti))
    assert [(r.instruction, r.caption, r.task, r.target) for r in source] == [
        ("a red cat", "a red cat", "Animals", None),
        ('a "blue box', 'a "blue box', "Artifacts", None),
    ]
    parti.write_text("text\nx\n")
    with pytest.raises(ValueError, match=r"has no rows with the columns Prompt and Category$"):
        PartiPromptsSource(str(parti))


@pytest.mark.filterwarnings("ignore:.*subjects are there")
@pytest.mark.parametrize("suite", SUITES, ids=lambda p: p.stem)
def test_each_suite_runs_through_the_command_line(
    suite: Path,
    run: Path,
    clip: Path,
    dreambench: Path,
    parti: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    ViTModel(
        ViTConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=4)
    ).save_pretrained("dino")
    names = {"openai/clip-vit-base-patch32": str(clip), "openai/clip-vit-large-patch14": str(clip), "facebook/dino-vits16": "./dino"}
    names |= {"data/dreambooth": str(dreambench), "data/PartiPrompts.tsv": str(parti), "toybox/clip": str(clip)}
    names |= {"length: 256": "length: 3", "pictures: 4": "pictures: 1", "target_size: 1024": "target_size: 16"}
    names |= {"target_size: 64": "target_size: 32"} if suite.stem == "edits" else {}  # the oracle reads 64 px
    text = suite.read_text()
    for name, own in names.items():
        text = text.replace(name, own)
    Path("suite.yaml").write_text(text)
    own = ["--model", f"{run}/model.yaml", "--ckpt_path", f"{run}/checkpoints/last.ckpt"]
    cli = main(["test", "-c", "suite.yaml", *own, "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"])
    assert averaged(cli.trainer) is not None  # the run's averaged weights draw
    (out,) = Path("runs").glob("eval_*/version_0")
    scores: dict[str, list[dict[str, Any]]] = {
        path.stem: [json.loads(line)["scores"] for line in path.read_text().splitlines()] for path in (out / "evaluation").glob("*.jsonl")
    }
    expected = {
        "toybox": ("reference", 3, {"clip_i", "clip_t", "copy_paste", "ignored", "ignored_inside", "ignored_outside", "reworded"}),
        "toybox_tasks": ("ratings", 3, {"sc", "pq"}),
        "edits": ("edits", 3, {"l1", "l2", "target_clip_i", "source_clip_i", "clip_t", "directional"}),
        "dreambench": ("reference", 4, {"clip_i_real", "dino_real", "clip_t", "copy_paste", "ignored"}),
        "partiprompts": ("reference", 2, {"clip_t"}),
    }[suite.stem]
    assert {"config.yaml", "model.yaml", "parameters.txt", "run.json"} <= {path.name for path in out.iterdir()}
    found = scores[expected[0]]
    assert len(found) == expected[1] and all(expected[2] <= row.keys() for row in found)
    assert {"edits": "", "toybox_tasks": "O, ImagenHub"}.get(suite.stem, "caption, CLIP-T") in capsys.readouterr().out
