from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as PILImage
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    PreTrainedTokenizerFast,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from lightning_mmgen.build.detector import Detector
from lightning_mmgen.build.photos import Captioner
from lightning_mmgen.data.images import square_around
from lightning_mmgen.data.sources import JSONLSource
from lightning_mmgen.prompt import Record
from lightning_mmgen.tools.data import check
from lightning_mmgen.tools.main import main

from .conftest import contents, interrupt, make_classifier

WORDS = ["<pad>", "<unk>", "<s>", "</s>", "<image>", "USER", "what", "is", "this", *(f"word{i}" for i in range(40))]
TEMPLATE = (
    "<s> USER {% for m in messages %}{% for c in m.content %}{% if c.type == 'image' %}<image> {% else %}{{ c.text }} {% endif %}"
    "{% endfor %}{% endfor %}"
)


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a LLaVA-NeXT with patches of 4 px on tiles of 16 px."""
    folder = tmp_path_factory.mktemp("llava")
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, **names, extra_special_tokens={"image_token": "<image>"})
    tiles = [[16, 32], [32, 16], [32, 32]]
    size = {"shortest_edge": 16}, {"height": 16, "width": 16}
    images = LlavaNextImageProcessorPil(size=size[0], crop_size=size[1], image_grid_pinpoints=tiles)
    options = {"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    LlavaNextProcessor(images, tokenizer, chat_template=TEMPLATE, **options).save_pretrained(folder)
    wide = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.5}
    vision = {"model_type": "clip_vision_model", **wide, "image_size": 16, "patch_size": 4, "projection_dim": 8}
    text = {"model_type": "llama", **wide, "vocab_size": len(WORDS), "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    torch.manual_seed(0)
    config = LlavaNextConfig(vision_config=vision, text_config=text, image_token_id=4, image_grid_pinpoints=tiles, vision_feature_layer=-2)
    LlavaNextForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a ViT that tells "clean" from "watermark"."""
    return make_classifier(tmp_path_factory.mktemp("classifier"), "clean", "watermark")


def noise(seed: int, width: int = 60, height: int = 40) -> PILImage.Image:
    return PILImage.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def pictures(tmp_path: Path) -> dict[str, PILImage.Image]:
    """Eight pictures in two folders, written."""
    out = {f"{'ab'[i % 2]}/{i}.png": noise(i, 60 if i < 4 else 40, 40 if i < 4 else 60) for i in range(8)}
    for name, picture in out.items():
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        picture.save(tmp_path / "in" / name)
    return out


@pytest.fixture
def arguments(pictures: dict[str, PILImage.Image], grounding_dino: Path, tmp_path: Path) -> list[str]:
    """A build that keeps all of them, with given captions; what comes later in the list wins."""
    captions = tmp_path / "captions.jsonl"
    captions.write_text("".join(json.dumps({"image": name, "caption": f"picture {name}"}) + "\n" for name in pictures))
    detector = ["--detector", str(grounding_dino), "--person", "man", "--max-people", "99", "--text-threshold", "0"]
    options = ["--min-side", "40", "--captions", str(captions), "--format", "png", "--batch-size", "3", "--device", "cpu"]
    return ["build", "photos", "--images", str(tmp_path / "in"), *detector, *options, "--out", str(tmp_path / "out")]


def built(out: Path) -> dict[str, Record]:
    return {r.id: r for r in JSONLSource(str(out / "records.jsonl"))}


def counts(out: Path) -> dict[str, int]:
    return dict(json.loads((out / "counts.json").read_text()))


