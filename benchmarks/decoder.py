"""How well pictures are rendered by the toybox's decoder, of latents that the encoder makes and of those that the base draws.

    python benchmarks/decoder.py [--vae runs/toybox/decoder] [--count 96] [--seed 1]

The oracle rates held-out captions' own pictures that went through the VAE alone, and what the shipped base draws for the captions (10
steps, guidance 2): SC, PQ and O as Instruct-Imagen has them, the share of pictures that meet all conditions, and the median of what a
rendering of the oracle's reading leaves unexplained. With ``--vae``, another decoder beside the shipped one
(``experiments/toybox/decoder.yaml``).
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from claims.jobs import shipped
from claims.rated import overall
from diffusers import AutoencoderKL
from lightning_mmgen.callbacks import sample
from numpy.typing import NDArray

from lightning_mmgen.data.images import pixels
from lightning_mmgen.data.sources import ToyboxSource
from lightning_mmgen.metrics.following import toybox_rating, unexplained
from lightning_mmgen.pipeline import MultimodalPipeline, to_pil
from lightning_mmgen.prompt import Record
from lightning_mmgen.toybox.oracle import judge, read_all


def row(name: str, pictures: list[NDArray[np.uint8]], records: list[Record]) -> str:
    """What the oracle says of pictures [64, 64, 3]."""
    truths = [record.extra["truth"] for record in records]
    rated = overall([toybox_rating(p, truth) for p, truth in zip(pictures, truths, strict=True)])
    readings = read_all(np.stack(pictures))
    strict = np.mean([judge(seen, truth).strict for seen, truth in zip(readings, truths, strict=True)])
    left = np.median([unexplained(p, seen) for p, seen in zip(pictures, readings, strict=True)])
    return f"{name:<28}{rated.sc:>8.3f}{rated.pq:>8.3f}{rated.o:>8.3f}{strict:>16.3f}{left:>14.3f}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--vae", help="folder of a VAE with the shipped one's encoder")
    parser.add_argument("--count", type=int, default=96)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    source = ToyboxSource({"caption": 1.0}, held_out=True)
    records, module = [source.record(i) for i in range(args.count)], shipped()
    z_0 = module.codec.encode(torch.stack([pixels(r.target) for r in records if r.target is not None]))
    print(f"{'':<28}{'SC':>8}{'PQ':>8}{'O':>8}{'all conditions':>16}{'unexplained':>14}")
    for vae in (None, args.vae) if args.vae else (None,):
        if vae:
            module.codec.vae.load_state_dict(AutoencoderKL.from_pretrained(vae, torch_dtype=torch.float32).state_dict())
        alone, drawn = module.codec.decode(z_0), sample(MultimodalPipeline.of(module), records, seed=args.seed, side=64)
        print(vae or "shipped")
        for name, pictures in (("  the VAE alone", alone), ("  the base draws", drawn)):
            print(row(name, [np.asarray(p) for p in to_pil(pictures)], records), flush=True)


if __name__ == "__main__":
    main()
