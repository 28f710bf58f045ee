"""What two processes read: a stream that is killed and goes on, and rows that are bad on one of them alone."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_mmgen.data.order import OrderedSampler
from lightning_mmgen.data.shards import write_shards
from lightning_mmgen.data.sources import ToyboxSource, write_jsonl

from .. import engines
from ..engines import Run, fit, seen, written

SOURCE = ToyboxSource({"edit turn": 1.0}, length=64)
BAD = [[p.index for p in batch] for batch in OrderedSampler(12, 2, 0, rank=1, world=2)][1]
"""The rows of the second process's second batch in the first epoch."""


@pytest.fixture(scope="module")
def folder(parts: Path, clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DDP reads a stream of 4 shards of 16 rows, by two workers a process, for 8 batches of 2 each, and is killed after 7; the last
    checkpoint is that of batch 4. DDP and FSDP2 read 12 rows, 3 batches of 2 each."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "engines.yaml").write_text(engines.YAML.format(parts=parts, clip=clip))
    (folder / "plain.yaml").write_text(engines.PLAIN)
    write_shards(list(SOURCE), folder / "shards", rows=16)
    damage(write_jsonl([SOURCE.record(i) for i in range(12)], folder / "rows"))
    plain = ("-c", str(folder / "plain.yaml"))
    read = {"class_path": "WebDatasetStream", "init_args": {"shards": f"{folder}/shards/*.tar", "buffer": 4}}
    data = {"class_path": "MultimodalDataModule", "init_args": {"train": read, "target_size": 16, "batch_size": 2, "workers": 2}}
    stream = (*plain, "--trainer.max_steps=4", f"--data={json.dumps(data)}")
    rows = (*plain, "--trainer.max_steps=2", f"--data.init_args.train={folder}/rows/records.jsonl", "--data.init_args.bad_rows=0.5")
    fit(
        folder,
        Run("whole", "ddp", stream),
        Run("killed", "ddp", stream, status=-9, kill_at=7),
        Run("killed", "ddp", (*stream, "--ckpt_path=last")),
        Run("ddp", "ddp", rows),
        Run("fsdp", "fsdp", rows),
    )
    return folder


def damage(path: Path) -> None:
    """The rows of ``BAD`` are no JSON."""
    lines = path.read_text().splitlines()
    path.write_text("".join("{\n" if i in BAD else line + "\n" for i, line in enumerate(lines)))


def test_a_killed_stream_goes_on_in_the_middle_of_its_shards(folder: Path) -> None:
    for rank in (0, 1):
        rows = [[(row["batch"], row["loss"], row["ids"]) for row in seen(folder, name, rank)] for name in ("whole", "killed")]
        assert rows[0] == rows[1] and len(rows[0]) == 8
        assert [row["batch"] for row in written(folder, "killed", rank)] == [*range(1, 8), 5, 6, 7, 8]
    read = Counter(name for rank in (0, 1) for row in seen(folder, "killed", rank) for name in row["ids"])
    assert len(read) == 32 and set(read.values()) == {1}, "each sample once"


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_rows_that_are_bad_on_one_process_alone_are_left_out_and_listed(engine: str, folder: Path) -> None:
    """The other has its batch all the same; the one takes part with a loss of zero."""
    order = [[[p.index for p in batch] for batch in OrderedSampler(12, 2, 0, rank, 2)] for rank in (0, 1)]
    ranks = [[row["ids"] for row in seen(folder, engine, rank)] for rank in (0, 1)]
    assert ranks == [[[SOURCE.record(i).id for i in batch if i not in BAD] for batch in batches] for batches in order]
    assert ranks[1][1] == [] and seen(folder, engine, 1)[1]["loss"] == 0 and seen(folder, engine, 0)[1]["loss"] > 0
    events = EventAccumulator(str(folder / f"runs/{engine}/version_0")).Reload()
    assert events.Scalars("loss")[0].value == pytest.approx(seen(folder, engine, 0)[1]["loss"]), "it is not in the mean that is logged"
    listed = [json.loads(line) for line in (folder / f"runs/{engine}/version_0/bad_rows.1.jsonl").read_text().splitlines()]
    assert [row["index"] for row in listed] == BAD and "records.jsonl" in listed[0]["reason"]
    assert engines.checkpoint(folder, engine)["EditDataModule"]["bad"].keys() == set(BAD)
