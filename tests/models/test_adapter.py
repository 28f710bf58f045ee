from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from lightning_mmgen.batch import Condition, Span
from lightning_mmgen.models.adapter import Adapter, AdapterConfig, Block, rotate
from lightning_mmgen.models.packing import Layout


def condition(*lengths: int) -> Condition:
    """Random tokens of width 24, one sample a length, right-padded; the mask alone tells their lengths."""
    n = max(lengths)
    mask = torch.tensor([[i < length for i in range(n)] for length in lengths])
    return Condition(torch.randn(len(lengths), n, 24), mask, [[Span(1, 2)] for _ in lengths])


def test_lengths_pack_the_samples_and_change_nothing(adapter: Adapter) -> None:
    given, rows = condition(7, 3, 1), []
    adapter.blocks[0].register_forward_pre_hook(lambda _, args: rows.append(args[0].shape))
    padded, packed = adapter(given), adapter(given._replace(lengths=[7, 3, 1]))
    assert rows == [(3, 7, 8), (1, 11, 8)]
    torch.testing.assert_close(packed.tokens[given.mask], padded.tokens[given.mask], rtol=0, atol=1e-5)
    torch.testing.assert_close(packed.pooled, padded.pooled, rtol=0, atol=1e-5)
    assert not packed.tokens[~given.mask].any()


@pytest.mark.parametrize("mode", ["train", "eval", "inference"])
def test_shapes(adapter: Adapter, mode: str) -> None:
    adapter.train(mode == "train")
    given = condition(5, 3)
    with torch.set_grad_enabled(mode != "inference"):
        out = adapter(given)
    assert out.tokens.shape == (2, 5, 16) and out.pooled is not None and out.pooled.shape == (2, 12)
    assert torch.equal(out.mask, given.mask) and out.spans == given.spans


def test_all_modes_compute_the_same(adapter: Adapter) -> None:
    given = condition(5, 3)
    train = adapter(given)
    with torch.no_grad():
        inference = adapter.eval()(given)
    torch.testing.assert_close(inference.tokens[given.mask], train.tokens[given.mask], rtol=0, atol=1e-5)
    torch.testing.assert_close(inference.pooled, train.pooled, rtol=0, atol=1e-5)


def test_a_late_token_changes_an_early_output(adapter: Adapter) -> None:
    given = condition(5)
    other = given._replace(tokens=given.tokens.clone())
    other.tokens[0, 4] += torch.randn(24)
    assert (adapter(given).tokens[0, 0] - adapter(other).tokens[0, 0]).abs().max() > 1e-4


@pytest.mark.parametrize("training", [True, False])
def test_padding_has_no_effect_on_real_tokens(adapter: Adapter, training: bool) -> None:
    adapter.train(training)
    given = condition(6, 3)
    alone = Condition(given.tokens[1:, :3], given.mask[1:, :3], [[]])
    with torch.set_grad_enabled(training):
        together, single = adapter(given), adapter(alone)
        other = adapter(given._replace(tokens=torch.where(given.mask[..., None], given.tokens, 1e3)))
    for out in (together, other):
        torch.testing.assert_close(out.tokens[1:, :3], single.tokens, rtol=0, atol=1e-5)
        torch.testing.assert_close(out.pooled[1:], single.pooled, rtol=0, atol=1e-5)


def test_pooled_projects_the_masked_mean_of_the_last_norm(adapter: Adapter) -> None:
    given, seen = condition(5, 3), []
    adapter.norm_out.register_forward_hook(lambda _, args, out: seen.append(out))
    pooled = adapter(given).pooled
    for b, length in enumerate((5, 3)):
        mean = sum(seen[0][b, i] for i in range(length)) / length
        torch.testing.assert_close(pooled[b], adapter.project_pooled(mean), rtol=0, atol=1e-5)


def test_pooled_zeros_are_zeros_without_a_projection() -> None:
    adapter = AdapterConfig(layers=1, heads=2, width=8, pooled="zeros").build(24, 16, 12)
    assert torch.equal(adapter(condition(4)).pooled, torch.zeros(1, 12))
    assert not any("pooled" in n for n, _ in adapter.named_parameters())


def test_no_pooled_vector_where_the_unet_takes_none() -> None:
    assert AdapterConfig(layers=1, heads=2, width=8).build(24, 16, 0)(condition(4)).pooled is None


