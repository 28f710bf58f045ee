from __future__ import annotations

import io
import json
import os
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from lightning_mmgen.batch import Batch
from lightning_mmgen.data.datamodule import MultimodalDataModule
from lightning_mmgen.data.images import encode_png, open_picture
from lightning_mmgen.data.order import Position, RecordDataset, StreamDataset
from lightning_mmgen.data.recipe import BadRow, Recipe
from lightning_mmgen.data.shards import ShardIndex, WebDatasetSource, WebDatasetStream, expand, write_shards
from lightning_mmgen.data.sources import RowError, ToyboxSource, line_ends, open_source
from lightning_mmgen.data.streams import DatasetStream, Lane, Stream
from lightning_mmgen.prompt import Record, RecordError

ROWS = list(ToyboxSource({"subject": 1.0, "crops": 1.0}, length=23))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """23 rows in shards of 5: the last has 3."""
    folder = tmp_path_factory.mktemp("shards")
    write_shards(ROWS, folder, rows=5)
    return folder


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def copied(shards: Path, folder: Path) -> Path:
    for path in shards.glob("*.tar"):
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


# -- by place --------------------------------------------------------------------------------------------------------------------


def test_rows_of_shards_come_back_in_any_order(shards: Path) -> None:
    source = open_source(f"{shards}/shard-{{00000..00004}}.tar")
    assert isinstance(source, WebDatasetSource) and len(source) == 23
    for i in np.random.default_rng(0).permutation(23):
        row = source.record(int(i))
        assert (row.id, row.instruction, row.boxes) == (ROWS[i].id, ROWS[i].instruction, ROWS[i].boxes)
        assert row.target is not None and ROWS[i].target is not None
        assert np.array_equal(np.array(open_picture(row.target)), np.array(open_picture(ROWS[i].target)))
    assert source.name(22) == "shard-00004.tar:3" and source.fingerprint() == WebDatasetSource(f"{shards}/*.tar").fingerprint()
    assert source.edges.nbytes <= 4 * (23 + 5)


