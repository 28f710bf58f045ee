"""Parameters that several processes hold together: one process's part of each, and the whole.

FSDP2 holds a parameter as a ``DTensor``, cut along its first axis; ZeRO-3 flat, cut into equal parts, in ``ds_tensor``; a single process,
DDP and ZeRO-2 hold it whole. So what a process holds of a tensor is a range of its elements, read row by row (:func:`span`).
"""

from __future__ import annotations

from math import prod
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.nn.functional import pad


def is_sharded(parameter: Tensor) -> bool:
    """Whether this process holds a part of the parameter only."""
    return isinstance(parameter, DTensor) or hasattr(parameter, "ds_tensor")


def shape(parameter: Any) -> tuple[int, ...]:
    """Of the whole parameter."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def part(parameter: Any) -> Tensor:
    """What this process holds of a parameter, in the memory of the parameter."""
    return parameter.ds_tensor if hasattr(parameter, "ds_tensor") else parameter.detach()  # type: ignore[no-any-return]


@torch.no_grad()
def put(parameter: Any, value: Tensor) -> None:
    """Write this process's part of a parameter."""
    part(parameter).copy_(value)
    if hasattr(parameter, "ds_tensor") and parameter.numel():  # ZeRO-3 keeps small ones whole between steps, which is now out of date
        parameter.partition(has_been_updated=False)


class Piece(NamedTuple):
    """A process's elements of a tensor that several hold, [n], and where they begin in the whole, of a shape."""

    elements: Tensor
    start: int
    shape: tuple[int, ...]


class Scattered(NamedTuple):
    """A tensor that is there in pieces, which may lie in files; what is asked for is read, and no more."""

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    def range(self, start: int, stop: int) -> Tensor:
        """Elements ``start`` to ``stop``, [n], in memory of their own."""
        found = self.pieces[0].elements.new_empty(stop - start)
        for held, begin, _ in self.pieces:
            low, high = max(start, begin), min(stop, begin + len(held))
            if low < high:
                found[low - start : high - start] = held[low - begin : high - begin]
        return found

    def whole(self) -> Tensor:
        """All of it."""
        return self.range(0, prod(self.shape)).view(self.shape)


def span(parameter: Any) -> tuple[int, int]:
    """The range of the whole's elements that this process holds of a parameter."""
    if hasattr(parameter, "ds_tensor"):
        held = parameter.ds_tensor.numel()  # the last process's are padded
        start, stop = (min(rank * held, parameter.ds_numel) for rank in (dist.get_rank(), dist.get_rank() + 1))
        return start, stop
    rows = extent(parameter)[:1]
    row = prod(parameter.shape[1:])
    return (rows[0].start * row, rows[0].stop * row) if rows else (0, 1)


def piece(parameter: Any, held: Tensor) -> Tensor | Piece:
    """What this process holds of a tensor as it holds the parameter; one that is not cut stays as it is."""
    if not is_sharded(parameter):
        return held
    start, stop = span(parameter)
    return Piece(local(held).flatten()[: stop - start], start, shape(parameter))


def elements(value: Tensor | Scattered, start: int, stop: int) -> Tensor:
    """Elements ``start`` to ``stop`` of a whole tensor, [n], in memory of their own."""
    return value.flatten()[start:stop].clone() if isinstance(value, Tensor) else value.range(start, stop)


def part_of(parameter: Any, value: Tensor | Scattered) -> Tensor:
    """What this process holds of a value of the parameter's shape, as it holds the parameter, without a word to the others."""
    if not is_sharded(parameter):
        return value if isinstance(value, Tensor) else value.whole()
    held = elements(value, *span(parameter))
    if not isinstance(parameter, DTensor):
        return pad(held.to(parameter.ds_tensor.device), (0, parameter.ds_tensor.numel() - held.numel()))
    rows = held.to(parameter.device).view(tuple(n.stop - n.start for n in extent(parameter)))
    mesh, placements = parameter.device_mesh, parameter.placements
    return DTensor.from_local(rows, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride())


def extent(parameter: Tensor) -> tuple[slice, ...]:
    """Where in the whole lies what this process holds of a parameter, but for ZeRO-3; of one that is not cut, all of it."""
    if not isinstance(parameter, DTensor):
        return tuple(slice(0, n) for n in parameter.shape)
    size, begin = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return tuple(slice(at, at + n) for at, n in zip(begin, size, strict=True))


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, in its memory; of one that is not cut by FSDP2, itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor  # type: ignore[no-any-return]


def whole_of(parameter: Tensor, held: Tensor) -> Tensor:
    """The whole of what :func:`local` parts of a parameter's shape make up; every process calls it."""
    if not isinstance(parameter, DTensor):
        return held
    mesh, placements = parameter.device_mesh, parameter.placements
    return DTensor.from_local(held, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride()).full_tensor()
