from __future__ import annotations

import json
from pathlib import Path

import pytest

from lightning_mmgen.build.journal import Journal, Shard, adopt
from lightning_mmgen.data.sources import JSONLSource
from lightning_mmgen.prompt import Record


def record(name: str) -> Record:
    return Record(f"draw {name}", target=f"{name}.png")


def fill(journal: Journal, items: list[str]) -> None:
    for item in journal.todo(items, key=str):
        journal.add(item, [] if item == "b" else [record(item)], {"kept": int(item != "b"), "dropped": int(item == "b")})


def test_a_build_goes_on_after_a_torn_line(tmp_path: Path) -> None:
    first = Journal(tmp_path, {"a": 1})
    fill(first, ["a", "b"])
    with first.path.open("a") as file:
        file.write('{"key": "c", "counts": {"kept"')  # killed here
    again = Journal(tmp_path, {"a": 1})
    assert again.todo(["a", "b", "c"], key=str) == ["c"]
    fill(again, ["a", "b", "c"])
    path = again.finish()
    assert path is not None and [r.instruction for r in JSONLSource(str(path))] == ["draw a", "draw c"]
    assert json.loads((tmp_path / "counts.json").read_text()) == {"kept": 2, "dropped": 1}
    assert again.report().splitlines() == ["kept            2", "dropped         1"]


def test_numbers_noted_about_items_are_reported_as_quantiles_after_a_restart_too(tmp_path: Path) -> None:
    for item in range(21):
        journal = Journal(tmp_path, {})
        journal.add(str(item), [], {"seen": 1}, {"score": [item / 10]} if item % 2 else {"score": [item / 10], "other": [1.0, 1.0]})
    for again in (journal, Journal(tmp_path, {})):
        lines = again.report().splitlines()
        assert lines[1] == "score: 5% below 0.1, 25% below 0.5, 50% below 1, 75% below 1.5, 95% below 1.9"
        assert lines[2].startswith("other: 5% below 1, ") and len(lines) == 3


def test_a_journal_killed_at_its_first_line_begins_anew(tmp_path: Path) -> None:
    (tmp_path / "journal.jsonl").write_text('{"sett')
    journal = Journal(tmp_path, {"a": 1})
    fill(journal, ["a"])
    assert Journal(tmp_path, {"a": 1}).done == {"a"}


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    Journal(tmp_path, {"threshold": 0.3, "max": 2})
    with pytest.raises(ValueError, match=r"other settings \(threshold\)"):
        Journal(tmp_path, {"threshold": 0.4, "max": 2})


def test_the_last_shard_joins_all(tmp_path: Path) -> None:
    items = list("abcde")
    paths = []
    for i in (1, 0, 2):
        journal = Journal(tmp_path, {}, Shard.parse(f"{i}/3"))
        fill(journal, items)
        paths.append(journal.finish())
    assert paths[:2] == [None, None] and paths[2] == tmp_path / "records.jsonl"
    assert sorted(r.instruction for r in JSONLSource(str(paths[2]))) == [f"draw {x}" for x in "acde"]
    assert json.loads((tmp_path / "counts.json").read_text()) == {"kept": 4, "dropped": 1}


@pytest.mark.parametrize("text", ["3", "a/b", "2/2", "-1/2", "1/2/3"])
def test_a_wrong_shard_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="--shard"):
        Shard.parse(text)


def test_pictures_inside_the_build_stay_and_others_come_along(tmp_path: Path) -> None:
    out, elsewhere = tmp_path / "out", tmp_path / "a.jpg"
    (out / "mine").mkdir(parents=True)
    (out / "mine" / "b.jpg").write_bytes(b"b")
    elsewhere.write_bytes(b"a")
    assert adopt(out / "mine" / "b.jpg", out, "b.jpg") == "mine/b.jpg"
    assert adopt(elsewhere, out, "a.jpg") == adopt(elsewhere, out, "a.jpg") == "pictures/a.jpg"
    assert (out / "pictures" / "a.jpg").read_bytes() == b"a"
