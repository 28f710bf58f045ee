from __future__ import annotations

import re
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as PILImage
from PIL import ImageDraw
from PIL.Image import Image

from lightning_mmgen import cli
from lightning_mmgen.data.controls import Edge
from lightning_mmgen.data.instructions import (
    DATA_SETS,
    SHOWN,
    InstructionDataModule,
    InstructionRecipe,
    dilate,
    fill,
    naming,
    read_templates,
)
from lightning_mmgen.data.mixture import Mixture
from lightning_mmgen.data.order import Position, RecordDataset
from lightning_mmgen.data.recipe import BadRow, Sample
from lightning_mmgen.data.sources import JSONLSource, ToyboxSource, write_jsonl
from lightning_mmgen.prompt import MARKER, Box, Record, RecordError, Reference

TEMPLATES = {task: read_templates(task) for task in SHOWN}
PICTURE = PILImage.new("RGB", (8, 8))
SMALL: dict[str, Any] = {"reference_size": 16, "target_size": 16}

# -- templates -------------------------------------------------------------------------------------------------------------------


def words(template: str) -> list[str]:
    return re.findall(r"\w+", template.lower())


@pytest.mark.parametrize("task", SHOWN)
def test_every_task_has_a_hundred_clean_templates(task: str) -> None:
    lines = (Path(cli.__file__).parent / "data" / "templates" / f"{task}.txt").read_text().splitlines()
    assert len(lines) == 100 and lines == list(TEMPLATES[task])
    wanted = {"txt2img": {"caption"}, "transfer": {"ref1", "ref2"}}.get(task, {"caption", "ref1"})
    for line in lines:
        assert Counter(re.findall(r"\{(\w+)\}", line)) == Counter(wanted), line
        assert line == " ".join(line.split()) and line.isascii(), line
        assert (line[0].isupper() or line.startswith("{")) and re.search(r"([.?]|\{caption\}|\{ref1\})$", line), line
        assert line.count('"') % 2 == 0 and MARKER.search(line) is None, line
        assert not re.search(r" [.,:;?]|[.,:;]{2}|\b(\w+) \1\b", line), line


@pytest.mark.parametrize("task", SHOWN)
def test_templates_of_a_task_differ_in_more_than_a_word(task: str) -> None:
    lines = TEMPLATES[task]
    assert len({tuple(words(line)) for line in lines}) == 100
    for a, b in combinations(lines, 2):
        shared, all_ = set(words(a)) & set(words(b)), set(words(a)) | set(words(b))
        assert len(shared) / len(all_) < 0.7, (a, b)
    openings = Counter(tuple(words(line)[:2]) for line in lines)
    assert len(openings) >= 85 and max(openings.values()) <= 5


