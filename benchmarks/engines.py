"""DDP, FSDP2, ZeRO-2 and ZeRO-3 in two processes against one process on the same global batches.

    OMP_NUM_THREADS=1 python benchmarks/engines.py [--steps 20] [--engines ddp fsdp deepspeed_zero2 deepspeed_zero3] [--muon]
    OMP_NUM_THREADS=1 python benchmarks/engines.py --size 300m --steps 3

The tiny model trains LoRA, a full adapter and an Aligner, each row at a rate of its own, with clipping, two batches to a step, the
consistency penalty, an average, and held-out pictures before, in between and after. The table has the differences to one process: the
first loss, the curve, the learning rates, the weights after. ``--size 300m`` has new weights of a 300 M UNet, LoRA, and no evaluations; its
table has what a process takes of memory while it builds (beside what it has imported), its peak in all, and the seconds of a step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests import conftest, engines  # noqa: E402
from tests.engines import Run, checkpoint, fit, largest_difference, losses, seen  # noqa: E402


def make_parts(folder: Path, large: bool) -> None:
    """The tests' tiny parts; with ``large``, a UNet of 300 M parameters."""
    from diffusers import UNet2DConditionModel

    class Factory:  # what the fixtures ask of pytest
        @staticmethod
        def mktemp(name: str) -> Path:
            (folder / name).mkdir()
            return folder / name

    conftest.vlm.__wrapped__(Factory)
    conftest.clip.__wrapped__(Factory)
    unet = conftest.make_unet()
    if large:
        wide = {"block_out_channels": (320, 960), "attention_head_dim": (5, 15), "norm_num_groups": 32, "layers_per_block": 2}
        unet = UNet2DConditionModel.from_config({**unet.config, **wide, "transformer_layers_per_block": (1, 4)})
        print(f"UNet of {sum(p.numel() for p in unet.parameters()) / 1e6:.0f} M parameters")
    unet.save_pretrained(folder / "unet")
    conftest.make_vae().save_pretrained(folder / "vae")


def difference(folder: Path, name: str) -> list[str]:
    """A row of the table."""
    alone, both = losses(folder, "one"), losses(folder, name, 2)
    assert len(alone) == len(both), f"{name}: {len(both)} batches, not {len(alone)}"
    rates = [[row["lr"] for row in seen(folder, n)] for n in ("one", name)]
    one, two = (checkpoint(folder, n) for n in ("one", name))
    ema = next(k for k in one["callbacks"] if k.startswith("EMA"))
    scores = [
        [json.loads(line)["scores"] for line in (folder / f"runs/{n}/version_0/evaluation/reference.jsonl").read_text().splitlines()]
        for n in ("one", name)
    ]
    figures = (
        abs(alone[0] - both[0]),
        max(abs(a - b) for a, b in zip(alone, both, strict=True)),
        max(abs(a[k] - b[k]) for a, b in zip(*rates, strict=True) for k in a),
        largest_difference(one["state_dict"], two["state_dict"]),
        largest_difference(one["callbacks"][ema]["mean"], two["callbacks"][ema]["mean"]),
        max(abs(a[k] - b[k]) for a, b in zip(*scores, strict=True) for k in a),
    )
    return [name, *(f"{f:.1e}" for f in figures)]


def cost(folder: Path, name: str, world: int) -> list[str]:
    """A row of the table of ``--size 300m``: of the rank that took most."""
    rows = [seen(folder, name, rank) for rank in range(world)]
    built, peak = (max(row[key] for rank in rows for row in rank) / 1e9 for key in ("built", "peak"))
    steps = [b["time"] - a["time"] for rank in rows for a, b in zip(rank, rank[1:], strict=False)]
    return [name, f"{built:.2f} GB", f"{peak:.2f} GB", f"{statistics.median(steps):.2f} s" if steps else "-"]


def show(row: list[str]) -> None:
    """Print a row of the table."""
    print("".join(f"{cell:>12}" if i else f"{cell:<18}" for i, cell in enumerate(row)), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="engines.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps")
    parser.add_argument("--engines", nargs="+", default=list(engines.ENGINES), choices=engines.ENGINES)
    parser.add_argument("--size", choices=("tiny", "300m"), default="tiny")
    parser.add_argument("--muon", action="store_true", help="train the adapter by Muon, which ZeRO replaces by AdamW")
    args = parser.parse_args()
    large = args.size == "300m"
    with TemporaryDirectory() as name:
        folder = Path(name)
        make_parts(folder, large)
        text = engines.YAML.format(parts=folder, clip=folder / "clip")
        if args.muon:
            text = text.replace("lr: 3.0e-3}", "lr: 3.0e-3, optimizer: muon}")
        (folder / "engines.yaml").write_text(engines.bare(text) if large else engines.aligned(text))
        more: tuple[str, ...] = (f"--trainer.max_steps={args.steps}", *(() if large else (engines.reference(folder / "clip"),)))
        heads = ("built", "peak", "a step") if large else ("first loss", "curve", "rates", "weights", "average", "scores")
        show(["", *heads])
        fit(folder, Run("one", None, (*more, "--data.init_args.batch_size=4")))
        if large:
            show(cost(folder, "one", 1))
        for engine in args.engines:
            fit(folder, Run(engine, engine, more))
            show(cost(folder, engine, 2) if large else difference(folder, engine))


if __name__ == "__main__":
    main()
