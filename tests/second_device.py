"""A second device on a machine without a GPU: tensors that say ``cpu:1``, hold values, and do not mix with those of another device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

SECOND = torch.device("cpu", 1)
MOVES = (torch.ops.aten._to_copy, torch.ops.aten.copy_)


class Placed(Tensor):
    """A tensor on the second device."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Placed:
        like = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        return Tensor._make_wrapper_subclass(cls, held.shape, **like, device=SECOND)  # type: ignore[attr-defined, no-any-return]

    def __init__(self, held: Tensor) -> None:
        self.held = held

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["held"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *_: Any) -> Placed:
        return Placed(inner["held"])

    def __reduce_ex__(self, protocol: Any) -> Any:  # in a checkpoint, a tensor like any other
        return self.held.__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs)


class MadeThere(TorchFunctionMode):
    """``torch.tensor`` of numbers is no operation that a dispatch mode sees."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.tensor and kwargs.get("device") is not None:
            return func(*args, **{**kwargs, "device": None}).to(kwargs["device"])
        return func(*args, **kwargs)


class SecondDevice(TorchDispatchMode):
    """Within it ``cpu:1`` is a device; ``crossed`` lists the tensors that were copied to or from it, as (from, to, shape)."""

    def __init__(self) -> None:
        super().__init__()
        self.crossed: list[tuple[str, str, torch.Size]] = []

        self.made = MadeThere()

    def __enter__(self) -> SecondDevice:
        self.made.__enter__()
        return super().__enter__()  # type: ignore[no-any-return]

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.made.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = run(func, args, kwargs)
        if func._overloadpacket in MOVES:
            source = args[1] if func._overloadpacket is torch.ops.aten.copy_ else args[0]
            if source.device != out.device:
                self.crossed.append((str(source.device), str(out.device), source.shape))
        return out


def run(func: Any, args: Any, kwargs: Any) -> Any:
    """One operation on the tensors' values; the outcome lies where its inputs lie, or where ``device`` says.

    Raises:
        RuntimeError: tensors of two devices (numbers, of no dimension, may come from anywhere), as CUDA has it.
    """
    kwargs = dict(kwargs or {})
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    there = {isinstance(t, Placed) for t in tensors if t.dim()}
    if len(there) > 1 and func._overloadpacket not in MOVES:
        raise RuntimeError(f"{func}: tensors on two devices")
    goes = any(there) if there else any(isinstance(t, Placed) for t in tensors)
    if func._overloadpacket is torch.ops.aten.copy_:
        goes = isinstance(args[0], Placed)
    if kwargs.get("device") is not None:
        goes = torch.device(kwargs["device"]) == SECOND
        kwargs["device"] = torch.device("cpu") if goes else kwargs["device"]
    out = func(*tree_map_only(Placed, lambda t: t.held, args), **tree_map_only(Placed, lambda t: t.held, kwargs))
    known = {id(t.held): t for t in tensors if isinstance(t, Placed)}  # an operation in place gives back the same tensor
    return tree_map_only(Tensor, lambda t: known[id(t)] if id(t) in known else Placed(t), out) if goes else out