def test_templates_of_a_folder_are_checked_and_errors_name_the_line(tmp_path: Path) -> None:
    file = tmp_path / "depth.txt"
    for text, reason in (
        ("Use {ref1}: {caption}\nDraw {caption}", "depth.txt:2: the template lacks {ref1}"),
        ("Use {ref1}", "depth.txt:1: the template lacks {caption}"),
        ("Use {ref1} and {ref2}: {caption}", "depth.txt:1: depth has no {ref2} to fill in"),
        ("Use {ref1}: {caption", "depth.txt:1: expected '}' before end of string"),
        ("", "depth.txt: holds no templates"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=re.escape(reason)):
            read_templates("depth", tmp_path)
    file.write_text("In {ref1}: {caption}\n")
    assert read_templates("depth", tmp_path) == ("In {ref1}: {caption}",)
    with pytest.raises(FileNotFoundError, match=r"mask\.txt: no such file"):
        read_templates("mask", tmp_path)


# -- instructions ----------------------------------------------------------------------------------------------------------------


def ref(marker: int, role: str, phrase: str = "") -> Reference:
    return Reference(marker, PICTURE, phrase, role)


def test_references_are_named_by_their_markers_and_phrases() -> None:
    assert (
        naming([ref(1, "subject", "dog"), ref(2, "subject", "dog"), ref(3, "subject", "castle")])
        == "[ref#1] [ref#2] dog and [ref#3] castle"
    )
    assert naming([ref(2, "subject")]) == "[ref#2]" and naming([ref(1, "depth")]) == "[ref#1] depth map"
    assert (
        naming([ref(1, "style", "style")]) == "[ref#1] style"
        and naming([ref(4, "style", "crayon drawing style")]) == "[ref#4] crayon drawing style"
    )


def test_the_papers_examples_come_out_as_they_are_printed() -> None:
    text = fill("Create an image in {ref1} with the caption: {caption}", "styled", "a ball.", [ref(1, "style", "crayon drawing style")])
    assert text == "Create an image in [ref#1] crayon drawing style with the caption: a ball"
    refs = [ref(1, "content"), ref(2, "style")]  # a role decides, not a marker
    text = fill("Draw a picture in the given {ref1}, following the specified {ref2}.", "transfer", None, refs)
    assert text == "Draw a picture in the given [ref#2] style, following the specified [ref#1] content."
    text = fill("Using the {ref1}, generate: {caption}", "depth", "braces {ref1} and 100 %. ", [ref(1, "depth")])
    assert text == "Using the [ref#1] depth map, generate: braces {ref1} and 100 %"


@pytest.mark.parametrize(
    ("task", "caption", "references", "reason"),
    [
        ("txt2img", None, [], "a record for txt2img needs a caption"),
        ("subject", " . ", [ref(1, "subject")], "needs a caption"),
        ("face", "a man", [], "a record for face needs a reference of the role subject"),
        ("transfer", None, [ref(1, "style")], "needs a reference of the role content"),
    ],
)
def test_what_a_template_needs_and_a_record_lacks_is_named(
    task: str, caption: str | None, references: list[Reference], reason: str
) -> None:
    with pytest.raises(RecordError, match=reason):
        fill(TEMPLATES[task][0], task, caption, references)


def recipe(**settings: Any) -> InstructionRecipe:
    return InstructionRecipe(16, 16, None, TEMPLATES, **settings)


def composed(record: Record, count: int, **settings: Any) -> list[Record]:
    return [recipe(**settings).compose(record, None, np.random.default_rng(seed)) for seed in range(count)]


@pytest.mark.parametrize("name", DATA_SETS)
def test_every_template_of_a_data_set_is_drawn_and_makes_a_valid_prompt(name: str) -> None:
    record = ToyboxSource({DATA_SETS[name].toybox: 1.0}, told=True).record(3)
    made = composed(Record(**{**record.__dict__, "task": name}), 900)
    assert len({r.instruction for r in made}) == 100
    for one in made:
        assert one.caption == record.caption and (name == "style_transfer" or str(one.caption) in one.instruction)
        assert sorted({int(k) for k in MARKER.findall(one.instruction)}) == [r.marker for r in record.references]
        assert "{" not in one.instruction


@pytest.mark.parametrize("name", ["internal", "depth", "subjects", "style_transfer"])
def test_without_instructions_a_prompt_is_its_raw_input(name: str) -> None:
    record = ToyboxSource({DATA_SETS[name].toybox: 1.0}, told=True).record(3)
    (one,) = composed(Record(**{**record.__dict__, "task": name}), 1, instructions=False)
    told = "" if name == "style_transfer" else record.caption  # whose captions are discarded
    assert MARKER.sub("", one.instruction).strip() == told and record.caption
    assert [int(k) for k in MARKER.findall(one.instruction)] == [r.marker for r in one.references] == [r.marker for r in record.references]
    assert not any(r.phrase for r in one.references)


def test_too_many_references_and_other_tasks() -> None:
    dogs = tuple(ref(k, "subject", "dog") for k in (1, 2, 3))
    record = Record("[ref#1][ref#2][ref#3]", dogs, PICTURE, "a dog", task="subjects")
    assert composed(record, 1, max_references=3)[0].instruction.count("[ref#") == 3
    with pytest.raises(RecordError, match="3 references are more than max_references=2"):
        composed(record, 1, max_references=2)
    other = Record("keep me", (), PICTURE, task="edit")
    assert composed(other, 1)[0] is other


# -- control pictures ------------------------------------------------------------------------------------------------------------


def scene() -> Image:
    """A bright disc on a dark ground, wider than high."""
    picture = PILImage.new("RGB", (48, 32))
    ImageDraw.Draw(picture).ellipse((16, 8, 32, 24), fill="white")
    return picture


def grey(picture: object) -> np.ndarray[Any, Any]:
    assert isinstance(picture, Image)
    return np.array(picture.convert("L"))


def test_edges_are_thickened_by_a_number_of_pixels_that_is_drawn_anew() -> None:
    point = PILImage.new("L", (9, 9))
    point.putpixel((4, 4), 255)
    assert [int((grey(dilate(point, k)) > 0).sum()) for k in (0, 1, 2)] == [1, 9, 25]
    edge = Reference(1, Edge()(scene()), "", "edge")
    record = Record("[ref#1]", (edge,), scene(), "a disc", task="edge")
    made = {grey(r.references[0].image).tobytes() for r in composed(record, 30)}
    expected = {grey(dilate(edge.image, k).crop((8, 0, 40, 32))).tobytes() for k in (0, 1, 2)}  # type: ignore[arg-type]
    assert made == expected
    assert len({grey(r.references[0].image).tobytes() for r in composed(record, 30, edge_dilation=0)}) == 1


def test_edges_are_those_of_the_picture_its_depth_or_its_mask() -> None:
    depth, mask = PILImage.new("L", (48, 32)), PILImage.new("L", (48, 32))
    depth.paste(200, (20, 0, 28, 32))
    mask.paste(255, (12, 4, 20, 28))
    box = Box("disc", 16, 8, 32, 24, mask=mask)
    record = Record("a disc", (), scene(), "a disc", task="edge", boxes=(box,), controls={"depth": depth})
    counts = Counter(grey(r.references[0].image).tobytes() for r in composed(record, 300, makers={"edge": Edge()}))
    expected = {grey(dilate(Edge()(p), k).crop((8, 0, 40, 32))).tobytes() for p in (scene(), depth, mask) for k in (0, 1, 2)}
    assert set(counts) == expected and len(expected) == 9 and min(counts.values()) > 15
    plain = composed(record, 20, makers={"edge": Edge()}, edge_dilation=0)
    assert {grey(r.references[0].image).tobytes() for r in plain} == {grey(Edge()(scene()).crop((8, 0, 40, 32))).tobytes()}


def test_masks_are_those_of_all_boxes_and_other_kinds_come_with_the_record() -> None:
    left, right = PILImage.new("L", (32, 32)), PILImage.new("L", (32, 32))
    left.paste(255, (0, 0, 8, 32))
    right.paste(255, (20, 0, 32, 32))
    target = PILImage.new("RGB", (32, 32))
    boxes = (Box("a", 0, 0, 8, 32, mask=left), Box("b", 20, 0, 32, 32, mask=right), Box("c", 0, 0, 9, 9))
    record = Record("x", (), target, "a and b", task="mask", boxes=boxes)
    shown = grey(composed(record, 1)[0].references[0].image) > 127
    assert (shown == ((np.arange(32) < 8) | (np.arange(32) >= 20))[None]).all()
    for kind in ("depth", "sketch"):
        record = Record("x", (), target, "a", task=kind, controls={kind: left})
        made = composed(record, 1)[0].references
        assert [(r.marker, r.role) for r in made] == [(1, kind)] and (grey(made[0].image) == grey(left)).all()


@pytest.mark.parametrize("kind", ["depth", "mask", "edge", "sketch"])
def test_a_control_picture_that_nothing_makes_is_a_bad_row(kind: str) -> None:
    with pytest.raises(RecordError, match=f"no {kind} picture, and nothing here that makes one"):
        composed(Record("x", (), PICTURE, "a", task=kind), 1)


# -- data module -----------------------------------------------------------------------------------------------------------------


def toybox(**settings: Any) -> InstructionDataModule:
    data = InstructionDataModule("toybox", **{**SMALL, "batch_size": 8, **settings})
    data.setup("fit")
    return data


def test_the_default_ratios_are_those_of_table_one() -> None:
    assert [d.ratio for d in DATA_SETS.values()] == [0.15, 0.05, 0.06, 0.06, 0.06, 0.02, 0.30, 0.05, 0.05, 0.10, 0.10]
    mix = toybox().train
    assert isinstance(mix, Mixture) and len(mix) == 54_613  # 16384 subjects / 0.3
    drawn = Counter(mix.names[mix.locate(i)[0]] for i in range(20_000))
    assert all(abs(drawn[name] / 20_000 - d.ratio) < 0.01 for name, d in DATA_SETS.items())


def test_the_toybox_has_every_task_and_no_caption_tells_what_a_reference_shows() -> None:
    data = toybox()
    seen = Counter[str]()
    dataset = RecordDataset(data.train, data.recipe, 0)
    for i in range(250):
        sample = dataset[Position(i, 0)]
        assert isinstance(sample, Sample)
        record, scene = sample.record, sample.record.extra["truth"].scene
        seen[record.task] += 1
        assert [r.role for r in record.references] == list(SHOWN[DATA_SETS[record.task].task])[: len(record.references)] or (
            {r.role for r in record.references} == {"subject"}
        )
        if record.task in ("subjects", "celeba", "celeb_hq"):
            assert not {"face", "portrait", "person"} & set(words(record.instruction))
            assert not any(p.toy.colour in record.instruction.split(" on a ")[0] for p in scene.toys)
        if record.task == "styled":
            assert f"{scene.style} style" not in record.instruction
    assert set(seen) == set(DATA_SETS)
    names = [data.train.sources[data.train.names.index(n)] for n in ("internal", "wikiart")]  # type: ignore[attr-defined]
    assert names[0].record(0).instruction != names[1].record(0).instruction


def batches(data: InstructionDataModule) -> list[tuple[list[str], list[float]]]:
    return [(b.instructions, [float(g.pixels.double().mean()) for g in b.references]) for b, _ in data.train_dataloader()]


def test_templates_follow_the_sample_over_workers_and_change_with_the_epoch() -> None:
    data = toybox(length=64)
    whole = batches(data)
    assert batches(toybox(length=64, workers=2)) == whole and len(whole) == 8
    data._resume = (0, 40)
    assert batches(data) == whole[5:]
    data._resume = (1, 0)
    assert batches(data) != whole


def test_the_held_out_set_is_the_same_mixture_of_held_out_toys_without_augmentation() -> None:
    data = toybox(held_out="toybox", ratios={"edge": 0.5, "styled": 0.5})
    assert data.held_out is not None and len(data.held_out) == 256
    records = data.held_out_records(12)
    assert records == data.held_out_records(12) and {r.task for r in records} == {"edge", "styled"}
    assert data.held_out_recipe.edge_dilation == 0 and data.recipe.edge_dilation == 2  # type: ignore[attr-defined]
    assert all(r.instruction.count("[ref#1]") == 1 for r in records)


def folder(path: Path, task: str, count: int) -> str:
    return str(write_jsonl(ToyboxSource({task: 1.0}, length=count, told=True), path))


def test_data_sets_of_files_are_mixed_and_a_bad_row_says_where_it_is(tmp_path: Path) -> None:
    sources: dict[str, Any] = {"depth": folder(tmp_path / "d", "depth", 6), "subjects": JSONLSource(folder(tmp_path / "s", "subject", 6))}
    data = InstructionDataModule(sources, {"depth": 0.5, "subjects": 0.5}, held_out=dict(sources), max_references=1, bad_rows=0.9, **SMALL)
    data.setup("fit")
    items = [RecordDataset(data.train, data.recipe, 0)[Position(i, 0)] for i in range(12)]
    many = sorted(i for i in range(6) if len(sources["subjects"].record(i).references) > 1)
    assert many and sorted(item.reason for item in items if isinstance(item, BadRow)) == [
        f"subjects row {i + 1}: 2 references are more than max_references=1" for i in many
    ]
    assert Counter(item.record.task for item in items if isinstance(item, Sample)) == {"depth": 6, "subjects": 6 - len(many)}


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"train": "internet"}, "sources are given by the names of their data sets, or are 'toybox', not 'internet'"),
        ({"train": {"dep": "x.jsonl"}}, "unknown data set 'dep'; there are internal, wikiart, depth"),
        ({"ratios": {"depth": 0.5, "foo": 0.5}}, "unknown data set 'foo'"),
        ({"ratios": {"depth": -0.5, "mask": 1.5}}, "ratios must be over 0: depth -0.5, mask 1.5"),
        ({"ratios": {"depth": 0.5, "mask": 0.4}}, "ratios must sum to 1, not 0.9: depth 0.5, mask 0.4"),
        ({"train": {"depth": "x.jsonl"}}, "there are ratios but no sources for celeb_hq, celeba, edge"),
        ({"train": {"depth": "x.jsonl"}, "ratios": {"depth": 1.0}}, r"x\.jsonl: no such file"),
        ({"max_references": 0}, "max_references must be 1 or more"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_anything_is_read(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=reason):
        InstructionDataModule(**{"train": "toybox", **SMALL, **settings})


def test_own_templates_take_the_place_of_the_packages(tmp_path: Path) -> None:
    (tmp_path / "txt2img.txt").write_text("Mine: {caption}\n")
    data = toybox(ratios={"internal": 1.0}, templates=str(tmp_path))
    assert all(t.startswith("Mine: ") for t in next(iter(data.train_dataloader()))[0].instructions)
    (tmp_path / "txt2img.txt").write_text("Mine\n")
    with pytest.raises(ValueError, match=r"txt2img\.txt:1: the template lacks {caption}"):
        toybox(ratios={"internal": 1.0}, templates=str(tmp_path))


INSTRUCT = """
  class_path: InstructionDataModule
  init_args:
    train:
      internal: {class_path: ToyboxSource, init_args: {tasks: {caption: 1.0}, length: 16, told: true}}
      styled: FILE
    ratios: {internal: 0.75, styled: 0.25}
    target_size: 16
    batch_size: 2
"""
RETRIEVE = """
  class_path: RetrievalDataModule
  init_args: {train: toybox, held_out: toybox, context: 2, target_size: 16, batch_size: 2}
"""


@pytest.mark.parametrize("data", [INSTRUCT, RETRIEVE])
def test_an_experiment_trains_on_the_data_module_by_its_short_name(
    data: str, experiment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = data.replace("FILE", folder(tmp_path / "styled", "style", 6))
    text = re.sub(r"\ndata:.*?\ntrainer:", lambda _: f"\ndata:{data}trainer:", experiment.read_text(), flags=re.DOTALL)
    (tmp_path / "own.yaml").write_text(text.replace("    sampler:", "    condition_dropout: {both: 0.1, references: 0.1}\n    sampler:"))
    trained = cli.main(["fit", "-c", "own.yaml"])
    assert trained.trainer.global_step == 2 and type(trained.datamodule).__name__ == data.split("class_path: ")[1].split("\n")[0]
    assert trained.model.condition_dropout.references == 0.1
