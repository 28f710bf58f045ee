"""What the processes of a run tell each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def several() -> bool:
    """Whether this process is one of a group."""
    return dist.is_available() and dist.is_initialized()


def of_all_ranks(own: Any) -> list[Any]:
    """What each process has, by rank; all of them ask."""
    if not several():
        return [own]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, own)
    return found


def mean(own: Tensor, count: int) -> Tensor:
    """The mean over the ranks of what each has, [n], of so many samples; all of them ask."""
    if not several():
        return own
    sums = torch.cat([own * count, own.new_tensor([count])])
    dist.all_reduce(sums)
    return sums[:-1] / sums[-1].clamp(min=1)


def together(work: Callable[[], object]) -> None:
    """Each rank does its work, and none goes on before all have done it.

    Raises:
        OSError: on every rank, what one of them could not write.
    """
    failed = None
    try:
        work()
    except OSError as error:
        failed = (error.errno, error.strerror, error.filename)
    if cause := next(filter(None, of_all_ranks(failed)), None):
        raise OSError(*cause)
