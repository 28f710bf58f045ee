"""What a ragged batch costs against its samples one by one, forward and backward through encoder and adapter.

    OMP_NUM_THREADS=2 python benchmarks/ragged.py [--pairs 5] [--width 768] [--layers 3]

The VLM has the shape of Idefics2 (SigLIP, SwiGLU projector, Mistral) at a width where arithmetic dominates, with random weights; projector
and adapter are trained, tower and language model are frozen, as LoRA nearly leaves them. Batch and samples alternate in one process. Prints
the median of the pairwise ratios for several patterns of raggedness, beside what padding to the longest sample would cost, and exits with
status 1 if a batch costs more than 1.15 times its samples.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import AutoTokenizer, Idefics2Config, Idefics2Model

from lightning_mmgen.batch import pack
from lightning_mmgen.models import packing
from lightning_mmgen.models.adapter import Adapter, AdapterConfig
from lightning_mmgen.models.idefics2 import Idefics2Encoder
from lightning_mmgen.models.weights import locate

BAR = 1.15
Sample = tuple[int, tuple[int, ...]]
"""Words, and the side of each reference in patches."""
PATTERNS: dict[str, list[Sample]] = {
    "one of 4 x 324 picture tokens, seven of 20 words": [(20, (18,) * 4)] + [(20, ())] * 7,
    "half of 2 x 324, half of words alone": [(20, (18,) * 2)] * 4 + [(20, ())] * 4,
    "0 to 4 references of 144": [(20, (12,) * n) for n in (0, 1, 2, 3, 4, 1)],
    "0 to 4 references of several sizes": [(5, ()), (40, (6,)), (20, (12, 9)), (10, (18, 6, 9)), (30, (9, 12, 18, 6))],
    "words alone, 5 to 160": [(n, ()) for n in (5, 10, 20, 40, 80, 160)],
    "nearly equal: 144, and 20 to 30 words": [(20 + 2 * i, (12,)) for i in range(6)],
}


def build(width: int, layers: int) -> tuple[Idefics2Encoder, Adapter]:
    """Encoder (only its projector trained) and adapter of this width, with random weights."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(locate("toybox/vlm"))
    size = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers, "num_attention_heads": width // 64}
    config = Idefics2Config(
        vision_config={**size, "image_size": 18 * 14, "patch_size": 14},
        text_config={**size, "model_type": "mistral", "num_key_value_heads": width // 128, "vocab_size": len(tokenizer), "pad_token_id": 0},
        perceiver_config={"hidden_size": width, "resampler_depth": 1},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    encoder = Idefics2Encoder("random", image_tokens=324, norm=True)
    encoder.adopt(Idefics2Model._from_config(config, attn_implementation="sdpa"), tokenizer)
    encoder.vision.requires_grad_(False)
    encoder.language.requires_grad_(False)
    return encoder, AdapterConfig(layers, width // 64, width).build(width, width, 0)


def runner(encoder: Idefics2Encoder, adapter: Adapter, samples: list[Sample]) -> Callable[[], None]:
    """One forward and backward pass of these samples in a batch."""
    texts = [" ".join([f"[ref#{k + 1}]" for k in range(len(sides))] + ["a"] * words) for words, sides in samples]
    markers = [[k + 1 for k in range(len(sides))] for _, sides in samples]
    references = pack([[torch.rand(3, 14 * side, 14 * side) * 2 - 1 for side in sides] for _, sides in samples])

    def run() -> None:
        condition = adapter(encoder(texts, markers, references))
        loss: Tensor = condition.tokens[condition.mask].square().mean()
        loss.backward()

    return run


def seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(batch: Callable[[], None], alone: list[Callable[[], None]], pairs: int) -> tuple[float, float, float]:
    """Medians: seconds of the samples alone, and the ratios to them of the batch and of the batch padded."""

    def padded() -> None:
        with patch.object(packing, "is_ragged", lambda _: False):
            batch()

    def one_by_one() -> None:
        for run in alone:
            run()

    batch(), one_by_one()
    rows = [(seconds(one_by_one), seconds(batch), seconds(padded)) for _ in range(pairs)]
    apart, ours, theirs = (statistics.median(column) for column in zip(*((a, b / a, c / a) for a, b, c in rows), strict=True))
    return apart, ours, theirs


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=3)
    args = parser.parse_args()
    encoder, adapter = build(args.width, args.layers)
    print(f"{'pattern':<50}{'alone':>9}{'batch':>8}{'padded':>8}")
    worst = 0.0
    for name, samples in PATTERNS.items():
        alone = [runner(encoder, adapter, [sample]) for sample in samples]
        apart, ours, theirs = measure(runner(encoder, adapter, samples), alone, args.pairs)
        print(f"{name:<50}{apart:>7.2f} s{ours:>8.3f}{theirs:>8.2f}", flush=True)
        worst = max(worst, ours)
    print(f"worst ratio {worst:.3f}, at most {BAR}")
    return int(worst > BAR)


if __name__ == "__main__":
    sys.exit(main())
