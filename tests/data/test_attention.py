from __future__ import annotations

from io import BytesIO
from pathlib import Path

import pytest
import torch
from PIL import Image as PILImage

from lightning_mmgen.data.attention import AttentionTargets, Word, WordMaps, content_hash, write_index, write_shard
from lightning_mmgen.prompt import RecordError

WORDS = [Word("a", 0, 1), Word("red", 2, 5), Word("a", 12, 13)]
PICTURES = {"first": PILImage.new("RGB", (4, 6), "red"), "Zweite ü": PILImage.new("RGB", (4, 6), "blue")}


@pytest.fixture
def maps() -> torch.Tensor:
    return torch.rand(3, 5, 5)


@pytest.fixture
def folder(tmp_path: Path, maps: torch.Tensor) -> Path:
    """Two shards of one row each."""
    for k, (id, picture) in enumerate(PICTURES.items()):
        write_shard(tmp_path / f"{k}.safetensors", {id: WordMaps(content_hash(picture), WORDS, maps)})
    write_index(tmp_path, 5)
    return tmp_path


def test_maps_come_back_by_word_in_eight_bits_and_repeated_words_are_averaged(folder: Path, maps: torch.Tensor) -> None:
    targets = AttentionTargets(folder)
    assert list(targets) == list(PICTURES) and len(targets) == 2 and targets.size == 5 and "first" in targets
    for id, picture in PICTURES.items():
        found = targets[id, picture]
        assert list(found) == ["a", "red"]
        torch.testing.assert_close(found["red"], maps[1], atol=0.5 / 255 + 1e-6, rtol=0)
        torch.testing.assert_close(found["a"], (maps[0] + maps[2]) / 2, atol=0.5 / 255 + 1e-6, rtol=0)
        assert targets.read(id).words == WORDS


def test_a_file_and_its_bytes_are_one_picture_and_a_changed_file_is_another(tmp_path: Path, maps: torch.Tensor) -> None:
    PICTURES["first"].save(tmp_path / "p.png")
    stream = BytesIO()
    PICTURES["first"].save(stream, "png")
    write_shard(tmp_path / "0.safetensors", {"x": WordMaps(content_hash("p.png", tmp_path), WORDS, maps)})
    write_index(tmp_path, 5)
    targets = AttentionTargets(tmp_path, root=tmp_path)
    assert targets["x", "p.png"].keys() == targets["x", stream.getvalue()].keys()
    PICTURES["Zweite ü"].save(tmp_path / "p.png")
    with pytest.raises(RecordError, match="'x': its attention targets in .* are of another picture, or it has changed since"):
        targets["x", "p.png"]
    with pytest.raises(RecordError, match=r"gone\.png: no such file"):
        targets["x", "gone.png"]


def test_what_is_missing_or_damaged_is_named(folder: Path) -> None:
    targets, picture = AttentionTargets(folder), PICTURES["first"]
    with pytest.raises(RecordError, match="'third': has no attention target in"):
        targets["third", picture]
    with pytest.raises(RecordError, match="another picture"):
        targets["first", PICTURES["Zweite ü"]]
    (folder / "0.safetensors").write_bytes((folder / "0.safetensors").read_bytes()[:-3])
    with pytest.raises(RecordError, match=r"'first': its shard .*0\.safetensors is damaged"):
        targets["first", picture]
    (folder / "0.safetensors").unlink()
    with pytest.raises(RecordError, match=r"'first': its shard .*0\.safetensors is missing"):
        targets["first", picture]


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (None, "no such file; `mmgen build attention` writes it"),
        ("[", "is not an index"),
        ('{"version": 2, "size": 5, "rows": {}}', "version 2"),
    ],
)
def test_a_folder_without_a_good_index_is_refused(folder: Path, index: str | None, message: str) -> None:
    path = folder / "index.json"
    path.unlink() if index is None else path.write_text(index)
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        AttentionTargets(folder)


def test_an_id_in_two_shards_is_refused(folder: Path) -> None:
    (folder / "2.safetensors").write_bytes((folder / "1.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"1\.safetensors and 2\.safetensors both hold a row 'Zweite ü'"):
        write_index(folder)


def test_maps_of_another_size_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"0\.safetensors: 'first' has maps of 5 x 5, not 4 x 4"):
        write_index(folder, 4)
