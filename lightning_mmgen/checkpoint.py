"""Checkpoints that a kill cannot break: written beside, synced, renamed; read without unpickling code."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
import uuid
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.plugins.io import TorchCheckpointIO

from .files import whole_file
from .ranks import of_all_ranks, several, together
from .shards import Piece, Scattered

PIECES = "pieces"
"""Of a checkpoint of several processes: the folder beside it in which the pieces lie, and of how many processes; in the place of a tensor,
its name there."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """A checkpoint is one file, or, where several processes share its tensors, one file and a folder ``<file>.pieces`` of what each of them
    holds. Whatever happens while it is written, the checkpoint of that name is the old one or the new one, whole."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None) -> None:
        """Raises: OSError: the disk is full, say; the checkpoint of before is untouched."""
        target = Path(path)
        try:
            with whole_file(target, str(checkpoint.get("global_step", 0))) as file:
                torch.save(checkpoint, file)
        except BaseException as error:
            cause = error if isinstance(error, OSError) else error.__context__  # torch.save hides it behind a RuntimeError
            if isinstance(cause, OSError):
                raise OSError(cause.errno, cause.strerror, str(path)) from error
            raise
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def save_pieces(self, checkpoint: dict[str, Any], path: str | os.PathLike[str]) -> None:
        """Save what several processes hold together: each writes its :class:`.shards.Piece`, and the first one all else, last of all. Every
        process calls it, with checkpoints that differ in their pieces alone; the folder is one that they share.

        Raises:
            OSError: on every process, where one could not write; the checkpoint of before is untouched.
        """
        folder, pieces = Path(f"{path}.{PIECES}"), dict[str, Piece]()
        rest = _without(checkpoint, "", pieces)
        rank, world = (dist.get_rank(), dist.get_world_size()) if several() else (0, 1)
        name = of_all_ranks(f"{checkpoint.get('global_step', 0)}-{uuid.uuid4().hex[:8]}")[0]
        own = {key: (piece.elements.detach().cpu().clone(), piece.start, piece.shape) for key, piece in pieces.items()}

        def seal() -> None:
            if len(list((folder / name).glob("*.pt"))) != world:
                raise OSError(errno.ENOENT, "not all processes write into this folder: is it one that the nodes share?", str(folder))
            self.save_checkpoint({**rest, PIECES: (name, world)}, path)

        try:
            together(partial(self.save_checkpoint, own, folder / name / f"{rank}.pt"))
            together(seal if rank == 0 else lambda: None)
        except OSError:
            shutil.rmtree(folder / name, ignore_errors=True)
            raise
        if rank == 0:
            for other in folder.iterdir():
                if other.name != name:
                    shutil.rmtree(other)

    def remove_checkpoint(self, path: str | Path) -> None:
        super().remove_checkpoint(path)
        shutil.rmtree(f"{path}.{PIECES}", ignore_errors=True)

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any = "cpu", weights_only: bool | None = True, whole: bool = True
    ) -> dict[str, Any]:
        """Plain types and tensors only.

        Args:
            path: of the checkpoint.
            map_location: where its tensors go to.
            weights_only: no code is run, whatever is asked for.
            whole: what was saved in pieces is read; or else a :class:`.shards.Scattered` stands in its place.

        Raises:
            FileNotFoundError: no such checkpoint.
            ValueError: the file is damaged, or would run code; pieces are missing.
        """
        found = _read(path, map_location, mmap=False)
        if PIECES not in found:
            return found
        name, world = found.pop(PIECES)
        held: defaultdict[str, list[Piece]] = defaultdict(list)
        for rank in range(world):
            for key, piece in _read(Path(f"{path}.{PIECES}", name, f"{rank}.pt"), map_location, mmap=True).items():
                held[key].append(Piece(*piece))
        scattered = {key: Scattered(pieces[0].shape, tuple(pieces)) for key, pieces in held.items()}
        if cut := [k for k, s in scattered.items() if sum(len(p.elements) for p in s.pieces) != prod(s.shape)]:
            raise ValueError(f"{path}: damaged, its pieces are not all of {cut[0]}")
        return _with(found, {k: s.whole() for k, s in scattered.items()} if whole else scattered)  # type: ignore[no-any-return]


def _read(path: str | os.PathLike[str], map_location: Any, mmap: bool) -> dict[str, Any]:
    """A file that :meth:`AtomicCheckpointIO.save_checkpoint` wrote; ``mmap``: its tensors stay there until they are used."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    try:
        return dict(torch.load(path, map_location=map_location, weights_only=True, mmap=mmap))
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).split(".")[0] or type(error).__name__
        raise ValueError(f"{path}: not a checkpoint of plain types and tensors, or damaged ({reason})") from error


def _without(value: Any, at: str, pieces: dict[str, Piece]) -> Any:
    """A checkpoint with the names of its pieces in their places; ``pieces`` are filled with them."""
    if isinstance(value, Piece):
        pieces[at] = value
        return {PIECES: at}
    if isinstance(value, dict):
        return {k: _without(v, f"{at}/{k}", pieces) for k, v in value.items()}
    return [_without(v, f"{at}/{i}", pieces) for i, v in enumerate(value)] if isinstance(value, list) else value


def _with(value: Any, tensors: dict[str, Any]) -> Any:
    """The inverse of :func:`_without`."""
    if isinstance(value, dict):
        return tensors[value[PIECES]] if value.keys() == {PIECES} else {k: _with(v, tensors) for k, v in value.items()}
    return [_with(v, tensors) for v in value] if isinstance(value, list) else value


def trained_weights(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint's run has trained, by name: the averaged weights where it kept an average."""
    ema = next((state for key, state in checkpoint["callbacks"].items() if key.startswith("EMA")), None)
    return ema["mean"] if ema and ema["mean"] else checkpoint["state_dict"]  # type: ignore[no-any-return]


def beginning(checkpoint: dict[str, Any], without: Sequence[str] = ()) -> dict[str, Any]:
    """Of a checkpoint, what a fit of another recipe starts from: what was trained, averaged where the run kept an average, and what its
    callbacks hold by the same names (a teacher's weights, say), in half precision; no optimizer, no count of steps.

    Args:
        checkpoint: as it was read.
        without: parts and callbacks to leave out, by the beginnings of their names.

    Raises:
        ValueError: nothing is left.
    """
    names = [n for n in checkpoint["state_dict"] if not n.startswith(tuple(f"{part}." for part in without))]
    if not names:
        raise ValueError(f"nothing was trained{' but ' + ', '.join(without) if without else ''}")

    def kept(weights: dict[str, Any]) -> dict[str, Any]:
        return {n: weights[n].half() for n in names}

    held = {
        name: {key: kept(value) for key, value in state.items() if isinstance(value, dict) and value.keys() >= set(names)}
        for name, state in checkpoint["callbacks"].items()
        if not name.startswith(("EMA", *without))
    }
    return {"state_dict": kept(trained_weights(checkpoint)), "callbacks": {name: state for name, state in held.items() if state}}