def test_pictures_of_more_people_are_dropped_and_others_cropped_around_theirs(
    arguments: list[str], pictures: dict[str, PILImage.Image], grounding_dino: Path, tmp_path: Path
) -> None:
    """The limit lies where half of the pictures have a second box over it."""
    detector, every = Detector(str(grounding_dino), 0.0, 0.0), []
    names = sorted(pictures)
    for batch in (names[:3], names[3:6], names[6:]):  # the padding of a batch shifts scores a little
        every += detector.detect([pictures[name] for name in batch], [["man"]] * len(batch))
    seconds = sorted(some[1].score for some in every)
    threshold = (seconds[3] + seconds[4]) / 2
    people = {name: [d for d in some if d.score > threshold] for name, some in zip(names, every, strict=True)}
    assert main([*arguments, "--max-people", "1", "--box-threshold", str(threshold)]) == 0
    records = built(tmp_path / "out")
    assert set(records) == {name for name, some in people.items() if len(some) < 2} and len(records) == 4
    assert counts(tmp_path / "out") == {"pictures": 8, "kept": 4, "over --max-people": 4}
    moved = 0
    for name, record in records.items():
        w, h = pictures[name].size
        centre = [(d.left + d.right) / 2 if w > h else (d.top + d.bottom) / 2 for d in people[name]] or [30]
        starts = range(21)  # every place that a square of 40 px has in 60
        best = min(starts, key=lambda s: abs(s + 20 - centre[0]))
        crop = np.asarray(pictures[name])[:, best : best + 40] if w > h else np.asarray(pictures[name])[best : best + 40]
        np.testing.assert_array_equal(np.asarray(PILImage.open(tmp_path / "out" / str(record.target))), crop)
        assert record.instruction == record.caption == f"picture {name}" and record.task == "photos"
        moved += best != 10
    assert moved
    assert check(str(tmp_path / "out" / "records.jsonl")) == 0


@pytest.mark.parametrize(
    ("edges", "corner"),
    [
        ([], (30, 0)),
        ([(50, 0, 60, 9)], (35, 0)),
        ([(-9, 0, 7, 40)], (0, 0)),
        ([(90, 0, 120, 40)], (60, 0)),
        ([(0, 0, 10, 9), (60, 3, 70, 40)], (15, 0)),
    ],
)
def test_the_square_is_centred_on_people_and_stays_inside(edges: list[tuple[float, float, float, float]], corner: tuple[int, int]) -> None:
    x, y = corner
    assert square_around((100, 40), edges) == (x, y, x + 40, y + 40)
    assert square_around((40, 100), [(b, a, d, c) for a, b, c, d in edges]) == (y, x, y + 40, x + 40)