def test_a_caption_beside_a_picture_is_a_row(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        add(tar, "x/" + "é" * 120 + ".jpg", b"picture")  # a name that needs headers of its own
        add(tar, "x/" + "é" * 120 + ".txt", b"a cat\n")
    row = WebDatasetSource(str(tmp_path / "a.tar")).record(0)
    assert (row.instruction, row.caption, row.target, row.id) == ("a cat", "a cat", b"picture", "x/" + "é" * 120)


def test_an_index_is_built_once_and_again_when_its_shard_changes(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = copied(shards, tmp_path)
    path = folder / "shard-00000.tar"
    edges = ShardIndex(path).edges
    with monkeypatch.context() as patch:
        patch.setattr(ShardIndex, "_scan", lambda *_: pytest.fail("the index was there"))
        assert np.array_equal(ShardIndex(path).edges, edges)
    kept = folder / "shard-00000.tar.rows"
    for damage in (b"", kept.read_bytes()[:-2]):
        kept.write_bytes(damage)
        assert np.array_equal(ShardIndex(path).edges, edges)
    os.utime(path, (0, 0))
    path.write_bytes((folder / "shard-00004.tar").read_bytes())
    assert len(WebDatasetSource(str(path))) == 3
    assert len(WebDatasetSource(str(path), index=str(tmp_path / "elsewhere"))) == 3
    assert [p.name for p in (tmp_path / "elsewhere").iterdir()] == ["shard-00000.tar.rows"]


@pytest.mark.parametrize("cut", ["inside a member", "between rows", "a damaged header"])
def test_a_truncated_shard_is_counted(shards: Path, tmp_path: Path, cut: str) -> None:
    path = copied(shards, tmp_path) / "shard-00001.tar"
    edges, data = ShardIndex(path).edges.astype(int) * 512, path.read_bytes()
    before, middle = data[: edges[3]], data[: (edges[3] + edges[4]) // 2 + 100]
    damaged = before + b"\1" * 512 + data[edges[3] + 512 :]
    path.write_bytes({"inside a member": middle, "between rows": before, "a damaged header": damaged}[cut])
    kept = 3 if cut == "inside a member" else 2  # the last row may lack members that would have followed
    with pytest.warns(UserWarning, match=f"shard-00001.tar: cut off or damaged after {kept} rows"):
        source = WebDatasetSource(str(path))
    items = [RecordDataset(source, Recipe(16, 32), 0)[Position(i, 0)] for i in range(len(source))]
    assert len(items) == kept + 1 and not any(isinstance(item, BadRow) for item in items[:-1])
    assert isinstance(items[-1], BadRow) and items[-1].reason.startswith(f"shard-00001.tar:{kept + 1}: the archive is cut off or damaged")
    streamed = list(WebDatasetStream(str(path)).read(0))
    assert len(streamed) == kept + 1 and [isinstance(r, RowError) for r in streamed] == [False] * kept + [True]


def test_bad_members_are_bad_rows(tmp_path: Path) -> None:
    picture, record = encode_png(ROWS[0].target or b""), json.dumps({"instruction": "draw", "target": "png"}).encode()
    rows: dict[str, tuple[dict[str, bytes], str]] = {
        "good": ({"json": record, "png": picture}, ""),
        "lacking": ({"json": record}, "target is 'png', and the row has no such member"),
        "code": ({"json": record, "png": picture, "pyd": b"cos\nsystem"}, "code.pyd: a member is a file of the kind json, txt, png"),
        "two": ({"txt": b"a", "png": picture, "jpg": picture}, "a row has a .json, or a .txt and one picture, not .txt, .png, .jpg"),
        "torn": ({"json": b"{", "png": picture}, "not JSON"),
        "outside": ({"json": record.replace(b'"png"', b'"/etc/hostname"')}, "target is '/etc/hostname', and the row has no such member"),
    }
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for key, (members, _) in rows.items():
            for extension, data in members.items():
                add(tar, f"{key}.{extension}", data)
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tar.addfile(link)
    source, stream = WebDatasetSource(str(tmp_path / "a.tar")), WebDatasetStream(str(tmp_path / "a.tar"))
    reasons = [reason for _, reason in rows.values()] + ["link.png: a member is a file"]
    for i, (reason, row) in enumerate(zip(reasons, stream.read(0), strict=True)):
        if not reason:
            assert isinstance(row, Record) and source.record(i) == row
            continue
        with pytest.raises(RowError) as error:
            source.record(i)
        assert str(error.value).startswith(f"a.tar:{i + 1}: {reason}") and str(row) == str(error.value)


def test_what_cannot_be_opened_is_one_line(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="shard-00005.tar: no such shard"):
        WebDatasetSource(f"{shards}/shard-{{00003..00009}}.tar")
    for kind in (WebDatasetSource, WebDatasetStream):
        with pytest.raises(FileNotFoundError, match="no such shard"):
            kind(f"{tmp_path}/*.tar")
        with pytest.raises(ValueError, match="no shards are given"):
            kind([])
    for url in ("pipe:cat a.tar", "ftp://a/b.tar", "https://a/b.tar::c", "pipe://cat a.tar"):
        with pytest.raises(ValueError, match="a shard is a local file or a URL of http"):
            WebDatasetStream(url)
    with tarfile.open(tmp_path / "a.tar", "w:gz") as tar:
        add(tar, "a.txt", b"a")
    with pytest.raises(ValueError, match="a.tar: is no uncompressed tar file"):
        WebDatasetSource(str(tmp_path / "a.tar"))
    with tarfile.open(tmp_path / "b.tar", "w"):
        pass
    with pytest.raises(ValueError, match="b.tar: holds no rows"):
        WebDatasetSource(str(tmp_path / "b.tar"))
    assert expand("a-{08..11}-{0..1}.tar")[:3] == ["a-08-0.tar", "a-08-1.tar", "a-09-0.tar"]


def test_line_ends_are_those_of_the_lines(tmp_path: Path) -> None:
    for text in (b"", b"a", b"a\n", b"\n\nab\n" + b"x" * 5000 + b"\nend", b"y\n" * 3000):
        (tmp_path / "a").write_bytes(text)
        assert line_ends(tmp_path / "a").tolist() == np.cumsum([len(line) for line in io.BytesIO(text)]).astype(int).tolist()


# -- streams ---------------------------------------------------------------------------------------------------------------------


def parquet(folder: Path) -> str:
    """The rows as five parquet files."""
    for i in range(5):
        rows = [
            {"instruction": f"draw {k}", "target": encode_png(ROWS[k].target or b""), "id": ROWS[k].id}
            for k in range(5 * i, min(5 * i + 5, 23))
        ]
        datasets.Dataset.from_list(rows).to_parquet(folder / f"part-{i}.parquet")
    return f"{folder}/part-*.parquet"


@pytest.fixture(params=["tar", "parquet"])
def stream(request: pytest.FixtureRequest, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stream:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    if request.param == "tar":
        return WebDatasetStream(f"{shards}/*.tar", buffer=4)
    return DatasetStream(parquet(tmp_path), buffer=4)


def test_a_stream_is_read_from_any_row_on(stream: Stream) -> None:
    assert stream.shards == 5
    held = [[r.id for r in stream.read(s) if isinstance(r, Record)] for s in range(5)]
    assert [name for names in held for name in names] == [r.id for r in ROWS]
    for start in range(6):
        assert [r.id for r in stream.read(2, start) if isinstance(r, Record)] == held[2][start:]


@pytest.mark.parametrize("lanes", [1, 2, 5])
def test_lanes_share_the_shards_and_each_epoch_has_every_row_once(shards: Path, lanes: int) -> None:
    stream = WebDatasetStream(f"{shards}/*.tar", buffer=4)
    seen = Counter[int]()
    for i in range(lanes):
        lane = Lane(stream, i, lanes, 3)
        rows = sum(len(list(stream.read(int(s)))) for s in lane.shards)
        read = [row for (row, _), _ in zip(lane, range(2 * rows), strict=False)]
        assert lanes == 5 or [r.row for r in read[:4]] != [0, 1, 2, 3], "shuffled"
        assert len({r.number for r in read}) == rows and Counter(r.number for r in read).most_common()[0][1] == 2
        seen.update({r.number for r in read})
    assert len(seen) == 23 and set(seen.values()) == {1}


def test_a_lane_goes_on_from_any_mark(shards: Path) -> None:
    stream = WebDatasetStream(f"{shards}/*.tar", buffer=4)
    read = [(row.epoch, row.number, mark) for (row, mark), _ in zip(Lane(stream, 0, 2, 3), range(40), strict=False)]
    assert len({mark.place for *_, mark in read}) > 1
    for at in range(0, 39):
        rest = Lane(stream, 0, 2, 3, read[at][2])
        assert [(row.epoch, row.number, mark) for (row, mark), _ in zip(rest, range(39 - at), strict=False)] == read[at + 1 :]


def test_more_readers_than_shards_are_refused(shards: Path) -> None:
    stream = WebDatasetStream(f"{shards}/*.tar")
    with pytest.raises(ValueError, match="data.train has 5 shards, fewer than its 6 readers"):
        StreamDataset(stream, Recipe(16, 32), 0, 2, workers=2, rank=0, world=3)
    with pytest.raises(ValueError, match="fewer than its 6 readers"):
        module(stream, workers=6)  # before anything is built


def module(train: Any, workers: int = 0, **settings: Any) -> MultimodalDataModule:
    data = MultimodalDataModule(train, target_size=32, reference_size=16, batch_size=3, seed=5, workers=workers, **settings)
    data.setup("fit")
    return data


def take(data: MultimodalDataModule, count: int) -> list[Batch]:
    out = []
    for batch, _ in zip(data.train_dataloader(), range(count), strict=False):
        out.append(data.on_before_batch_transfer(batch, 0))
    return out  # type: ignore[return-value]


def names(batches: list[Batch]) -> list[Any]:
    return [(batch.ids, batch.seed.tolist()) for batch in batches]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_streamed_run_goes_on_in_the_middle_of_a_shard(stream: Stream, workers: int) -> None:
    whole = names(take(module(stream, workers), 11))
    assert len({seed for _, seeds in whole for seed in seeds}) == 33, "the noise of another epoch is another"
    for stop in (3, 8) if workers else (1, 4, 9):
        first = module(stream, workers)
        assert names(take(first, stop)) == whole[:stop]
        state = json.loads(json.dumps(first.state_dict()))  # plain types
        assert state["streams"][0]["samples"] == 3 * stop
        second = module(stream, workers)
        second.load_state_dict(state)
        assert names(take(second, 11 - stop)) == whole[stop:]


def test_a_stream_goes_on_with_as_many_readers_only(shards: Path) -> None:
    data = module(WebDatasetStream(f"{shards}/*.tar"))
    take(data, 1)
    other = module(WebDatasetStream(f"{shards}/*.tar"), workers=2)
    other.load_state_dict(data.state_dict())
    with pytest.raises(ValueError, match="as many readers as before: 1 ranks x 1 workers, not 1 x 2"):
        other.train_dataloader()
    with pytest.raises(ValueError, match="is a stream in the checkpoint or here"):
        module(WebDatasetSource(f"{shards}/*.tar")).load_state_dict(data.state_dict())


def test_bad_rows_of_a_stream_are_counted_and_stop_the_run(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for i in range(12):
            add(tar, f"{i}.json", json.dumps({"instruction": "draw", "target": "png"}).encode())
            if i % 3:
                add(tar, f"{i}.png", encode_png(ROWS[0].target or b""))
    stream = WebDatasetStream(str(tmp_path / "a.tar"))
    with pytest.raises(RecordError, match="4 of the first 12 rows are bad .*; a.tar:1: target is 'png'"):
        module(stream, bad_rows=0.001)
    data = module(stream, bad_rows=0.0035, check=0)
    with pytest.raises(RecordError, match="4 of [0-9]+ rows read are bad, more than bad_rows=0.0035; last: a.tar:"):
        take(data, 4)
    assert set(data.bad) == {0, 3, 6, 9}
