"""What goes wrong in stock Lightning, each beside the name of the test that says it does not here; where one of these fails, Lightning has
mended it, and code of this package may go."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed.checkpoint as dcp
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.utils.data import DataLoader, DistributedSampler

from lightning_mmgen.checkpoint import AtomicCheckpointIO
from lightning_mmgen.shards import Piece

QUIET = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)


class Plain(L.LightningModule):
    """A frozen and a trained layer; notes the rows that it sees, and saves what is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.trained, self.rows = nn.Linear(1, 1).requires_grad_(False), nn.Linear(1, 1), list[int]()
        self.partial = False

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.rows += batch.flatten().int().tolist()
        return self.trained(self.frozen(batch)).square().mean()  # type: ignore[no-any-return]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.trained.parameters())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.partial:
            checkpoint["state_dict"] = {n: v for n, v in checkpoint["state_dict"].items() if n.startswith("trained")}


def loader(rank: int = 0, world: int = 1) -> DataLoader[Any]:
    """20 rows in batches of 2, shared by ``world`` ranks."""
    rows = torch.arange(20.0)[:, None]
    return DataLoader(rows, batch_size=2, sampler=DistributedSampler(rows, world, rank, seed=3))  # type: ignore[arg-type]


def trainer(folder: Path, **settings: Any) -> L.Trainer:
    return L.Trainer(accelerator="cpu", default_root_dir=folder, use_distributed_sampler=False, **{**QUIET, **settings})


def test_ranks_lose_and_repeat_rows_when_a_run_goes_on_within_an_epoch(tmp_path: Path) -> None:
    """Here: ``test_strategies.py``, test_a_killed_run_of_two_goes_on_bit_equal, and on one process."""
    seen = []
    for rank in (0, 1):
        first, second, save = Plain(), Plain(), ModelCheckpoint(tmp_path / str(rank), every_n_train_steps=3)
        trainer(tmp_path, max_steps=3, callbacks=[save], enable_checkpointing=True).fit(first, loader(rank, 2))
        trainer(tmp_path, max_epochs=1).fit(second, loader(rank, 2), ckpt_path=save.best_model_path)
        seen += first.rows + second.rows
    assert len(set(seen)) < 20, "the rest of the epoch, or some of it, was not seen"
    assert len(set(seen)) < len(seen), "rows were seen twice"


class Told(Callback):
    """SIGTERM after the first batch."""

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_ends_a_run_as_if_it_were_done_and_saves_nothing(tmp_path: Path) -> None:
    """Here: ``test_strategies.py``, test_another_engine_goes_on_and_stops_when_one_rank_is_told_to."""
    stock = trainer(tmp_path, max_steps=9, callbacks=[Told()], enable_checkpointing=True)
    with pytest.raises(SystemExit) as stop:
        stock.fit(Plain(), loader())
    assert not stop.value.code and stock.global_step == 1 and not list(tmp_path.rglob("*.ckpt"))


def dies_while(work: Callable[[], Any], after: int) -> bool:
    """Whether a process of its own, doing this, is killed once a file of it has ``after`` bytes."""
    if not (pid := os.fork()):
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (after, after))
        try:
            work()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])


def test_a_kill_while_a_checkpoint_of_shards_is_overwritten_costs_the_one_before(tmp_path: Path) -> None:
    """Lightning writes them by torch.distributed.checkpoint, in their place. Ours, in one file or in pieces, are written beside."""
    old, new = ({"w": torch.full((50_000,), value)} for value in (1.0, 2.0))
    io, one, several = AtomicCheckpointIO(), tmp_path / "one.ckpt", tmp_path / "several.ckpt"
    cut_old, cut_new = ({"w": Piece(w["w"], 0, (50_000,))} for w in (old, new))
    dcp.save(old, checkpoint_id=tmp_path / "shards", no_dist=True)
    io.save_checkpoint(old, one)
    io.save_pieces(cut_old, several)
    assert dies_while(lambda: dcp.save(new, checkpoint_id=tmp_path / "shards", no_dist=True), 100_000)
    assert dies_while(lambda: io.save_checkpoint(new, one), 100_000)
    assert dies_while(lambda: io.save_pieces(cut_new, several), 100_000)
    with pytest.raises(CheckpointException, match="your checkpoint file is corrupted"):
        dcp.load({"w": torch.zeros(50_000)}, checkpoint_id=tmp_path / "shards", no_dist=True)
    assert all(torch.equal(io.load_checkpoint(path)["w"], old["w"]) for path in (one, several))


def test_a_checkpoint_of_what_is_trained_is_not_gone_on_from(tmp_path: Path) -> None:
    """Here: ``test_checkpoint.py``, test_a_run_saves_what_it_trains_and_nothing_else, and every run that goes on."""
    module = Plain()
    module.partial = True
    (begun := trainer(tmp_path, max_steps=3)).fit(module, loader())
    begun.save_checkpoint(tmp_path / "partial.ckpt")
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "frozen.weight"'):
        trainer(tmp_path, max_steps=5).fit(Plain(), loader(), ckpt_path=tmp_path / "partial.ckpt")
