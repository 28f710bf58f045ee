"""``mmgen cache``: what the frozen networks of an experiment make of its pictures, kept for training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from ..batch import pack
from ..build.journal import Shard
from ..data.cache import Cache, folder_of
from ..data.datamodule import MultimodalDataModule
from ..data.order import Position, RecordDataset
from ..data.recipe import Sample
from ..data.streams import Stream


def cache(configs: list[str], out: str, kinds: list[str], epochs: int = 1, shard: str = "0/1", device: str | None = None) -> str:
    """Fill a cache with the pictures of an experiment's training data that are not in it yet.

    Args:
        configs: YAMLs of the experiment.
        out: folder of the cache: the experiment's ``data.cache``.
        kinds: ``moments`` of the VAE, ``vision`` for the patches of the encoder's tower.
        epochs: of the data to go through, for recipes that draw other targets or references each epoch.
        shard: ``i/n``, the part of the rows that this process does.
        device: cuda where there is one by default.

    Returns:
        What was done, as a line a kind.

    Raises:
        ValueError: the data are a stream, or the vision tower is trained.
    """
    from ..cli import main

    cli = main([argument for config in configs for argument in ("-c", config)], run=False)
    model, data, trainer = cli.model, cli.datamodule, cli.trainer
    if isinstance(data.train, Stream):
        raise ValueError("data.train is a stream; the rows of a cache have places")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    trainer.strategy.connect(model)
    data.trainer = trainer
    build(model, kinds)
    data.setup("cache")
    for part in (model.codec, *([model.encoder] if "vision" in kinds else [])):
        part.to(device).eval()
    caches = {kind: Cache(folder_of(kind, Path(out), model, str(trainer.precision))) for kind in kinds}
    networks = {"moments": model.codec.moments, "vision": model.encoder.see}
    counts = {kind: [0, 0] for kind in kinds}
    with torch.no_grad(), trainer.precision_plugin.forward_context():
        for batch, kind in ((batch, kind) for batch in batches(data, epochs, Shard.parse(shard)) for kind in kinds):
            for group in pictures(batch, kind):
                new, old = keep(caches[kind], networks[kind], group, device)
                counts[kind] = [counts[kind][0] + new, counts[kind][1] + old]
    return "\n".join(f"{caches[k].folder}: {new} pictures added, {old} were there" for k, (new, old) in counts.items())


def build(model: Any, kinds: list[str]) -> None:
    """Build what is needed of the model: all of it for the vision tower, which is as the parameter table leaves it."""
    if "vision" in kinds:
        model.configure_model()
    else:
        model.codec = model.parts[2].build()


def batches(data: MultimodalDataModule, epochs: int, shard: Shard) -> Iterator[list[Sample]]:
    """The batches of one process in training, those of this shard, without bad rows: what a network makes of a picture differs in its last
    bits with the batch around it."""
    sampler, size = data.sampler(), data.batch_size
    starts = range(shard.index * size, len(data.train), shard.count * size)
    rows = np.arange(len(data.train))
    orders = (np.concatenate([order := sampler.order(e), np.setdiff1d(rows, order)]) for e in range(epochs))  # with what the epoch drops
    places = ([Position(int(i), e, sampler.size_of(int(i))) for i in o[at : at + size]] for e, o in enumerate(orders) for at in starts)
    dataset = RecordDataset(data.train, data.recipe, data.seed)
    loader: Iterable[Any] = DataLoader(dataset, batch_sampler=places, num_workers=data.workers, collate_fn=list)  # type: ignore[arg-type]
    for batch in tqdm(loader, total=epochs * len(starts), unit="batch", disable=None):
        yield [item for item in batch if isinstance(item, Sample)]


def pictures(batch: list[Sample], kind: str) -> list[Tensor]:
    """What a network of this kind sees of a batch, [n, 3, h, w] for each size."""
    if kind == "vision":
        return [group.pixels for group in pack([sample.references for sample in batch])]
    targets = [[sample.target] for sample in batch]
    sources = [[sample.target if sample.source is None else sample.source] for sample in batch]
    edits = any(sample.source is not None for sample in batch)
    return [group.pixels for each in (targets, *([sources] if edits else [])) for group in pack(each)]


def keep(cache: Cache, network: Callable[[Tensor], Tensor], pictures: Tensor, device: str) -> tuple[int, int]:
    """Add the pictures [n, 3, h, w] that are not there; how many were added, and how many were there."""
    missing = [i for i, picture in enumerate(pictures) if cache.read(picture) is None]
    if missing:
        values = network(pictures.to(device))
        for i in missing:
            cache.write(pictures[i], values[i])
    return len(missing), len(pictures) - len(missing)
