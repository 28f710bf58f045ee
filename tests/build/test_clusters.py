from __future__ import annotations

import fcntl
import json
import signal
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image as PILImage
from transformers import CLIPImageProcessor, CLIPModel, ViTForImageClassification, ViTImageProcessorPil

from lightning_mmgen.build import neighbours
from lightning_mmgen.build.corpus import open_corpus
from lightning_mmgen.build.journal import Journal
from lightning_mmgen.build.neighbours import Neighbours
from lightning_mmgen.data.sources import JSONLSource
from lightning_mmgen.tools.data import check
from lightning_mmgen.tools.main import main

from ..conftest import CLIP_WORDS
from .conftest import make_classifier

DOMAINS = ["blue", "a blue", "star red"]
Row = dict[str, Any]


def write(path: Path, rows: list[Row]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def rows(tmp_path: Path) -> list[Row]:
    """Sixty pictures, written: of each of five prototypes ten with some noise, and the first ten with a trace more; URLs repeat."""
    rng, out = np.random.default_rng(0), []
    prototypes = rng.integers(0, 255, (5, 16, 16, 3))
    (tmp_path / "in").mkdir()
    for i in range(60):
        picture = prototypes[i % 5] + np.random.default_rng(i % 50).normal(0, 25, (16, 16, 3))
        picture += np.random.default_rng(100 + i).normal(0, 2, (16, 16, 3))
        PILImage.fromarray(picture.clip(0, 255).astype(np.uint8)).save(tmp_path / "in" / f"{i}.png")
        out.append({"image": f"{i}.png", "caption": f"a cat {i}.", "url": f"https://a.example/{i % 37}"})
    write(tmp_path / "rows.jsonl", out)
    return out


@pytest.fixture
def arguments(rows: list[Row], clip: Path, tmp_path: Path) -> list[str]:
    """A build with three domains; what comes later in the list wins."""
    (tmp_path / "domains.txt").write_text("\n".join(DOMAINS))
    files = ["--images", str(tmp_path / "in"), "--captions", str(tmp_path / "rows.jsonl"), "--domains", str(tmp_path / "domains.txt")]
    options = ["--clip", str(clip), "--batch-size", "7", "--device", "cpu", "--duplicate", "0.999", "--neighbours", "8"]
    return ["build", "clusters", *files, *options, "--out", str(tmp_path / "out")]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a ViT that tells "bad" from "good"."""
    return make_classifier(tmp_path_factory.mktemp("classifier"), "bad", "good")


def built(out: Path) -> dict[int, list[int]]:
    """The pictures of each record by their rows, the target first."""
    records = list(JSONLSource(str(out / "records.jsonl")))
    return {int(r.id): [int(Path(str(p)).stem) for p in (r.target, *(x.image for x in r.references))] for r in records}


def counts(out: Path) -> dict[str, int]:
    return dict(json.loads((out / "counts.json").read_text()))


def stored(out: Path, width: int = 8) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.uint8]]:
    vectors = np.fromfile(out / "embeddings" / "vectors.f16", np.float16).reshape(-1, width).astype(np.float32)
    return vectors, np.fromfile(out / "embeddings" / "domains.u8", np.uint8)


def slow(out: Path, rows: list[Row], duplicate: float = 0.999, most: int = 5, least: int = 4, near: int = 8) -> dict[int, list[int]]:
    """The clusters by all cosines, picture by picture."""
    vectors, domains = stored(out)
    cosine = vectors @ vectors.T
    clusters = {}
    for i in np.flatnonzero(domains).tolist():
        others = [j for j in range(len(rows)) if j != i and domains[j] == domains[i]]
        cluster = [i]
        for j in sorted(others, key=lambda j: -cosine[i, j])[:near]:
            alike = any(cosine[j, k] > duplicate for k in cluster)
            known = rows[j].get("url") in [rows[k]["url"] for k in cluster if "url" in rows[k]]
            if not alike and not known:
                cluster.append(j)
        if len(cluster[:most]) >= least:
            clusters[i] = cluster[:most]
    return clusters


def test_embeddings_and_domains_are_those_of_the_clip(arguments: list[str], rows: list[Row], clip: Path, tmp_path: Path) -> None:
    (tmp_path / "in" / "0.png").unlink()
    with PILImage.open(tmp_path / "in" / "1.png") as picture:
        PILImage.fromarray(np.pad(np.asarray(picture), ((0, 0), (5, 5), (0, 0)))).save(tmp_path / "in" / "wide.png")
    write(tmp_path / "rows.jsonl", [*rows, {"image": "wide.png", "caption": "x"}])
    assert main(arguments) == 0
    model = CLIPModel.from_pretrained(clip)
    processor = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    vectors, domains = stored(tmp_path / "out")
    texts = []
    with torch.no_grad():
        for domain in DOMAINS:
            ids = torch.tensor([[2, *(CLIP_WORDS.index(word) for word in domain.split()), 3]])
            texts.append(model.get_text_features(input_ids=ids).pooler_output[0])
        for i in range(1, 60):
            with PILImage.open(tmp_path / "in" / f"{i}.png") as picture:
                image = model.get_image_features(**processor(picture, return_tensors="pt")).pooler_output[0]
            np.testing.assert_allclose(vectors[i], (image / image.norm()).numpy(), atol=1e-3)
            cosines = [float(image @ text / text.norm()) for text in texts]
            assert domains[i] == 1 + int(np.argmax(cosines))
    assert not vectors[0].any() and not domains[0] and len(set(domains[1:].tolist())) > 1
    np.testing.assert_array_equal(vectors[60], vectors[1])


def test_clusters_are_the_nearest_of_the_domain_without_duplicates_and_same_urls(
    arguments: list[str], rows: list[Row], tmp_path: Path
) -> None:
    assert main(arguments) == 0
    expected = slow(tmp_path / "out", rows)
    assert built(tmp_path / "out") == expected and len(expected) > 20
    told = counts(tmp_path / "out")
    assert told["rows"] == told["embedded"] == 60 and told["clusters"] == len(expected)
    assert told["clusters"] + told.get("clusters under --min-size", 0) == 60
    assert told["neighbours near-duplicate"] >= 20 and told["neighbours of the same URL"] > 0
    assert sum(n for name, n in told.items() if name.startswith("domain ")) == 60
    assert check(str(tmp_path / "out" / "records.jsonl")) == 0


def test_a_record_is_its_target_after_its_neighbours_and_their_captions(arguments: list[str], rows: list[Row], tmp_path: Path) -> None:
    rows[1]["caption"] = "one\n [ref#7] cat."
    write(tmp_path / "rows.jsonl", rows)
    assert main(arguments) == 0
    record = next(r for r in JSONLSource(str(tmp_path / "out" / "records.jsonl")) if r.id == "00000001")
    row, *others = built(tmp_path / "out")[1]
    assert row == 1 and record.caption == "one cat." and record.task == "retrieval"
    assert record.instruction == " ".join(f"[ref#{k}] a cat {j}." for k, j in enumerate(others, 1)) + " Generate: one cat."
    assert [(r.marker, r.phrase, r.role) for r in record.references] == [(k, f"a cat {j}", "neighbour") for k, j in enumerate(others, 1)]
    for j, picture in zip([row, *others], record.pictures()[-1:] + record.pictures()[:-1], strict=True):
        assert (tmp_path / "out" / str(picture)).read_bytes() == (tmp_path / "in" / f"{j}.png").read_bytes()


def test_neighbours_show_the_prototype_of_the_target(arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "domains.txt").write_text("a cat")
    assert main([*arguments, "--neighbours", "5", "--size", "3", "--min-size", "2"]) == 0
    clusters = built(tmp_path / "out")
    same = [len({row % 5 for row in cluster}) == 1 for cluster in clusters.values()]
    assert len(clusters) > 50 and np.mean(same) > 0.9


@pytest.mark.parametrize(
    ("options", "rules"),
    [
        ({"--duplicate": "1.1"}, {"duplicate": 1.1}),
        ({"--size": "3", "--min-size": "3"}, {"most": 3, "least": 3}),
        ({"--min-size": "5"}, {"least": 5}),
        ({"--neighbours": "4"}, {"near": 4}),
    ],
)
def test_every_rule_has_its_option(
    options: dict[str, str], rules: dict[str, Any], arguments: list[str], rows: list[Row], tmp_path: Path
) -> None:
    assert main([*arguments, *(word for pair in options.items() for word in pair)]) == 0
    assert built(tmp_path / "out") == slow(tmp_path / "out", rows, **rules) != slow(tmp_path / "out", rows)


def test_rows_that_cannot_be_used_are_counted(
    arguments: list[str], rows: list[Row], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in" / "3.png").write_text("text")
    (tmp_path / "in" / "4.png").unlink()
    rows[5]["caption"] = " [ref#1] "
    rows[6]["url"] = 7
    rows[7]["image"] = "../rows.jsonl"
    write(tmp_path / "rows.jsonl", rows)
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write("{\n[]\n")
    assert main([*arguments, "--workers", "1"]) == 0
    told = counts(tmp_path / "out")
    assert (told["rows"], told["embedded"]) == (62, 55)
    assert (told["unreadable"], told["no caption"], told["bad row"]) == (3, 1, 3)
    assert not {3, 4, 5, 6, 7} & {row for cluster in built(tmp_path / "out").values() for row in cluster}
    errors = capfd.readouterr().err
    assert "rows.jsonl: row 7: url must be a string" in errors and "row 5: 4.png: no such file" in errors


def test_scores_of_rows_drop_the_low(arguments: list[str], rows: list[Row], tmp_path: Path) -> None:
    scores: list[float | None] = [None, float("nan"), 0.5, 0.49, *(float(i) for i in range(4, 60))]
    write(tmp_path / "rows.jsonl", [row | {"score": score} for row, score in zip(rows, scores, strict=True)])
    assert main([*arguments, "--min-score", "0.5"]) == 0
    assert np.flatnonzero(stored(tmp_path / "out")[1] == 0).tolist() == [0, 1, 3]
    assert (counts(tmp_path / "out")["no score"], counts(tmp_path / "out")["under --min-score"]) == (1, 2)


def test_a_classifier_drops_the_low(arguments: list[str], classifier: Path, tmp_path: Path) -> None:
    model, processor = ViTForImageClassification.from_pretrained(classifier), ViTImageProcessorPil.from_pretrained(classifier)
    scores = []
    for i in range(60):
        with PILImage.open(tmp_path / "in" / f"{i}.png") as picture, torch.no_grad():
            scores.append(float(model(**processor(picture, return_tensors="pt")).logits.softmax(-1)[0, 1]))
    low, high = sorted(set(np.round(scores, 6)))[19:21]
    least = (low + high) / 2
    assert main([*arguments, "--quality", str(classifier), "--quality-label", "good", "--min-score", str(least)]) == 0
    dropped = [i for i, score in enumerate(scores) if score < least]
    assert np.flatnonzero(stored(tmp_path / "out")[1] == 0).tolist() == dropped and len(dropped) > 10
    assert counts(tmp_path / "out")["under --min-score"] == len(dropped)


def contents(out: Path) -> tuple[list[str], dict[str, int], bytes, set[str]]:
    pictures = {p.relative_to(out).as_posix() for p in out.rglob("*.png")}
    return sorted((out / "records.jsonl").read_text().splitlines()), counts(out), (out / "embeddings/vectors.f16").read_bytes(), pictures


def test_shards_and_stopped_builds_equal_one_run(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lightning_mmgen.build.clusters.QUERIES", 8)
    assert main(arguments) == 0
    for shard in ("2/3", "0/3", "1/3"):
        assert main([*arguments, "--out", str(tmp_path / "shards"), "--shard", shard]) == 0
        assert ("the other shards are not done yet" in capsys.readouterr().out) == (shard != "1/3")
    add, left = Journal.add, [0]

    def adding(journal: Journal, *args: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        add(journal, *args)

    monkeypatch.setattr(Journal, "add", adding)
    for steps in (4, 6, 7):  # two among the embeddings, one among the clusters
        left[0] = steps
        with pytest.raises(KeyboardInterrupt):
            main([*arguments, "--out", str(tmp_path / "stopped")])
    assert 1 < len((tmp_path / "stopped" / "journal.jsonl").read_text().splitlines()) < 12
    monkeypatch.setattr(Journal, "add", add)
    assert main([*arguments, "--out", str(tmp_path / "stopped")]) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "shards") == contents(tmp_path / "stopped")
    assert main(arguments) == 0 and contents(tmp_path / "out") == contents(tmp_path / "shards")


def test_pictures_that_went_after_they_were_embedded_are_left_out(arguments: list[str], tmp_path: Path) -> None:
    assert main([*arguments, "--shard", "0/2"]) == 0
    (tmp_path / "in" / "0.png").unlink()
    (tmp_path / "in" / "17.png").unlink()
    assert main([*arguments, "--shard", "1/2"]) == 0
    clusters, told = built(tmp_path / "out"), counts(tmp_path / "out")
    assert clusters and not any({0, 17} & set(cluster) for cluster in clusters.values())
    assert told["pictures gone"] > 2 and told["clusters"] + told["clusters under --min-size"] == told["embedded"] == 60
    assert check(str(tmp_path / "out" / "records.jsonl")) == 0


def test_one_process_alone_looks_up_the_neighbours(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out" / "embeddings").mkdir(parents=True)
    with (tmp_path / "out" / "embeddings" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main(arguments) == 0
        assert "another process is looking up the neighbours" in capsys.readouterr().out
        assert not (tmp_path / "out" / "records.jsonl").exists()
    assert main(arguments) == 0 and built(tmp_path / "out")


def test_ray_embeds_as_this_process_does(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_enable_worker_prestart", "0")
    assert main(arguments) == 0
    on_sigterm = signal.getsignal(signal.SIGTERM)
    assert main([*arguments, "--engine", "ray", "--workers", "1", "--out", str(tmp_path / "ray")]) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "ray")
    assert signal.getsignal(signal.SIGTERM) is on_sigterm, "what Ray does on SIGTERM ends with it"


def test_parquet_equals_jsonl(arguments: list[str], rows: list[Row], tmp_path: Path) -> None:
    rows[3] |= {"url": None, "score": 1.5}
    write(tmp_path / "rows.jsonl", rows)
    table = datasets.Dataset.from_list([{"score": None, "other": 1, **row} for row in rows])
    table.to_parquet(tmp_path / "rows.parquet")
    a, b = (open_corpus(str(tmp_path / name)) for name in ("rows.jsonl", "rows.parquet"))
    assert [a[i] for i in range(len(a))] == [b[i] for i in range(len(b))] and len(a) == len(b) == 60
    assert b[3].score == 1.5 and not b[3].url and b[4].url
    assert main([*arguments, "--captions", str(tmp_path / "rows.parquet")]) == 0
    assert built(tmp_path / "out") == slow(tmp_path / "out", [{k: v for k, v in row.items() if v is not None} for row in rows])


def peak(run: Callable[[], Any]) -> int:
    tracemalloc.start()
    run()
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return most


def test_rows_and_vectors_stay_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "rows.jsonl", [{"image": f"{i}.png", "caption": "word " * 400} for i in range(10_000)])  # 20 MB
    assert peak(lambda: [open_corpus(str(tmp_path / "rows.jsonl"))[i] for i in (0, 5000, 9999)][-1].image == "9999.png") < 1e6
    monkeypatch.setattr(neighbours, "BLOCK", 1000)
    made = np.memmap(tmp_path / "vectors", np.float16, "w+", shape=(40_000, 64))  # 5 MB, of which a tenth counts
    made[:] = np.random.default_rng(0).normal(0, 0.125, made.shape)
    index: list[Neighbours] = []
    assert peak(lambda: index.append(Neighbours(made, np.arange(0, 40_000, 10)))) < 1e6
    assert index[0].index.ntotal == 4000


def clustered(rows: int, width: int) -> npt.NDArray[np.float16]:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(rows // 20, width))
    vectors = centres[rng.integers(0, len(centres), rows)] + rng.normal(0, 0.3, (rows, width))
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float16)


@pytest.mark.parametrize(("kind", "most", "recall"), [("flat", 0, 1.0), ("auto", 2500, 1.0), ("auto", 2499, 0.9)])
def test_neighbours_are_those_of_all_cosines(kind: str, most: int, recall: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "LEAST_FOR_PQ", 2000)
    monkeypatch.setattr(neighbours, "MOST_FLAT", most)
    vectors = clustered(3000, 16)
    rows = np.arange(len(vectors))[500:]
    index = Neighbours(vectors, rows, kind)
    assert (index.wider > 1) == (recall < 1)
    whole = vectors.astype(np.float32)
    found = 0
    for row, near, cosines in index.search(rows[:200], 10):
        cosine = whole[rows] @ whole[row]
        cosine[row - 500] = -2
        best = rows[np.argsort(-cosine)[:10]]
        found += len(set(best) & set(near))
        some = whole[[row, *near]]
        np.testing.assert_allclose(cosines, some @ some.T, atol=1e-6)
        assert len(near) == 10 and row not in near and (np.diff(cosines[0, 1:]) <= 1e-6).all()
    assert found / 2000 >= recall - 0.005


def test_a_small_domain_gives_what_it_has() -> None:
    vectors = clustered(100, 8)
    for rows in (np.array([7]), np.array([7, 9, 30])):
        (row, near, cosines) = next(Neighbours(vectors, rows, "ivfpq").search(rows[:1], 10))
        assert row == 7 and sorted(near) == rows[1:].tolist() and cosines.shape == (len(rows), len(rows))


def test_what_a_user_can_mend_is_one_line(
    arguments: list[str], rows: list[Row], classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    datasets.Dataset.from_list([{"picture": "0.png", "caption": "x"}]).to_parquet(tmp_path / "bad.parquet")
    (tmp_path / "empty.jsonl").write_text("")
    for changes, message in (
        (["--images", str(tmp_path / "gone")], "gone: no such folder"),
        (["--captions", str(tmp_path / "gone.jsonl")], "gone.jsonl: no such file"),
        (["--captions", str(tmp_path / "empty.jsonl")], "empty.jsonl: holds no rows"),
        (["--captions", str(tmp_path / "domains.txt")], "domains.txt: is neither .jsonl nor .parquet"),
        (["--captions", str(tmp_path / "bad.parquet")], "bad.parquet: has no column 'image'"),
        (["--domains", str(tmp_path / "gone.txt")], "gone.txt: no such file"),
        (["--clip", str(classifier)], "is a vit, not a CLIP"),
        (["--quality", str(classifier)], "--quality needs a --min-score"),
        (["--quality", str(classifier), "--min-score", "0.5", "--quality-label", "nice"], "has no label 'nice'; there are bad, good"),
        (["--min-size", "6"], "needs 2 <= --min-size <= --size <= --neighbours + 1"),
        (["--batch-size", "0"], "--batch-size must be 1 or more"),
    ):
        assert main([*arguments, "--out", str(tmp_path / "new"), *changes]) == 1
        error = capsys.readouterr().err
        assert message in error and len(error.strip().splitlines()[-1]) < 420
    assert main(arguments) == 0
    assert main([*arguments, "--duplicate", "0.5"]) == 1
    assert "was begun with other settings (duplicate)" in capsys.readouterr().err
    write(tmp_path / "rows.jsonl", rows[:-1])
    assert main(arguments) == 1
    assert "other settings (captions)" in capsys.readouterr().err