def test_a_classifier_drops_what_is_over_its_limit(
    arguments: list[str], pictures: dict[str, PILImage.Image], classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, processor = ViTForImageClassification.from_pretrained(classifier), ViTImageProcessorPil.from_pretrained(classifier)
    with torch.no_grad():
        logits = {name: model(**processor(picture, return_tensors="pt")).logits[0] for name, picture in pictures.items()}
    scores = {name: float(torch.softmax(x, 0)[1]) for name, x in logits.items()}
    low, high = sorted(scores.values())[4:6]
    limits = ["--watermark", str(classifier), "--max-watermark", str((low + high) / 2)]
    limits += ["--unsafe", str(classifier), "--unsafe-label", "clean", "--max-unsafe", str(1 - sorted(scores.values())[1] + 1e-6)]
    assert main([*arguments, *limits]) == 0
    assert set(built(tmp_path / "out")) == {name for name, score in scores.items() if sorted(scores.values())[1] <= score <= low}
    assert counts(tmp_path / "out") == {"pictures": 8, "kept": 4, "over --max-watermark": 3, "over --max-unsafe": 1}
    told = capsys.readouterr().out
    assert f"watermark: 5% below {np.quantile(list(scores.values()), 0.05):.3g}" in told and "not filtered" not in told


def test_the_report_says_which_filters_were_off(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    told = capsys.readouterr().out
    assert "not filtered by --watermark" in told and "not filtered by --unsafe" in told


def test_unreadable_small_and_captionless_pictures_are_counted(
    arguments: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "in"
    (folder / "a" / "text.jpg").write_text("text")
    (folder / "a" / "directory.png").mkdir()
    noise(20, 39, 80).save(folder / "b" / "small.png")
    noise(21).save(os.path.join(os.fsencode(folder), b"latin\xe9.png"))
    (folder / "note.txt").write_text("not a picture")
    names = ["a/text.jpg", "a/directory.png", "b/small.png"]
    with (tmp_path / "captions.jsonl").open("a") as file:
        file.writelines(json.dumps({"image": name, "caption": "x"}) + "\n" for name in names)
    assert main([*arguments, "--workers", "1"]) == 0
    assert counts(tmp_path / "out") == {"pictures": 12, "kept": 8, "unreadable": 2, "under --min-side": 1, "no caption": 1}
    assert "a/text.jpg: picture: not a picture" in capfd.readouterr().err


def test_the_captioner_writes_what_the_model_says_of_each_crop_alone(arguments: list[str], llava: Path, tmp_path: Path) -> None:
    written = ["--captions", "", "--captioner", str(llava), "--caption-prompt", "what is this", "--caption-tokens", "5"]
    assert main([*arguments, *written, "--caption-dtype", "float32", "--shard", "0/1"]) == 0
    model, processor = LlavaNextForConditionalGeneration.from_pretrained(llava), LlavaNextProcessor.from_pretrained(llava)
    records, captions = built(tmp_path / "out"), set()
    assert len(records) == counts(tmp_path / "out")["kept"] > 4
    for record in records.values():
        with PILImage.open(tmp_path / "out" / str(record.target)) as crop:
            inputs = processor(text="USER <image> what is this", images=crop, return_tensors="pt")
        tokens = inputs.input_ids
        assert int((tokens == 2).sum()) == 1 and int((tokens == 4).sum()) > 16
        for _ in range(5):  # greedy, without a cache
            with torch.no_grad():
                logits = model(**{**inputs, "input_ids": tokens, "attention_mask": torch.ones_like(tokens)}).logits
            tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], 1)
            if int(tokens[0, -1]) == 3:
                break
        new = tokens[0, inputs.input_ids.shape[1] :].tolist()
        assert record.caption == " ".join(WORDS[i] for i in new if i > 3)
        captions.add(record.caption)
    assert len(captions) > 2


def test_pictures_of_any_shape_are_captioned_in_a_batch_as_alone(llava: Path) -> None:
    captioner = Captioner(str(llava), "what is this", 5, "float32", "cpu")
    images = [noise(0), noise(1, 20, 60), noise(2, 60, 60)]
    assert captioner.answers(images) == [captioner.answers([image])[0] for image in images]


def test_shards_and_a_stopped_build_equal_one_run(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = [*arguments, "--format", "jpeg"]
    main(arguments)
    for shard in ("2/3", "0/3", "1/3"):
        assert main([*arguments, "--out", str(tmp_path / "shards"), "--shard", shard]) == 0
    interrupt(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        main([*arguments, "--out", str(tmp_path / "stopped")])
    monkeypatch.undo()
    assert main([*arguments, "--out", str(tmp_path / "stopped")]) == 0
    whole, shards, stopped = (contents(tmp_path / name, "*.jpg") for name in ("out", "shards", "stopped"))
    assert whole == shards == stopped
    assert len(whole[0]) == len(whole[1]) == 8


def test_what_a_user_can_mend_is_one_line(
    arguments: list[str], classifier: Path, grounding_dino: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.jsonl").write_text('{"image": "a/0.png", "caption": "x"}\n{"image": "a/0.png"}\n')
    (tmp_path / "empty").mkdir()
    for changes, message in (
        (["--watermark", str(classifier), "--watermark-label", "logo"], "has no label 'logo'; there are clean, watermark"),
        (["--captions", str(tmp_path / "bad.jsonl")], "bad.jsonl:2: needs the strings image and caption"),
        (["--captions", str(tmp_path / "gone.jsonl")], "gone.jsonl'"),
        (["--images", str(tmp_path / "gone")], "gone: no such folder"),
        (["--images", str(tmp_path / "empty")], "empty: holds no pictures"),
        (["--out", str(tmp_path / "in" / "a" / "out")], "where it would be taken for more pictures"),
        (["--captions", "", "--captioner", str(grounding_dino)], "its processor has no chat template"),
    ):
        assert main([*arguments, "--out", str(tmp_path / "new"), *changes]) == 1
        assert message in capsys.readouterr().err
        for path in (tmp_path / "new").glob("*"):
            path.unlink()
