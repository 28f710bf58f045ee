from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image as PILImage
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from lightning_mmgen.build.attention import Row as Picture
from lightning_mmgen.build.attention import Targets, agreement, caption_of, look, picture_of
from lightning_mmgen.build.generators import open_generator, placed
from lightning_mmgen.data.attention import AttentionTargets, Word
from lightning_mmgen.data.images import pixels
from lightning_mmgen.data.sources import ToyboxSource
from lightning_mmgen.models.parameters import Row
from lightning_mmgen.prompt import RecordError
from lightning_mmgen.tools.export import export
from lightning_mmgen.tools.main import main

from ..conftest import CLIP_WORDS, make_unet, make_vae
from ..tools.test_export import ADAPTER, VISION, trained
from .conftest import interrupt

CAPTIONS = ["a red cat on a box", "Green star-box!", "a blue star"]


@pytest.fixture(scope="module")
def sdxl(clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an SDXL that draws 16 x 16 px and reads 12 tokens with two text encoders of width 8, the second one's pooled to 12."""
    folder = tmp_path_factory.mktemp("sdxl")
    torch.manual_seed(0)
    size = {"hidden_size": 8, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.5}
    size |= {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "vocab_size": len(CLIP_WORDS), "max_position_embeddings": 12}
    first, second = CLIPTextModel(CLIPTextConfig(**size)), CLIPTextModelWithProjection(CLIPTextConfig(**size, projection_dim=12))
    tokenizers = [AutoTokenizer.from_pretrained(clip, model_max_length=12) for _ in range(2)]
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False)
    StableDiffusionXLPipeline(make_vae(), first, second, *tokenizers, make_unet(), scheduler).save_pretrained(folder)
    return folder


def write_rows(folder: Path, rows: list[dict[str, Any]]) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "records.jsonl")


@pytest.fixture
def records(tmp_path: Path) -> str:
    """Three captioned pictures."""
    rows = []
    (tmp_path / "data").mkdir()
    for k, caption in enumerate(CAPTIONS):
        PILImage.effect_noise((20 + k, 16), 80).convert("RGB").save(tmp_path / "data" / f"{k}.png")
        rows.append({"instruction": caption, "caption": caption, "target": f"{k}.png", "id": f"row {k}"})
    return write_rows(tmp_path / "data", rows)


@pytest.fixture
def arguments(records: str, painter: Path, tmp_path: Path) -> list[str]:
    """A small build; what comes later in the list wins."""
    small = ["--steps", "2", "--inner-steps", "1", "--batch-size", "2", "--shard-size", "2", "--device", "cpu"]
    return ["build", "attention", "--data", records, "--model", str(painter), "--out", str(tmp_path / "out"), *small]


