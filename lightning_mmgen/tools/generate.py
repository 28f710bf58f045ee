"""``mmgen generate`` and ``mmgen export``: a trained model, from a checkpoint or an exported folder."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ..answering import VisualInstructionTuning
from ..checkpoint import AtomicCheckpointIO, beginning
from ..module import MultimodalDiffusion
from ..pipeline import MultimodalPipeline
from ..prompt import MultimodalPrompt, Reference
from ..tuning import TunedModule
from .export import export
from .export_vlm import export_vlm


def load_module(ckpt: str | Path) -> MultimodalDiffusion:
    """The image generator of a checkpoint, see :func:`load`.

    Raises:
        ValueError: it is none.
    """
    module = load(ckpt)
    if not isinstance(module, MultimodalDiffusion):
        raise ValueError(f"{ckpt}: a {type(module).__name__} draws no pictures")
    return module


def load(ckpt: str | Path) -> TunedModule:
    """The module of a checkpoint, with its averaged weights where the run kept an average.

    The run's ``config.yaml`` is looked for in the checkpoint's folder and those above it.

    Raises:
        FileNotFoundError: no such checkpoint, or no ``config.yaml`` near it.
    """
    path = Path(ckpt)
    checkpoint = AtomicCheckpointIO().load_checkpoint(path)
    config = next((p / "config.yaml" for p in path.resolve().parents[:3] if (p / "config.yaml").is_file()), None)
    if config is None:
        raise FileNotFoundError(f"{ckpt}: no config.yaml of a run in its folder or above")
    module = instantiate_model(config)
    module.configure_model()
    module.load_trained(checkpoint)
    return module.eval()


def instantiate_model(config: Path) -> TunedModule:
    """The module of a run's resolved configuration, unbuilt.

    Raises:
        ValueError: it names a class that is not here, say.
    """
    from ..cli import one_line, read_model

    try:
        return read_model(config)
    except argparse.ArgumentError as error:
        raise ValueError(f"{config}: {one_line(error)}") from error


def export_checkpoint(ckpt: str, out: str, dtype: str | None = None, without: Sequence[str] = ()) -> Path:
    """Write a checkpoint's model to ``out``; averaged weights where there are any. A file ``NAME.ckpt`` is for the ``start`` of another
    fit, see :func:`~lightning_mmgen.checkpoint.beginning`.

    Raises:
        ValueError: parts are to be left out of what is no such file.
    """
    if Path(out).suffix == ".ckpt":
        io = AtomicCheckpointIO()
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        io.save_checkpoint(beginning(io.load_checkpoint(ckpt), without), out)
        return Path(out)
    if without:
        raise ValueError("--without needs an --out FILE.ckpt")
    module, kind = load(ckpt), getattr(torch, dtype) if dtype else None
    if isinstance(module, VisualInstructionTuning):
        return export_vlm(module, out, kind)
    assert isinstance(module, MultimodalDiffusion)
    return export(module, out, kind)


def load_pipeline(args: argparse.Namespace) -> MultimodalPipeline:
    """The model of ``--ckpt`` or ``--model``, on the GPU if there is one, with the sampler that the arguments ask for."""
    pipeline = MultimodalPipeline.of(load_module(args.ckpt)).frozen() if args.ckpt else MultimodalPipeline.from_pretrained(args.model)
    if torch.cuda.is_available():
        pipeline.to("cuda")
    given = {"steps": args.steps, "guidance_scale": args.guidance, "guidance": args.guidance_rule, "scheduler": args.scheduler}
    given["image_guidance_scale"] = args.image_guidance
    pipeline.sampler = replace(pipeline.sampler, **{k: v for k, v in given.items() if v is not None})
    return pipeline


def generate(args: argparse.Namespace) -> list[Path]:
    """Draw ``args.count`` pictures of one prompt; picture i has seed ``args.seed + i``.

    Raises:
        ValueError: a marker without its reference, or a size that the model cannot draw.
    """
    for name in ("count", "steps", "height", "width"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ValueError(f"--{name} must be 1 or more, not {value}")
    references = tuple(Reference(k + 1, Path(r).read_bytes()) for k, r in enumerate(args.ref))
    prompt, pipeline = MultimodalPrompt(args.prompt, references), load_pipeline(args)
    noise = [torch.Generator().manual_seed(args.seed + i) for i in range(args.count)]
    drawn = pipeline([prompt] * args.count, height=args.height, width=args.width, generator=noise).images
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    paths = [out] if args.count == 1 else [out.with_name(f"{out.stem}-{i}{out.suffix or '.png'}") for i in range(args.count)]
    for picture, path in zip(drawn, paths, strict=True):
        picture.save(path)  # type: ignore[union-attr]
    return paths
