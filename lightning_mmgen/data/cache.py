"""Tensors that frozen networks make of pictures, kept in files: the VAE's moments, and the patches of an encoder's vision tower.

An entry is found by what it was made of: the weights and settings of the network name the folder, the pixels that it sees, after crop and
resize, the file. Another file, crop or size is another entry, and an augmented picture is one that is not there.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from ..files import whole_file

VERSION = 1
KINDS = ("moments", "vision")


class Cache:
    """Entries of one network, a file each. Any number of processes may read and write: an entry appears whole, and is never changed.

    Args:
        folder: of all entries of this network.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, pixels: Tensor) -> Path:
        """The entry of a picture [3, h, w], there or not."""
        digest = hashlib.blake2b(str((tuple(pixels.shape), pixels.dtype)).encode(), digest_size=16)
        digest.update(pixels.contiguous().numpy().tobytes())
        name = digest.hexdigest()
        return self.folder / name[:2] / f"{name[2:]}.safetensors"

    def read(self, pixels: Tensor) -> Tensor | None:
        """What the network makes of a picture [3, h, w]; None if it is not there, or damaged."""
        try:
            return load(self.path(pixels).read_bytes())["value"]
        except (FileNotFoundError, SafetensorError, KeyError):
            return None

    def write(self, pixels: Tensor, value: Tensor) -> None:
        """Keep what the network makes of a picture; whatever happens meanwhile, the entry is whole or not there."""
        with whole_file(self.path(pixels)) as file:
            file.write(save({"value": value.detach().cpu().contiguous()}))


class Caches(NamedTuple):
    """What is known beforehand of a picture; None where nothing is kept of that kind."""

    moments: Cache | None = None
    vision: Cache | None = None

    def patches(self, pixels: Tensor) -> Tensor | None:
        """Of a reference [3, h, w]."""
        return None if self.vision is None else self.vision.read(pixels)

    def all_moments(self, pictures: Tensor) -> Tensor | None:
        """Of pictures [n, 3, h, w], [n, 2c, h', w']; None if one is not there."""
        if self.moments is None:
            return None
        found = [value for picture in pictures if (value := self.moments.read(picture)) is not None]
        return torch.stack(found) if len(found) == len(pictures) else None


def digest_of(network: nn.Module, settings: Mapping[str, Any]) -> str:
    """A hash of a network's weights and of what else decides its output."""
    digest = hashlib.sha256(json.dumps([VERSION, settings], sort_keys=True, default=str).encode())
    for name, value in sorted(network.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def folder_of(kind: str, folder: Path, model: Any, precision: str) -> Path:
    """Where the entries of a model's network lie.

    Args:
        kind: ``moments`` of the codec or ``vision`` of the encoder.
        precision: the trainer's; the vision tower runs under it.

    Raises:
        ValueError: the vision tower is trained, so that nothing about it is known beforehand.
    """
    if kind == "moments":
        return folder / f"{kind}-{digest_of(model.codec, _plain(model.codec.vae.config))}"
    tower = model.encoder.vision
    if any(p.requires_grad for p in tower.parameters()):
        raise ValueError("encoder.vision is trained: what it makes of a picture cannot be kept; only a frozen one's can")
    config = _plain(model.encoder.model_config.to_dict())
    settings = {"encoder": type(model.encoder).__name__, "attention": model.encoder.attention, "precision": precision}
    return folder / f"{kind}-{digest_of(tower, {**settings, 'config': config})}"


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without where it lies and what wrote it."""
    return {key: value for key, value in config.items() if not key.startswith("_") and key != "transformers_version"}


def open_caches(folder: str | Path, model: Any, precision: str) -> Caches:
    """The caches in a folder that are of this model's networks.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: it holds no cache, or one that was made with other weights or settings.
    """
    root = Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such cache; `mmgen cache` makes one")
    found: dict[str, Cache] = {}
    for kind in KINDS:
        there = sorted(p.name for p in root.glob(f"{kind}-*"))
        if not there:
            continue
        own = folder_of(kind, root, model, precision)
        if own.name not in there:
            network = "VAE" if kind == "moments" else "vision tower"
            raise ValueError(
                f"{root}: {kind} were made with another {network} or other settings ({there[0]}, not {own.name}); run `mmgen cache`"
            )
        found[kind] = Cache(own)
    if not found:
        raise ValueError(f"{root}: holds no cache; `mmgen cache` makes one")
    return Caches(**found)


def warn_of_misses(folder: str, ids: list[str]) -> None:
    """Say, once, that pictures of these rows are not in the cache."""
    warnings.warn(f"{folder}: not all pictures of {', '.join(ids[:2])} are in the cache; the VAE encodes such batches anew", stacklevel=2)
