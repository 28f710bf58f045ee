"""Weights that come after their module: it is built on the meta device, brought under the parameter table and cut over the processes, and
then each process reads from the files what it holds, and no more."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from accelerate import init_empty_weights
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.utils import cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from ..shards import extent, local, part
from .weights import locate

Weights = bool | Literal["later"]
"""What a part is built with: its weights, none (from its configuration alone, on the default device), or its weights ``later``."""

Model = TypeVar("Model", bound=nn.Module)


class Stored(NamedTuple):
    """Where a tensor lies in a checkpoint."""

    file: str
    key: str
    shape: tuple[int, ...]


def later(make: Callable[[], Model], pretrained: str, file: str, subfolder: str | None = None) -> Model | None:
    """A module whose parameters are on the meta device and know where their values lie; its buffers are there.

    The random numbers of the process are left as they are, as ``from_pretrained`` leaves them.

    Args:
        make: creates the module from its configuration.
        pretrained: hub name or folder of its weights.
        file: their name there, ending in ``.safetensors``; or in several files, with ``.index.json`` after it.
        subfolder: where they lie in it.

    Returns:
        None where the checkpoint does not hold every parameter as it is, with a line of warning: it is of an older format, say.
    """
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), init_empty_weights(include_buffers=False):
        module = make()
    if isinstance(module, PreTrainedModel):
        module.tie_weights()
    stored = _renamed(module, _stored(pretrained, file, subfolder))
    if missing := _promise(module, stored):
        rank_zero_warn(f"{pretrained}: every process reads all of it, for {missing} is not in {file} as the model has it")
        return None
    return module


def _stored(pretrained: str, file: str, subfolder: str | None) -> dict[str, Stored]:
    """The tensors of a checkpoint by name; none where there are no such files."""
    where, options = locate(pretrained), {"subfolder": subfolder or ""}
    find = {"_raise_exceptions_for_missing_entries": False, **options}
    if path := cached_file(where, file, **find):
        files = [path]
    elif index := cached_file(where, f"{file}.index.json", **find):
        files, _ = get_checkpoint_shard_files(where, index, **options)
    else:
        files = []
    found: dict[str, Stored] = {}
    for path in files:
        with safe_open(path, framework="pt") as tensors:
            found |= {key: Stored(path, key, tuple(tensors.get_slice(key).get_shape())) for key in tensors.keys()}  # noqa: SIM118
    return found


def _renamed(module: nn.Module, stored: dict[str, Stored]) -> dict[str, Stored]:
    """The tensors by the names that ``module`` has for them, as ``transformers`` renames those of older checkpoints; without those that
    it converts."""
    if not isinstance(module, PreTrainedModel):
        return stored
    rules, here = get_model_conversion_mapping(module), module.state_dict()
    renamings, converters = ([rule for rule in rules if isinstance(rule, kind)] for kind in (WeightRenaming, WeightConverter))
    found = {}
    for key, place in stored.items():
        name, converted = rename_source_key(key, renamings, converters, module.base_model_prefix, here)
        if name not in here and key in here:
            name, converted = key, None
        if converted is None:
            found[name] = place
    return found


@torch.no_grad()
def _promise(module: nn.Module, stored: Mapping[str, Stored]) -> str | None:
    """Note on each parameter where it lies, and read the buffers.

    Returns:
        The name of a parameter that is not there in its shape, or is there twice.
    """
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if name in stored:
            if hasattr(parameter, "stored") or stored[name].shape != parameter.shape:
                return name
            parameter.stored = stored[name]  # type: ignore[attr-defined]
    for name, buffer in module.named_buffers():
        if name in stored:
            with safe_open(stored[name].file, framework="pt") as tensors:
                buffer.copy_(tensors.get_tensor(stored[name].key))
    return next((name for name, parameter in module.named_parameters() if not hasattr(parameter, "stored")), None)


def awaited(module: nn.Module, recurse: bool = True) -> dict[str, Stored]:
    """The parameters whose values are to come, by name, those of children too; asked before they are cut."""
    return {n: p.stored for n, p in module.named_parameters(recurse=recurse, remove_duplicate=False) if hasattr(p, "stored")}


@torch.no_grad()
def fill(module: nn.Module, stored: Mapping[str, Stored], device: torch.device, recurse: bool = True) -> None:
    """Give parameters that are on the meta device memory, and read what of them this process holds."""
    module._apply(lambda t: torch.empty_like(t, device=device) if t.device.type == "meta" else t, recurse)  # type: ignore[no-untyped-call]
    for name, place in stored.items():
        parameter = module.get_parameter(name)
        if (held := local(part(parameter))).numel():
            with safe_open(place.file, framework="pt") as tensors:  # anew, for what is read stays resident until it is closed
                held.copy_(tensors.get_slice(place.key)[extent(parameter)])


@contextmanager
def present(layers: Iterable[Any]) -> Iterator[None]:
    """Within it no layer's weight is on the meta device, so that PEFT makes LoRA layers for real, from the same random numbers."""
    held = [(layer, layer.weight) for layer in layers if layer.weight.is_meta]
    for layer, weight in held:
        layer.weight = nn.Parameter(torch.empty(0, dtype=weight.dtype), requires_grad=False)
    yield
    for layer, weight in held:
        layer.weight = weight
