"""Parameters that several processes hold together: one process's part of each, and the whole.

FSDP2 holds a parameter as a ``DTensor``; ZeRO-3 flat, cut into equal parts, in ``ds_tensor``; a single process, DDP and ZeRO-2 hold it
whole.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
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


def whole(parameter: Any, held: Tensor) -> Tensor:
    """The whole of what the processes hold as they hold the parameter; every process calls it."""
    if isinstance(held, DTensor):
        return held.full_tensor()
    if not hasattr(parameter, "ds_tensor"):
        return held
    parts = held.new_empty(dist.get_world_size() * held.numel())
    dist.all_gather_into_tensor(parts, held.contiguous())
    return parts[: parameter.ds_numel].view(parameter.ds_shape)


def part_of(parameter: Any, value: Tensor) -> Tensor:
    """What this process holds of a value of the parameter's shape: the inverse of :func:`whole`, without a word to the others."""
    if isinstance(parameter, DTensor):
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None)
    if not hasattr(parameter, "ds_tensor"):
        return value
    world, flat = dist.get_world_size(), value.to(parameter.ds_tensor.device).flatten()
    padded = pad(flat, (0, world * parameter.ds_tensor.numel() - flat.numel()))
    return padded.chunk(world)[dist.get_rank()].clone()


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
