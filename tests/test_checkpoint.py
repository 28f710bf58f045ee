"""Checkpoints: whole or not there, small, and free of code."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_mmgen.checkpoint import AtomicCheckpointIO, beginning
from lightning_mmgen.cli import main
from lightning_mmgen.shards import Piece, Scattered

IO = AtomicCheckpointIO()


def checkpoint(value: float) -> dict[str, Any]:
    """About 200 KB of a value."""
    return {"global_step": int(value), "state_dict": {"w": torch.full((50_000,), value)}}


@contextmanager
def full_disk(left: int) -> Iterator[None]:
    """No file can grow beyond ``left`` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (left, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("left", [0, 1_000, 100_000])
def test_a_full_disk_leaves_the_old_checkpoint_and_nothing_else(left: int, tmp_path: Path) -> None:
    path = tmp_path / "runs" / "last.ckpt"
    IO.save_checkpoint(checkpoint(1), path)
    with full_disk(left), pytest.raises(OSError, match=r"last\.ckpt"):
        IO.save_checkpoint(checkpoint(2), path)
    assert [p.name for p in path.parent.iterdir()] == ["last.ckpt"]
    assert torch.equal(IO.load_checkpoint(path)["state_dict"]["w"], checkpoint(1)["state_dict"]["w"])
    IO.save_checkpoint(checkpoint(2), path)
    assert IO.load_checkpoint(path)["global_step"] == 2


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone\.ckpt: no such checkpoint"):
        IO.load_checkpoint(tmp_path / "gone.ckpt")


class Owned:
    """An object that writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.path, "w")


@pytest.mark.parametrize("weights_only", [True, False, None])
def test_a_checkpoint_cannot_run_code(weights_only: bool | None, tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "extra": Owned(tmp_path / "owned")}, tmp_path / "bad.ckpt")
    with pytest.raises(ValueError, match=r"bad\.ckpt: not a checkpoint of plain types and tensors"):
        IO.load_checkpoint(tmp_path / "bad.ckpt", weights_only=weights_only)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_damaged_checkpoint_is_named(share: float, tmp_path: Path) -> None:
    IO.save_checkpoint(checkpoint(1), path := tmp_path / "cut.ckpt")
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ValueError, match=r"cut\.ckpt: not a checkpoint"):
        IO.load_checkpoint(path)


# -- pieces ----------------------------------------------------------------------------------------------------------------------


def in_pieces(value: float, held: int = 50_000) -> dict[str, Any]:
    """The same checkpoint, of which this process holds the first elements of a matrix."""
    elements = torch.arange(float(held)) + value
    return {"global_step": int(value), "state_dict": {"w": Piece(elements, 0, (200, 250))}, "states": [{0: {"step": torch.tensor(value)}}]}


def test_what_is_saved_in_pieces_is_read_whole_or_by_range(tmp_path: Path) -> None:
    IO.save_pieces(in_pieces(1), path := tmp_path / "last.ckpt")
    found, lazy = IO.load_checkpoint(path), IO.load_checkpoint(path, whole=False)
    assert found.keys() == {"global_step", "state_dict", "states"} and found["states"][0][0]["step"] == 1
    assert torch.equal(found["state_dict"]["w"], (torch.arange(50_000.0) + 1).view(200, 250))
    assert torch.equal(lazy["state_dict"]["w"].range(300, 310), torch.arange(301.0, 311.0))


def test_a_tensor_of_several_pieces_is_read_across_them() -> None:
    whole = torch.arange(12.0).view(3, 4)
    cuts = ((0, 5), (5, 5), (5, 11), (11, 12))
    scattered = Scattered((3, 4), tuple(Piece(whole.flatten()[a:b], a, (3, 4)) for a, b in cuts))
    assert torch.equal(scattered.whole(), whole)
    assert all(torch.equal(scattered.range(a, b), whole.flatten()[a:b]) for a in range(12) for b in range(a, 13))


@pytest.mark.parametrize("left", [0, 1_000, 100_000])
def test_a_full_disk_leaves_the_pieces_of_before(left: int, tmp_path: Path) -> None:
    IO.save_pieces(in_pieces(1), path := tmp_path / "last.ckpt")
    with full_disk(left), pytest.raises(OSError, match=r"0\.pt"):
        IO.save_pieces(in_pieces(2), path)
    assert IO.load_checkpoint(path)["state_dict"]["w"][0, 0] == 1
    IO.save_pieces(in_pieces(2), path)
    assert IO.load_checkpoint(path)["state_dict"]["w"][0, 0] == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last.ckpt", "last.ckpt.pieces"]
    assert len(list((tmp_path / "last.ckpt.pieces").iterdir())) == 1, "the pieces of before are gone"
    IO.remove_checkpoint(path)
    assert not list(tmp_path.iterdir())


def test_nodes_that_share_no_folder_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of two processes writes elsewhere."""
    monkeypatch.setattr("lightning_mmgen.checkpoint.several", lambda: True)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    with pytest.raises(OSError, match=r"is it one that the nodes share\?: .*last\.ckpt\.pieces"):
        IO.save_pieces(in_pieces(1), tmp_path / "last.ckpt")
    assert not (tmp_path / "last.ckpt").exists() and not list((tmp_path / "last.ckpt.pieces").iterdir())


def test_pieces_that_are_missing_are_named(tmp_path: Path) -> None:
    IO.save_pieces(in_pieces(1, held=49_999), path := tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=r"last\.ckpt: damaged, its pieces are not all of /state_dict/w"):
        IO.load_checkpoint(path)
    next(tmp_path.glob("last.ckpt.pieces/*/0.pt")).unlink()
    with pytest.raises(FileNotFoundError, match=r"last\.ckpt\.pieces/1-\w+/0\.pt: no such checkpoint"):
        IO.load_checkpoint(path)


def test_a_run_saves_what_it_trains_and_nothing_else(experiment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cli = main(["fit", "-c", str(experiment)])
    folder = tmp_path / "runs/tiny/version_0/checkpoints"
    saved: dict[str, Tensor] = torch.load(folder / "last.ckpt", weights_only=True)["state_dict"]
    assert set(saved) == set(cli.model.trainable())
    assert all("lora_" in name or name.startswith("adapter.") for name in saved)
    assert all(torch.equal(cli.model.get_parameter(name), w) for name, w in saved.items())
    assert not list(folder.glob(".*"))


def test_a_checkpoint_of_another_table_is_refused(experiment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    main(["fit", "-c", str(experiment)])
    rows = "[{match: encoder, train: frozen}, {match: adapter, train: full, lr: 0.1}, {match: unet, train: frozen}]"
    with pytest.raises(ValueError, match="another parameter table: rows encoder, unet differ .* trained only in the checkpoint"):
        main(["fit", "-c", str(experiment), f"--model.init_args.parameters={rows}", "--ckpt_path=last"])
    lora = "train: lora, rank: {}, lr: 0.1".format
    rows = "[{match: encoder.vision, train: frozen}, {match: encoder.projector, " + lora(2) + "}, {match: encoder.language, " + lora(2)
    rows += "}, {match: adapter, train: full, lr: 0.1}, {match: unet, " + lora(1) + "}]"
    shapes = r"rows unet differ in \d+ tensors, first unet.*lora_A.*, is of shape \(2, \d+\) there and \(1, \d+\) here"
    with pytest.raises(ValueError, match=shapes):
        main(["fit", "-c", str(experiment), f"--model.init_args.parameters={rows}", "--ckpt_path=last"])


def test_a_fit_may_start_from_one_that_trained_less_and_not_from_one_that_trained_more(
    experiment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = "[{match: encoder, train: frozen}, {match: adapter, train: full, lr: 0.1}, {match: unet, train: frozen}]"
    less = main(["fit", "-c", str(experiment), f"--model.init_args.parameters={rows}"]).model
    checkpoint = tmp_path / "runs/tiny/version_0/checkpoints/last.ckpt"
    steps = ["--trainer.max_steps=0", f"--model.init_args.start={checkpoint}"]
    more = main(["fit", "-c", str(experiment), *steps]).model
    assert set(less.trainable()) < set(more.trainable())
    assert all(torch.equal(more.get_parameter(name), weights) for name, weights in less.trainable().items())
    main(["fit", "-c", str(experiment)])
    with pytest.raises(ValueError, match="trained only in the checkpoint"):
        start = f"--model.init_args.start={checkpoint.parents[2] / 'version_2/checkpoints/last.ckpt'}"
        main(["fit", "-c", str(experiment), f"--model.init_args.parameters={rows}", start])


def test_the_beginning_of_another_fit_has_averaged_weights_and_a_teachers_and_no_optimizer() -> None:
    names = ("adapter.w", "reference_attention.w")
    own, mean, first = ({n: torch.full((2,), value) for n in names} for value in (1.0, 2.0, 3.0))
    callbacks = {"EMA": {"mean": mean}, "CaptionTeacher": {"first": first}, "ModelCheckpoint{'monitor': None}": {"last_model_path": "x"}}
    checkpoint = {"state_dict": own, "callbacks": callbacks, "optimizer_states": [1], "global_step": 7}
    found = beginning(checkpoint, without=["reference_attention"])
    assert found.keys() == {"state_dict", "callbacks"} and found["callbacks"].keys() == {"CaptionTeacher"}
    assert found["state_dict"]["adapter.w"].tolist() == [2, 2] and found["state_dict"]["adapter.w"].dtype == torch.float16
    assert found["state_dict"].keys() == found["callbacks"]["CaptionTeacher"]["first"].keys() == {"adapter.w"}
    assert found["callbacks"]["CaptionTeacher"]["first"]["adapter.w"].tolist() == [3, 3]
    assert beginning(checkpoint)["state_dict"].keys() == set(names)
    assert beginning(checkpoint, without=["CaptionTeacher"])["callbacks"] == {}
    with pytest.raises(ValueError, match="nothing was trained but adapter, reference_attention"):
        beginning(checkpoint, without=["adapter", "reference_attention"])
