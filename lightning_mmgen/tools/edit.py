"""``mmgen edit``: instructions one after the other, each on what the one before left, and how far the rest of the picture drifts."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from PIL import Image as PILImage
from PIL.Image import Image
from torch import Tensor
from torchmetrics import Metric

from ..data.images import open_picture, pixels
from ..metrics.drift import MaskedMSE, MaskedPSNR, MaskedSSIM
from ..pipeline import MultimodalPipeline
from ..prompt import EDIT, MultimodalPrompt, Reference
from .generate import load_pipeline

METRICS: dict[str, type[Metric]] = {"PSNR": MaskedPSNR, "SSIM": MaskedSSIM, "MSE": MaskedMSE}


def edit(args: argparse.Namespace) -> str:
    """Write the picture after each turn.

    Returns:
        The table of drift: each turn against the picture before it and against the first, outside the mask where there is one.

    Raises:
        ValueError: an empty instruction, or a mask of another size or without anything that may change.
    """
    if not all(text.strip() for text in args.instruction):
        raise ValueError("--instruction is empty")
    before = open_picture(Path(args.image).read_bytes())
    mask = None if args.mask is None else open_picture(Path(args.mask).read_bytes()).convert("L")
    if mask is not None and mask.size != before.size:
        raise ValueError(f"{args.mask}: is {mask.width} x {mask.height}, {args.image} {before.width} x {before.height}")
    if mask is not None and mask.getextrema()[1] == 0:
        raise ValueError(f"{args.mask}: is empty, the edit may change nothing")
    pipeline = load_pipeline(args)
    size = fitting(before.size, pipeline)
    pictures = [before.resize(size, PILImage.Resampling.BICUBIC)]
    for turn, text in enumerate(args.instruction):
        pictures.append(one_turn(pipeline, pictures[-1], text, args.seed + turn))
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    turns = range(1, len(pictures))
    paths = [out] if len(turns) == 1 else [out.with_name(f"{out.stem}-{k}{out.suffix or '.png'}") for k in turns]
    for path, picture in zip(paths, pictures[1:], strict=True):
        picture.save(path)
    keep = torch.zeros(1, 1, size[1], size[0])
    if mask is not None:
        keep = (pixels(mask.resize(size, PILImage.Resampling.BILINEAR)).mean(0, keepdim=True)[None] + 1) / 2
    return "\n".join([drift_table(pictures, args.instruction, keep, mask is not None), *map(str, paths)])


def one_turn(pipeline: MultimodalPipeline, source: Image, instruction: str, seed: int) -> Image:
    """One edit, in the size of its source."""
    prompt = MultimodalPrompt(EDIT.format(instruction), (Reference(1, source, "picture", "source"),))
    noise = torch.Generator().manual_seed(seed)
    drawn = pipeline(prompt, height=source.height, width=source.width, generator=noise).images
    return drawn[0]  # type: ignore[return-value]


def fitting(size: tuple[int, int], pipeline: MultimodalPipeline) -> tuple[int, int]:
    """The width and height that the model can draw, of about a picture's aspect and of about the area that the UNet is made for."""
    scale = pipeline.side / (size[0] * size[1]) ** 0.5
    width, height = (max(round(length * scale / pipeline.multiple), 1) * pipeline.multiple for length in size)
    return width, height


def drift_table(pictures: list[Image], instructions: list[str], mask: Tensor, masked: bool) -> str:
    """A row a turn: how far what lies outside the mask is from the picture before it, and from the first."""
    tensors = [pixels(picture)[None] for picture in pictures]
    head = "".join(f"{f'{name} {against}':>16}" for against in ("before", "first") for name in METRICS)
    lines = [f"{'turn':<6}{head}   instruction{', outside the mask' if masked else ''}"]
    for k, text in enumerate(instructions, 1):
        cells = []
        for before in (k - 1, 0):
            cells += [f"{float(kind()(tensors[k], tensors[before], mask)):>16.4g}" for kind in METRICS.values()]
        lines.append(f"{k:<6}{''.join(cells)}   {text}")
    return "\n".join(lines)
