"""What it costs a training step to capture the attention of 8 layers for 5 words: time and memory beside a step without.

    python benchmarks/attention_cost.py [--tokens 256 1024 4096] [--pairs 5] [--width 256] [--layers 8]

A language model of the Mistral shape with random weights; steps with and without alternate, and each pair gives a ratio; the median counts.
Memory is what a step keeps for its backward pass: the bytes of the tensors that autograd saves, each storage once.
"""

from __future__ import annotations

import argparse
import time
from contextlib import nullcontext

import torch
from torch import Tensor
from transformers import MistralConfig, MistralModel

from lightning_mmgen.models.attention import captured
from lightning_mmgen.models.packing import use_by_sample


def model_of(width: int, layers: int, device: str) -> MistralModel:
    """Heads of width 32, a quarter as many groups."""
    heads = width // 32
    config = MistralConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        vocab_size=64,
        sliding_window=None,
        max_position_embeddings=8192,
    )
    model = MistralModel(config).to(device)
    model.set_attn_implementation("sdpa")
    use_by_sample(model)
    return model


def step(model: MistralModel, inputs: Tensor, words: int) -> None:
    """Forward and backward; with ``words``, of the maps of as many rows a sample of every layer, too."""
    with captured(model) if words else nullcontext({}) as maps:
        loss = model(inputs_embeds=inputs, use_cache=False).last_hidden_state.square().mean()
    sample = torch.arange(len(inputs), device=inputs.device).repeat_interleave(words)
    query = (inputs.shape[1] - 1 - torch.arange(words, device=inputs.device)).repeat(len(inputs))
    for record in maps.values():
        loss = loss + record.rows(sample, query).square().mean()
    loss.backward()


def timed(model: MistralModel, inputs: Tensor, words: int) -> float:
    """Seconds of a step."""
    begin = time.perf_counter()
    step(model, inputs, words)
    if inputs.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def saved(model: MistralModel, inputs: Tensor, words: int) -> int:
    """Bytes that a step keeps for its backward pass."""
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        step(model, inputs, words)
    return sum(kept.values())


def main(args: list[str] | None = None) -> list[tuple[int, float, float]]:
    """Print a row for each number of tokens: the ratio of times, and the bytes more in units of one map of all by all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--words", type=int, default=5)
    given = parser.parse_args(args)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, rows = model_of(given.width, given.layers, device), []
    print("tokens  time  memory more  of one N x N map (float32, all heads)")
    for n in given.tokens:
        inputs = torch.randn(given.batch, n, given.width, device=device)
        timed(model, inputs, given.words)
        ratios = []
        for i in range(given.pairs):
            pair = {words: timed(model, inputs, words) for words in ((0, given.words), (given.words, 0))[i % 2]}
            ratios.append(pair[given.words] / pair[0])
        ratio = float(torch.tensor(ratios).median())
        more = saved(model, inputs, given.words) - saved(model, inputs, 0)
        share = more / (4 * given.batch * (given.width // 32) * n * n)
        print(f"{n:6}  {ratio:4.2f}  {more / 2**20:8.2f} MiB  {share:.4f}", flush=True)
        rows.append((n, ratio, share))
    return rows


if __name__ == "__main__":
    main()
