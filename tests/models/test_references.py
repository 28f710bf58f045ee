"""References through the UNet's own encoder, against diffusers' whole forward pass and plain re-computations."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from lightning_mmgen.batch import Batch, Condition, Context, pack
from lightning_mmgen.diffusion import ConditionDropout, drop_condition
from lightning_mmgen.models.adapter import AdapterConfig
from lightning_mmgen.models.codec import CodecConfig
from lightning_mmgen.models.idefics2 import Idefics2Encoder
from lightning_mmgen.models.parameters import Row
from lightning_mmgen.models.references import ReferenceAttention, ReferenceAttentionConfig, ReferenceLayer, give_partial_pass
from lightning_mmgen.models.unet import UNetConfig, denoise, down_features, pooled_features
from lightning_mmgen.module import MultimodalDiffusion
from lightning_mmgen.pipeline import MultimodalPipeline
from lightning_mmgen.prompt import MultimodalPrompt, Reference
from lightning_mmgen.tools.export import export

from ..conftest import make_unet

CONFIGS = Path(__file__).parent.parent / "configs"
PROMPTS = (["a [ref#1] cat and a [ref#2] box", "no picture", "a [ref#7] star"], [[1, 2], [], [7]])
PHRASES = [["cat", "red box"], [], ["star"]]


def make(parts: Path, config: ReferenceAttentionConfig | None) -> MultimodalDiffusion:
    rows = [Row("encoder", "frozen"), Row("adapter", "full", lr=1e-3), Row("unet", "lora", lr=1e-3)]
    module = MultimodalDiffusion(
        Idefics2Encoder(str(parts / "vlm"), image_tokens=16),
        AdapterConfig(layers=2, heads=2, width=8),
        UNetConfig(str(parts / "unet"), None),
        CodecConfig(str(parts / "vae"), None),
        [*rows, Row("reference_attention", "full", lr=1e-3)] if config else rows,
        reference_attention=config,
    )
    torch.manual_seed(1)
    module.configure_model()
    return module


def awake(module: MultimodalDiffusion) -> MultimodalDiffusion:
    """The layers' output no longer zero."""
    assert module.reference_attention is not None
    for layer in module.reference_attention.layers.values():
        torch.nn.init.normal_(layer.attention.to_out[0].weight, std=0.5)  # type: ignore[union-attr, index]
    return module


def pictures(*sizes: int) -> list[Tensor]:
    return [torch.rand(3, side, side, generator=torch.Generator().manual_seed(i)) * 2 - 1 for i, side in enumerate(sizes)]


def told(unet: UNet2DConditionModel) -> Condition:
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    pooled = pooled_features(unet)
    return Condition(torch.randn(2, 5, 16), mask, [[], []], torch.randn(2, pooled) if pooled else None)


@pytest.mark.parametrize("shape", ["unet", "sd15_unet"])
def test_features_are_what_the_middle_block_gets_of_clean_latents(shape: str, request: pytest.FixtureRequest) -> None:
    unet: UNet2DConditionModel = request.getfixturevalue(shape)
    condition, z_0, seen = told(unet), torch.randn(2, 4, 8, 8), []
    hook = unet.mid_block.register_forward_pre_hook(lambda block, args: seen.append(args[0]))  # type: ignore[union-attr]
    with torch.no_grad():
        denoise(unet, z_0, torch.zeros(2, dtype=torch.long), condition, (16, 16))
        hook.remove()
        torch.testing.assert_close(down_features(unet, z_0, condition, (16, 16)), seen[0].flatten(2).mT, rtol=0, atol=0)