def test_config_sets_layers_heads_and_width() -> None:
    adapter = AdapterConfig(layers=3, heads=2).build(24, 16, 12)
    assert len(adapter.blocks) == 3 and adapter.config.width == 16 and adapter.config.heads == 2
    assert AdapterConfig(layers=1, heads=1, width=8).build(24, 16, 12).project_in.out_features == 8
    one, two = (AdapterConfig(layers=1, heads=h, width=8).build(24, 16, 12) for h in (1, 2))
    two.load_state_dict(one.state_dict())
    given = condition(4)
    assert not torch.allclose(one(given).tokens, two(given).tokens, atol=1e-5)


def test_rotation_is_that_of_llama() -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    q, k, angles = torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 8), torch.rand(7, 4) * 6
    both = torch.cat([angles, angles], -1)[None]
    expected = apply_rotary_pos_emb(q, k, both.cos(), both.sin())
    torch.testing.assert_close((rotate(q, angles.cos(), angles.sin()), rotate(k, angles.cos(), angles.sin())), expected)


def test_a_block_is_pytorchs_own_layer_where_no_angles_are_given() -> None:
    block, layer = Block(16, 2), torch.nn.TransformerEncoderLayer(16, 2, 64, 0.0, "gelu", batch_first=True, norm_first=True)
    projections = {
        f"self_attn.in_proj_{kind}": torch.cat([getattr(p, kind) for p in (block.q_proj, block.k_proj, block.v_proj)])
        for kind in ("weight", "bias")
    }
    others = {n.replace("out_proj", "self_attn.out_proj"): v for n, v in block.state_dict().items() if n[1:6] != "_proj"}
    layer.load_state_dict(projections | others)
    x, mask = torch.randn(2, 5, 16), torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    expected, packed = layer(x, src_key_padding_mask=~mask), Layout(mask, [5, 3])
    torch.testing.assert_close(block(x, Layout(mask, None), None), expected)
    torch.testing.assert_close(block(packed.pack(x), packed, None), packed.pack(expected))


def test_what_a_token_sees_depends_on_distances_alone(adapter: Adapter) -> None:
    given = condition(5)
    longer = Condition(torch.cat([torch.randn(1, 3, 24), given.tokens], 1), torch.tensor([[False] * 3 + [True] * 5]), [[]])
    torch.testing.assert_close(adapter(longer).tokens[:, 3:], adapter(given).tokens, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("positions", "same"), [("none", True), ("rotary", False)])
def test_the_order_of_tokens_matters_only_with_positions(positions: Literal["none", "rotary"], same: bool) -> None:
    adapter = AdapterConfig(layers=2, heads=2, width=8, positions=positions).build(24, 16, 12)
    given = condition(5)
    turned = adapter(given._replace(tokens=given.tokens.flip(1))).tokens.flip(1)
    assert torch.allclose(adapter(given).tokens, turned, atol=1e-5) == same


def test_every_parameter_gets_a_gradient(adapter: Adapter) -> None:
    out = adapter(condition(5, 3))
    (out.tokens[out.mask].square().sum() + out.pooled.square().sum()).backward()
    for name, parameter in adapter.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_saved_and_loaded_it_computes_the_same(adapter: Adapter, tmp_path: Path) -> None:
    adapter.save_pretrained(tmp_path)
    loaded = AdapterConfig(pretrained=str(tmp_path)).build(24, 16, 12)
    given = condition(5, 3)
    unequal = {"_name_or_path", "_use_default_values"}
    assert {k: v for k, v in loaded.config.items() if k not in unequal} == {k: v for k, v in adapter.config.items() if k not in unequal}
    torch.testing.assert_close(loaded(given).tokens, adapter(given).tokens, rtol=0, atol=1e-6)
    torch.testing.assert_close(loaded(given).pooled, adapter(given).pooled, rtol=0, atol=1e-6)


@pytest.mark.parametrize("ends", [(20, 16, 12), (24, 20, 12), (24, 16, 0)])
def test_a_saved_adapter_of_other_widths_raises(adapter: Adapter, tmp_path: Path, ends: tuple[int, int, int]) -> None:
    adapter.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="widths"):
        AdapterConfig(pretrained=str(tmp_path)).build(*ends)


@pytest.mark.parametrize("training", [True, False])
def test_gradient_checkpointing_recomputes_and_gives_equal_gradients(adapter: Adapter, training: bool) -> None:
    adapter.train(training)
    given, calls = condition(5, 3), []
    adapter.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    plain = gradients(adapter, given)
    assert len(calls) == 1
    adapter.enable_gradient_checkpointing()
    recomputed = gradients(adapter, given)
    assert len(calls) == 3
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=0, atol=1e-5, msg=name)


def gradients(adapter: Adapter, given: Condition) -> dict[str, Any]:
    adapter.zero_grad()
    adapter(given).tokens[given.mask].square().sum().backward()
    return {n: p.grad.clone() for n, p in adapter.named_parameters() if p.grad is not None}