def test_targets_of_stable_diffusion_are_read_by_row_picture_and_word(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 0
    report = capsys.readouterr().out
    assert all(name in report for name in ("seconds an image", "PSNR of the return", "correlation of fast", "IoU of fast"))
    targets = AttentionTargets(tmp_path / "out", root=tmp_path / "data")
    assert len(targets) == 3 and targets.size == 8
    found = targets["row 0", "0.png"]
    assert set(found) == {"a", "red", "cat", "on", "box"} and found["red"].shape == (8, 8)
    assert [float(found["red"].min()), float(found["red"].max())] == [0.0, 1.0]
    assert [word.text for word in targets.read("row 1").words] == ["green", "star-box"]
    with pytest.raises(RecordError, match="another picture"):
        targets["row 0", "1.png"]


def test_maps_are_the_mean_of_a_words_shares_of_attention(painter: Path) -> None:
    generator, shown = open_generator(str(painter)), torch.rand(3, 16, 16) * 2 - 1
    words = generator.words("red star-box")
    assert [w.tokens for w in words] == [[1], [2, 3, 4]]
    layer = "up_blocks.1.attentions.1.transformer_blocks.0.attn2"
    settings = Targets("", str(painter), mode="fast", steps=1, layers=layer)
    found = look(generator, [Picture("x", "", shown, "red star-box", words)], settings, both=False).maps["fast"][0]

    module, held = generator.unet.get_submodule(layer), {}
    hooks = [
        getattr(module, part).register_forward_hook(lambda _m, _i, out, part=part: held.update({part: out})) for part in ("to_q", "to_k")
    ]
    given, z_0 = generator.read(["red star-box"]), generator.codec.encode(shown[None])
    ddim = DDIMScheduler.from_config(generator.scheduler.config)
    ddim.set_timesteps(1)
    generator.predict(z_0, int(ddim.timesteps[0]), given)
    for hook in hooks:
        hook.remove()
    q, k = (held[part][0].view(-1, module.heads, module.inner_dim // module.heads).transpose(0, 1) for part in ("to_q", "to_k"))
    shares = (q @ k.transpose(1, 2) * module.scale).softmax(-1).mean(0)  # [pixels, tokens]
    for one, tokens in zip(found, ([1], [2, 3, 4]), strict=True):
        slow = shares[:, tokens].sum(-1).view(8, 8)
        torch.testing.assert_close(one, (slow - slow.min()) / (slow.max() - slow.min()), atol=1e-4, rtol=1e-4)


def test_sdxl_and_an_export_of_this_package_give_targets_in_the_size_asked_for(
    arguments: list[str], sdxl: Path, parts: Path, tmp_path: Path
) -> None:
    own = export(
        trained(parts, [VISION, ADAPTER, *(Row(part, "frozen") for part in ("encoder.projector", "encoder.language", "unet"))]),
        tmp_path / "own",
    )
    for model, dtype in ((sdxl, "bfloat16"), (own, "float32")):
        out = tmp_path / model.name
        out = out.with_name(f"{out.name}-targets")
        assert main([*arguments, "--model", str(model), "--size", "6", "--layers", "4", "--dtype", dtype, "--out", str(out)]) == 0
        found = AttentionTargets(out, root=tmp_path / "data")["row 2", "2.png"]
        assert set(found) == {"a", "blue", "star"} and all(one.shape == (6, 6) and one.max() == 1 for one in found.values())


def test_toybox_targets_of_both_modes_agree_and_look_at_the_objects(tmp_path: Path) -> None:
    generator, source = open_generator("toybox"), ToyboxSource({"caption": 1.0}, length=2)
    rows = [Picture(r.id, "", pixels(r.target), r.caption or "", generator.words(r.caption or "")) for r in source if r.target is not None]
    looked = look(generator, rows, Targets("toybox", "toybox", inner_steps=1, steps=5), both=True)
    pairs = [agreement(*both) for both in zip(looked.maps["fast"], looked.maps["full"], strict=True)]
    assert all(correlation > 0.9 and iou > 0.7 for correlation, iou in pairs) and min(looked.psnr) > 15
    lifts = []
    for record, row, maps in zip(source, rows, looked.maps["full"], strict=True):
        box = record.boxes[0]
        rows_, columns = slice(int(box.top / 8), -int(-box.bottom // 8)), slice(int(box.left / 8), -int(-box.right // 8))
        shape = next(k for k, w in enumerate(row.words) if w.word.text == box.phrase.split()[-1])
        inside = torch.zeros(8, 8)
        inside[rows_, columns] = 1
        lifts.append(float((maps[shape] * inside).sum() / maps[shape].sum() / inside.mean()))
    assert sum(lifts) / len(lifts) > 1.5, lifts


def test_a_question_is_about_the_picture_that_it_shows() -> None:
    record = next(iter(ToyboxSource({"question": 1.0}, length=1)))
    assert picture_of(record) is record.references[0].image and caption_of(record) == record.caption
    assert caption_of(replace(record, caption=None)) == record.answer
    with pytest.raises(RecordError, match="the question has no picture"):
        picture_of(replace(record, instruction="", references=()))


def test_agreement_of_equal_and_of_opposite_maps() -> None:
    maps = torch.rand(3, 4, 4)
    assert agreement(maps, maps) == (pytest.approx(1.0), 1.0)
    assert agreement(maps, 1 - maps) == (pytest.approx(-1.0), 0.0)


def test_a_word_has_every_token_that_shares_characters_with_it() -> None:
    text = "A t-shirt, it's Ärger"
    offsets = [(0, 1), (1, 3), (3, 5), (5, 9), (9, 10), (10, 13), (13, 15), (15, 18), (18, 21)]
    words = [Word("a", 0, 1), Word("t-shirt", 2, 9), Word("it's", 11, 15), Word("ärger", 16, 21)]
    assert placed(text, offsets, first=1) == [(w, t) for w, t in zip(words, ([1], [2, 3, 4], [6, 7], [8, 9]), strict=True)]


def test_shards_and_a_stopped_build_give_the_files_of_one_run(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def contents(out: Path) -> dict[str, Any]:
        targets = AttentionTargets(out)
        return {id: (shard, *(targets.read(id)[:2]), targets.read(id).maps.tolist()) for id, shard in targets.shards.items()}

    fast = [*arguments, "--mode", "fast"]
    assert main(fast) == 0
    for shard in ("1/2", "0/2"):
        assert main([*fast, "--out", str(tmp_path / "shards"), "--shard", shard]) == 0
    interrupt(monkeypatch, 1)
    with pytest.raises(KeyboardInterrupt):
        main([*fast, "--out", str(tmp_path / "stopped")])
    monkeypatch.undo()
    assert not (tmp_path / "stopped" / "index.json").exists()
    assert main([*fast, "--out", str(tmp_path / "stopped")]) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "shards") == contents(tmp_path / "stopped")
    assert len(contents(tmp_path / "out")) == 3 and len(list((tmp_path / "out").glob("*.safetensors"))) == 2


def test_bad_rows_are_told_and_counted_and_words_past_the_end_too(
    arguments: list[str], records: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [json.loads(line) for line in Path(records).read_text().splitlines()]
    (tmp_path / "data" / "1.png").write_bytes(b"no picture")
    rows[0]["caption"] = "?! ..."
    rows[2]["caption"] = "a red star on a blue box on a green box on a red box"
    gone = {"instruction": "a", "target": "gone.png", "id": "gone"}
    data = write_rows(tmp_path / "data", [*rows, gone, {"instruction": ""}])
    assert main([*arguments, "--data", data, "--mode", "fast", "--compare", "0"]) == 0
    report, told = capsys.readouterr()
    assert "seconds an image" in report and "fast with full" not in report
    for line in (
        "row 1: its caption has no words",
        "row 2: 1.png: not a picture",
        "row 4: gone.png: no such file",
        "row 5: records.jsonl:5",
    ):
        assert line in told
    counts = json.loads((tmp_path / "out" / "build" / "counts.json").read_text())
    assert counts == {"rows": 5, "without words": 1, "unreadable": 3, "words that the text encoder cut": 5, "words": 10}
    assert list(AttentionTargets(tmp_path / "out")) == ["row 2"]


def test_a_model_that_overflows_gives_no_targets(
    arguments: list[str], painter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(painter)
    pipe.vae.encoder.conv_out.weight.data.fill_(float("nan"))
    pipe.save_pretrained(tmp_path / "broken")
    assert main([*arguments, "--model", str(tmp_path / "broken")]) == 0
    out = capsys.readouterr()
    assert "row 0: the model overflows" in out.err and "not a number" in out.out and "nan" not in out.out
    assert len(AttentionTargets(tmp_path / "out")) == 0


def test_a_caption_over_the_limit_of_the_vlm_is_counted(arguments: list[str], records: str, tmp_path: Path) -> None:
    row = json.loads(Path(records).read_text().splitlines()[0])
    data = write_rows(tmp_path / "data", [{**row, "caption": "red " * 2048}])
    assert main([*arguments, "--data", data, "--model", "toybox"]) == 0
    assert json.loads((tmp_path / "out" / "build" / "counts.json").read_text()) == {"rows": 1, "too long": 1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--model", "./gone"], "./gone: no such folder"),
        (["--layers", "5"], "--layers 5: there are cross-attention layers of 4, 8"),
        (["--layers", "up_blocks.7.*"], "no attention layer 'up_blocks.7.*'"),
        (["--steps", "0"], "--steps must be 1 or more, not 0"),
        (["--data", "toybox/dance"], "unknown toybox task 'dance'"),
    ],
)
def test_wrong_arguments_are_one_line(arguments: list[str], changes: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*arguments, *changes]) == 1
    assert message in capsys.readouterr().err


def test_what_is_no_stable_diffusion_and_ids_that_repeat_are_refused(
    arguments: list[str], records: str, painter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    assert main([*arguments, "--model", str(other)]) == 1
    assert "other: holds no model_index.json" in capsys.readouterr().err
    index = json.loads((painter / "model_index.json").read_text())
    (other / "model_index.json").write_text(json.dumps({**index, "_class_name": "FluxPipeline"}))
    assert main([*arguments, "--model", str(other)]) == 1
    assert "other: is a FluxPipeline" in capsys.readouterr().err
    lines = Path(records).read_text().splitlines()
    Path(records).write_text("\n".join([*lines, lines[0]]))
    assert main(arguments) == 1
    assert "rows 1 and 4 have one id, 'row 0'" in capsys.readouterr().err