def test_a_layer_is_plain_attention_and_leaves_samples_without_references_alone() -> None:
    layer = ReferenceLayer(16, 4)
    hidden, mask = torch.randn(3, 16, 2, 3), torch.tensor([[True] * 4, [False] * 4, [True, True, False, False]])
    context = Context(torch.randn(3, 4, 16), mask)
    assert torch.equal(layer(hidden, context), hidden)  # zero at the start
    out: Any = layer.attention.to_out
    torch.nn.init.normal_(out[0].weight)
    torch.nn.init.normal_(out[0].bias)
    with torch.no_grad():
        given = layer(hidden, context)
        assert torch.equal(given[1], hidden[1])
        for b, count in ((0, 4), (2, 2)):
            x = layer.norm(hidden[b].flatten(1).T)
            keys = layer.norm_context(context.tokens[b, :count])
            q, k, v = layer.attention.to_q(x), layer.attention.to_k(keys), layer.attention.to_v(keys)
            heads = [(q[:, s] @ k[:, s].T / 2).softmax(-1) @ v[:, s] for s in (slice(i, i + 4) for i in range(0, 16, 4))]
            torch.testing.assert_close(given[b], hidden[b] + out[0](torch.cat(heads, 1)).T.unflatten(1, (2, 3)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("at", ["bottleneck", "lowest"])
def test_the_first_step_is_the_pretrained_models_bit_for_bit(at: Any, parts: Path) -> None:
    plain, with_layers = make(parts, None), make(parts, ReferenceAttentionConfig(at, size=16, in_prompt=True))
    references, z_t, t = pack([pictures(16, 16), [], pictures(16)]), torch.randn(3, 4, 8, 8), torch.tensor([999, 500, 1])
    with torch.no_grad():
        expected = plain(z_t, t, plain.conditioner(*PROMPTS, references, PHRASES), (16, 16))
        assert torch.equal(with_layers(z_t, t, with_layers.conditioner(*PROMPTS, references, PHRASES), (16, 16)), expected)
        changed = awake(with_layers)(z_t, t, with_layers.conditioner(*PROMPTS, references, PHRASES), (16, 16))
    moved = (changed - expected).abs().flatten(1).amax(1)
    assert moved[0] > 1e-3 and moved[1] == 0 and moved[2] > 1e-3


def test_parameters_at_the_size_of_sdxl() -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(CONFIGS / "sdxl", subfolder="unet"))
        counts = {at: ReferenceAttentionConfig(at).build(unet).num_parameters() for at in ("bottleneck", "lowest")}  # type: ignore[arg-type]
    projections = 4 * 1280**2 + 1280  # queries, keys, values, output and its bias
    assert counts == {"bottleneck": projections + 4 * 1280, "lowest": 2 * (projections + 4 * 1280)}
    assert round(counts["bottleneck"] / 1e6, 1) == 6.6


def test_a_text_only_prompt_reads_its_markers_as_words(parts: Path) -> None:
    module, references = awake(make(parts, ReferenceAttentionConfig(size=16))), pack([pictures(16, 16), [], pictures(16)])
    with torch.no_grad():
        condition = module.conditioner(*PROMPTS, references, PHRASES)
        words = module.adapter(module.encoder(PROMPTS[0], [[], [], []], []))
        torch.testing.assert_close(condition.tokens[0], words.tokens[0], rtol=0, atol=1e-5)
        assert condition.spans == [[], [], []]
        assert condition.context is not None and condition.context.mask.sum(1).tolist() == [32, 0, 16]
        # the same pictures under other markers
        swapped = module.conditioner(PROMPTS[0], [[2, 1], [], [7]], references, PHRASES).context
    assert swapped is not None
    moved = (swapped.tokens - condition.context.tokens).abs().amax((1, 2))
    assert moved[0] > 1e-4 and moved[2] < 1e-5


def test_a_ragged_batch_is_its_samples_one_by_one(parts: Path) -> None:
    module = awake(make(parts, ReferenceAttentionConfig("lowest", size=16, in_prompt=True)))
    shown = [pictures(16, 8), [], pictures(24)]
    z_t, t = torch.randn(3, 4, 8, 8), torch.tensor([999, 500, 1])
    passes: list[int] = []
    with torch.no_grad():
        counter = module.unet.conv_in.register_forward_hook(lambda _, inputs, __: passes.append(len(inputs[0])))
        condition = module.conditioner(*PROMPTS, pack(shown), PHRASES)
        counter.remove()
        assert passes == [3], "one pass, whatever sizes the pictures have: ranks wait for each other's"
        together = module(z_t, t, condition, (16, 16))
        for b in range(3):
            alone = module.conditioner([PROMPTS[0][b]], [PROMPTS[1][b]], pack([shown[b]]), [PHRASES[b]])
            torch.testing.assert_close(module(z_t[b : b + 1], t[b : b + 1], alone, (16, 16))[0], together[b], rtol=0, atol=1e-5)


def test_every_layer_and_the_unet_below_it_gets_a_gradient(parts: Path) -> None:
    module = awake(make(parts, ReferenceAttentionConfig(size=16)))
    condition = module.conditioner(*PROMPTS, pack([pictures(16, 16), [], pictures(16)]), PHRASES)
    assert condition.context is not None
    module(torch.randn(3, 4, 8, 8), torch.tensor([999, 500, 1]), condition, (16, 16)).square().sum().backward()
    for name, p in module.trainable().items():
        if name.startswith("reference_attention") and not name.endswith("bias"):
            assert p.grad is not None and p.grad.abs().max() > 0, name
    (inner,) = torch.autograd.grad(
        module.conditioner(*PROMPTS, pack([pictures(16, 16), [], pictures(16)]), PHRASES).context.tokens.sum(),  # type: ignore[union-attr]
        [p for n, p in module.trainable().items() if n.startswith("unet.down_blocks") and "attn2.to_q.lora_B" in n][:1],
    )
    assert inner.abs().max() > 0


def test_a_batch_without_references_still_makes_the_pass_and_moves_nothing(parts: Path) -> None:
    module = awake(make(parts, ReferenceAttentionConfig(size=16)))
    condition = module.conditioner(["a cat", "a box"], [[], []], [])
    out = module(torch.randn(2, 4, 8, 8), torch.tensor([5, 6]), condition, (16, 16))
    out.sum().backward()
    grads = [p.grad for n, p in module.trainable().items() if n.startswith("reference_attention")]
    assert all(g is not None and not g.any() for g in grads)  # connected, so that no rank waits for another


def test_dropping_the_references_drops_them_from_the_context(parts: Path) -> None:
    module = awake(make(parts, ReferenceAttentionConfig(size=16)))
    target = torch.zeros(3, 3, 16, 16)
    batch = Batch(*PROMPTS, pack([pictures(16, 16), [], pictures(16)]), target, [""] * 3, ["a", "b", "c"], torch.arange(3), None, PHRASES)
    dropped = drop_condition(batch, ConditionDropout(0.1, references=0.2), torch.tensor([0.2, 0.9, 0.9]))
    assert dropped.phrases == [[], [], ["star"]] and dropped.markers == [[], [], [7]]
    context = module.condition(dropped).context
    assert context is not None and context.mask.sum(1).tolist() == [0, 0, 16]


def test_the_pipeline_encodes_references_once_and_survives_its_export(parts: Path, tmp_path: Path) -> None:
    module = awake(make(parts, ReferenceAttentionConfig("lowest", size=16))).eval()
    image = pictures(16)[0]
    shown = Reference(1, as_picture(image), "cat")
    prompt = MultimodalPrompt("a [ref#1] cat", (shown,))
    pipeline = MultimodalPipeline.of(module)
    pipeline.set_progress_bar_config(disable=True)
    calls: list[int] = []
    hook = module.unet.conv_in.register_forward_hook(lambda m, args, out: calls.append(len(out)))

    def draw(pipeline: MultimodalPipeline, prompt: MultimodalPrompt, **more: Any) -> Tensor:
        pipeline.set_progress_bar_config(disable=True)
        out = pipeline(prompt, 3, output_type="pt", generator=torch.Generator().manual_seed(0), **more).images
        assert isinstance(out, Tensor)
        return out

    plain = draw(pipeline, prompt, guidance_scale=1.0)
    assert len(calls) == 1 + 3
    hook.remove()
    guided = draw(pipeline, prompt, guidance_scale=3.0)
    other = replace(prompt, references=(replace(shown, image=as_picture(-image)),))
    assert (draw(pipeline, other, guidance_scale=3.0) - guided).abs().max() > 1e-3 and not torch.equal(plain, guided)
    again = MultimodalPipeline.from_pretrained(export(module, tmp_path / "out"))
    torch.testing.assert_close(draw(again, prompt, guidance_scale=3.0), guided, rtol=0, atol=1e-5)


def as_picture(pixels: Tensor) -> Any:
    from lightning_mmgen.pipeline import to_pil

    return to_pil(pixels[None])[0]


def test_layers_that_do_not_fit_are_refused(unet: UNet2DConditionModel, tmp_path: Path) -> None:
    ReferenceAttention(16, 4).save_pretrained(tmp_path)
    assert ReferenceAttentionConfig(pretrained=str(tmp_path)).build(unet).config["width"] == 16
    with pytest.raises(ValueError, match="'bottleneck'"):
        ReferenceAttentionConfig("lowest", pretrained=str(tmp_path)).build(unet)
    with pytest.raises(ValueError, match="must be bottleneck or lowest, not 'top'"):
        ReferenceAttention(16, 4, "top")


def sharded(rank: int, folder: str, expected: Tensor, gradient: Tensor) -> None:
    """One of two processes with a shard of the UNet each."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.manual_seed(0)
    unet = make_unet()
    condition, z_0 = told(unet), torch.randn(2, 4, 8, 8)
    give_partial_pass(unet)
    for block in (*unet.down_blocks, unet.mid_block, *unet.up_blocks):
        fully_shard(block)
    fully_shard(unet)
    register_fsdp_forward_method(unet, "down_features")
    features = unet.down_features(z_0, condition, (16, 16))  # type: ignore[operator]
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-6)
    features.square().sum().backward()
    weight = unet.conv_in.weight.grad
    assert isinstance(weight, DTensor)
    torch.testing.assert_close(weight.full_tensor(), gradient, rtol=1e-4, atol=1e-5)
    torch.distributed.destroy_process_group()


def test_the_partial_pass_of_a_sharded_unet_is_the_whole_ones(tmp_path: Path) -> None:
    torch.manual_seed(0)
    unet = make_unet()
    condition, z_0 = told(unet), torch.randn(2, 4, 8, 8)
    features = down_features(unet, z_0, condition, (16, 16))
    features.square().sum().backward()
    gradient = unet.conv_in.weight.grad
    assert gradient is not None
    torch.multiprocessing.spawn(sharded, (str(tmp_path), features.detach(), gradient), nprocs=2)  # type: ignore[no-untyped-call]
