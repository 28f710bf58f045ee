from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, UNet2DConditionModel
from PIL import Image
from torch import Tensor

from lightning_mmgen.batch import Condition, Span, pack
from lightning_mmgen.data.images import pixels
from lightning_mmgen.diffusion import Diffusion
from lightning_mmgen.models.adapter import Adapter, AdapterConfig
from lightning_mmgen.models.codec import CodecConfig
from lightning_mmgen.models.idefics2 import Idefics2Encoder
from lightning_mmgen.models.parameters import Row
from lightning_mmgen.models.unet import UNetConfig, denoise, grow_input
from lightning_mmgen.module import MultimodalDiffusion
from lightning_mmgen.pipeline import MultimodalPipeline, Sampler, SchedulerName, initial_noise, join, to_pil
from lightning_mmgen.prompt import MultimodalPrompt, Reference

DIFFUSION = Diffusion("v_prediction", zero_terminal_snr=True)


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (10, 14, 3), dtype=np.uint8))


PROMPTS = [
    MultimodalPrompt("a dog"),
    MultimodalPrompt("put [ref#2] a cat on [ref#1]", (Reference(1, picture(1)), Reference(2, picture(2)))),
    MultimodalPrompt("[ref#4] again and again [ref#4]", (Reference(4, picture(3)),)),
]


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(n) for n in numbers]


@pytest.fixture
def pipeline(encoder: Idefics2Encoder, adapter: Adapter, unet: UNet2DConditionModel, vae: AutoencoderKL) -> MultimodalPipeline:
    pipeline = MultimodalPipeline(encoder, adapter.eval(), unet.eval(), vae, DDIMScheduler(**DIFFUSION.scheduler_config()))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def drawn_latents(pipeline: MultimodalPipeline, prompts: Any, **settings: Any) -> Tensor:
    """The latents that the pipeline hands to the VAE."""
    seen: list[Tensor] = []
    hook = pipeline.codec.vae.post_quant_conv.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    pipeline(prompts, output_type="pt", **settings)
    hook.remove()
    return (seen[0] - pipeline.codec.shift) * pipeline.codec.scale


@torch.no_grad()
def plain(
    pipeline: MultimodalPipeline, prompt: MultimodalPrompt, seed: int, scales: list[float], side: tuple[int, int], ddpm: bool = False
) -> Tensor:
    """One prompt in 5 steps, by the formulas: v-prediction, trailing steps; eta 0 (Song et al. 2021, equation 12), or a draw from the
    posterior in each step (Ho et al. 2020, equation 7).

    ``scales`` are the steps' guidance; the empty condition has a pass of its own.
    """

    def velocity(z: Tensor, t: int, p: MultimodalPrompt) -> Tensor:
        images = [pixels(r.image, pipeline.encoder.reference_size) for r in p.references]
        c = pipeline.adapter(pipeline.encoder([p.instruction], [[r.marker for r in p.references]], pack([images])))
        added = {"text_embeds": c.pooled, "time_ids": torch.tensor([[*side, 0, 0, *side]], dtype=torch.float32)}
        return pipeline.unet(z, torch.tensor(t), c.tokens, added_cond_kwargs=added).sample

    abar = DIFFUSION.alphas_cumprod.double()
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(1, 4, side[0] // 2, side[1] // 2, generator=generator)
    for t, then, scale in zip((999, 799, 599, 399, 199), (799, 599, 399, 199, -1), scales, strict=True):
        v = velocity(z, t, prompt)
        if scale != 1:
            e = velocity(z, t, MultimodalPrompt(""))
            v = e + scale * (v - e)
        now, next_ = abar[t].item(), abar[then].item() if then >= 0 else 1.0
        z0 = now**0.5 * z - (1 - now) ** 0.5 * v
        if ddpm:
            alpha = now / next_
            mean = (next_**0.5 * (1 - alpha) * z0 + alpha**0.5 * (1 - next_) * z) / (1 - now)
            z = mean + ((1 - next_) / (1 - now) * (1 - alpha)) ** 0.5 * torch.randn(z.shape, generator=generator)
        else:
            noise = now**0.5 * v + (1 - now) ** 0.5 * z
            z = next_**0.5 * z0 + (1 - next_) ** 0.5 * noise
    return z


def words_gone(prompt: MultimodalPrompt) -> MultimodalPrompt:
    return replace(prompt, instruction="".join(f"[ref#{r.marker}]" for r in prompt.references))


@pytest.mark.parametrize("source_latents", [False, True])
def test_pictures_and_text_have_scales_of_their_own(pipeline: MultimodalPipeline, source_latents: bool) -> None:
    """InstructPix2Pix, equation 3, with a UNet call of its own for each of its three predictions."""
    prompts = [replace(PROMPTS[1], references=(replace(PROMPTS[1].references[0], role="source"), PROMPTS[1].references[1])), PROMPTS[2]]
    if source_latents:
        grow_input(pipeline.unet)
        with torch.no_grad():
            pipeline.unet.conv_in.weight.normal_(std=0.2)
    pipeline.sampler = Sampler(4, 4.0, image_guidance_scale=1.7)
    latents = drawn_latents(pipeline, prompts, height=8, width=12, generator=seeds(1, 2))
    whole = torch.nn.functional.interpolate(pixels(prompts[0].references[0].image)[None], (8, 12), mode="bicubic", antialias=True)
    sources = [pipeline.codec.encode(whole.clamp(-1, 1)), torch.zeros(1, 4, 4, 6)]

    def velocity(z: Tensor, t: int, p: MultimodalPrompt, source: Tensor) -> Tensor:
        images = [pixels(r.image, pipeline.encoder.reference_size) for r in p.references]
        c = pipeline.adapter(pipeline.encoder([p.instruction], [[r.marker for r in p.references]], pack([images])))
        added = {"text_embeds": c.pooled, "time_ids": torch.tensor([[8, 12, 0, 0, 8, 12]], dtype=torch.float32)}
        z = torch.cat([z, source], 1) if source_latents else z
        return pipeline.unet(z, torch.tensor(t), c.tokens, added_cond_kwargs=added).sample

    abar = DIFFUSION.alphas_cumprod.double()
    for i, (prompt, source) in enumerate(zip(prompts, sources, strict=True)):
        z = torch.randn(1, 4, 4, 6, generator=torch.Generator().manual_seed(i + 1))
        with torch.no_grad():
            for t, then in ((999, 749), (749, 499), (499, 249), (249, -1)):
                empty = velocity(z, t, MultimodalPrompt(""), torch.zeros_like(source))
                shown, full = velocity(z, t, words_gone(prompt), source), velocity(z, t, prompt, source)
                v = empty + 1.7 * (shown - empty) + 4.0 * (full - shown)
                now, next_ = abar[t].item(), abar[then].item() if then >= 0 else 1.0
                z0, noise = now**0.5 * z - (1 - now) ** 0.5 * v, now**0.5 * v + (1 - now) ** 0.5 * z
                z = next_**0.5 * z0 + (1 - next_) ** 0.5 * noise
        torch.testing.assert_close(latents[i : i + 1], z, rtol=0, atol=2e-4)


def test_an_edit_shows_the_detail_of_its_source(pipeline: MultimodalPipeline) -> None:
    """With a tolerance so wide that every latent is kept: what is drawn, and what the VAE loses of the source."""
    grow_input(pipeline.unet)
    prompts = [MultimodalPrompt("[ref#1] make it night", (Reference(1, picture(1), role="source"),)), PROMPTS[0]]
    whole = torch.nn.functional.interpolate(pixels(prompts[0].references[0].image)[None], (8, 12), mode="bicubic", antialias=True)
    whole = whole.clamp(-1, 1)

    def drawn(detail: float | None) -> Tensor:
        pipeline.sampler = Sampler(2, source_detail=detail)
        pictures = pipeline(prompts, height=8, width=12, generator=seeds(1, 2), output_type="pt").images
        assert isinstance(pictures, Tensor)
        return pictures

    pipeline.sampler = Sampler(2)
    latents = drawn_latents(pipeline, prompts, height=8, width=12, generator=seeds(1, 2))
    plain, detailed = drawn(None), drawn(1e9)
    torch.testing.assert_close(plain, pipeline.codec.decode(latents), rtol=0, atol=1e-5)
    with torch.no_grad():
        lost = whole - pipeline.codec.reconstruct(pipeline.codec.encode(whole))
        expected = (pipeline.codec.reconstruct(latents[:1]) + lost).clamp(-1, 1)
    torch.testing.assert_close(detailed[:1], expected, rtol=0, atol=1e-4)
    assert torch.equal(detailed[1], plain[1]), "a prompt without a source is drawn as it was"
    with pytest.raises(ValueError, match="source_detail must be positive, not 0"):
        Sampler(source_detail=0)


@pytest.mark.parametrize("guidance", [6.0, 1.0, 0.0])
def test_latents_equal_a_plain_ddim(pipeline: MultimodalPipeline, guidance: float) -> None:
    latents = drawn_latents(pipeline, PROMPTS, num_inference_steps=5, guidance_scale=guidance, height=8, width=12, generator=seeds(1, 2, 3))
    for i, prompt in enumerate(PROMPTS):
        expected = plain(pipeline, prompt, i + 1, [guidance] * 5, (8, 12))
        torch.testing.assert_close(latents[i : i + 1], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("sampler", "scales"),
    [
        (Sampler(5, 25.0, "ddpm", "alternating"), [25.0, 1.0, 25.0, 1.0, 25.0]),  # Instruct-Imagen's
        (Sampler(5, 25.0, "ddim", "alternating"), [25.0, 1.0, 25.0, 1.0, 25.0]),
        (Sampler(5, 6.0, "ddpm"), [6.0] * 5),
        (Sampler(5, 1.0, "ddpm", "alternating"), [1.0] * 5),
    ],
    ids=lambda v: f"{v.scheduler}-{v.guidance}-{v.guidance_scale:g}" if isinstance(v, Sampler) else "",
)
def test_latents_equal_the_formulas_of_scheduler_and_guidance_rule(
    pipeline: MultimodalPipeline, sampler: Sampler, scales: list[float]
) -> None:
    pipeline.sampler = sampler
    latents = drawn_latents(pipeline, PROMPTS, height=8, width=12, generator=seeds(1, 2, 3))
    for i, prompt in enumerate(PROMPTS):
        expected = plain(pipeline, prompt, i + 1, scales, (8, 12), sampler.scheduler == "ddpm")
        torch.testing.assert_close(latents[i : i + 1], expected, rtol=1e-4, atol=1e-3)


def test_default_pictures_are_those_of_a_loop_over_ddim_to_the_last_bit(pipeline: MultimodalPipeline) -> None:
    pipeline.sampler = Sampler()
    drawn = pipeline(PROMPTS[:2], generator=seeds(1, 2), output_type="pt").images
    references = pack([[pixels(r.image, pipeline.encoder.reference_size) for r in p.references] for p in PROMPTS[:2]])
    full = pipeline.encode([p.instruction for p in PROMPTS[:2]], [[r.marker for r in p.references] for p in PROMPTS[:2]], references)
    both, scheduler = join(pipeline.encode([""], [[]], []), full), DDIMScheduler(**DIFFUSION.scheduler_config())
    scheduler.set_timesteps(50)
    z = torch.stack([torch.randn(4, 8, 8, generator=g) for g in seeds(1, 2)])
    with torch.no_grad():
        for t in scheduler.timesteps:
            empty, prompted = denoise(pipeline.unet, torch.cat([z, z]), t.expand(4), both, (16, 16)).chunk(2)
            z = scheduler.step(empty + 6.0 * (prompted - empty), t, z).prev_sample
        assert isinstance(drawn, Tensor) and torch.equal(drawn, pipeline.codec.decode(z))


def test_without_guidance_the_unet_sees_no_empty_prompt(pipeline: MultimodalPipeline) -> None:
    sizes: list[int] = []
    pipeline.unet.conv_in.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    for guidance, size in ((1.0, 3), (2.0, 6)):
        sizes.clear()
        pipeline(PROMPTS, num_inference_steps=2, guidance_scale=guidance)
        assert sizes == [size, size]


def test_alternating_guidance_halves_the_rows_of_every_other_step(pipeline: MultimodalPipeline) -> None:
    sizes: list[int] = []
    pipeline.unet.conv_in.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    pipeline.sampler = Sampler(5, 25.0, guidance="alternating")
    pipeline(PROMPTS)
    assert sizes == [6, 3, 6, 3, 6]
    sizes.clear()
    pipeline(PROMPTS, guidance_scale=1.0)
    assert sizes == [3] * 5


@pytest.mark.parametrize("scheduler", ["ddim", "ddpm"])
def test_pictures_do_not_depend_on_the_batch_around_them(pipeline: MultimodalPipeline, scheduler: SchedulerName) -> None:
    pipeline.sampler = Sampler(scheduler=scheduler)
    together = pipeline(PROMPTS, 4, generator=seeds(5, 6, 7), output_type="pt").images
    assert together.shape == (3, 3, 16, 16) and together.abs().max() <= 1
    for i, seed in enumerate((5, 6, 7)):
        alone = pipeline(PROMPTS[i], 4, generator=seeds(seed), output_type="pt").images
        torch.testing.assert_close(alone[0], together[i], rtol=0, atol=1e-4)


def test_prompt_reference_seed_steps_and_guidance_change_the_picture(pipeline: MultimodalPipeline) -> None:
    def draw(prompt: MultimodalPrompt, steps: int = 4, guidance: float = 6.0, seed: int = 1) -> Tensor:
        images = pipeline(prompt, steps, guidance, generator=seeds(seed), output_type="pt").images
        assert isinstance(images, Tensor)
        return images

    first = draw(PROMPTS[2])
    assert torch.equal(draw(PROMPTS[2]), first)
    other = MultimodalPrompt(PROMPTS[2].instruction, (Reference(4, picture(9)),))
    for changed in (draw(other), draw(PROMPTS[0]), draw(PROMPTS[2], steps=5), draw(PROMPTS[2], guidance=3.0), draw(PROMPTS[2], seed=2)):
        assert (changed - first).abs().max() > 1e-3


def test_a_call_that_names_no_steps_takes_those_of_the_sampler(pipeline: MultimodalPipeline) -> None:
    assert (pipeline.sampler.steps, pipeline.sampler.guidance_scale) == (50, 6.0)  # MUMU, section 3
    pipeline.sampler = Sampler(3, 1.0)
    own = pipeline(PROMPTS[0], generator=seeds(1), output_type="pt").images
    assert torch.equal(own, pipeline(PROMPTS[0], 3, 1.0, generator=seeds(1), output_type="pt").images)
    assert not torch.equal(own, pipeline(PROMPTS[0], 3, 0.0, generator=seeds(1), output_type="pt").images)


def test_the_noise_of_ddpms_steps_follows_from_the_seed(pipeline: MultimodalPipeline) -> None:
    def draw(generator: torch.Generator | list[torch.Generator] | None) -> Tensor:
        images = pipeline(PROMPTS[:2], generator=generator, output_type="pt").images
        assert isinstance(images, Tensor)
        return images

    ddim = draw(seeds(1, 2))
    pipeline.sampler = Sampler(4, scheduler="ddpm")
    several, one = draw(seeds(1, 2)), draw(seeds(1)[0])
    assert torch.equal(draw(seeds(1, 2)), several) and torch.equal(draw(seeds(1)[0]), one)
    torch.manual_seed(1)
    assert torch.equal(draw(None), one)
    for other in (ddim, draw(seeds(1, 3)), draw(seeds(2)[0])):
        assert not torch.allclose(other[1], several[1], atol=1e-3)


def test_setting_the_sampler_sets_the_scheduler_of_the_same_process(pipeline: MultimodalPipeline) -> None:
    for name, kind in (("ddpm", DDPMScheduler), ("ddim", DDIMScheduler)):
        pipeline.sampler = Sampler(scheduler=name)  # type: ignore[arg-type]
        assert type(pipeline.scheduler) is kind
        config = DIFFUSION.scheduler_config()
        assert {k: pipeline.scheduler.config[k] for k in config} == config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scheduler": "euler"}, "sampler.scheduler must be ddim or ddpm, not 'euler'"),
        ({"guidance": "sometimes"}, "sampler.guidance must be constant or alternating, not 'sometimes'"),
    ],
)
def test_an_unknown_scheduler_or_rule_raises(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        Sampler(**settings)
    assert str(error.value) == message


def test_euler_steps_draw_what_ddim_draws(pipeline: MultimodalPipeline) -> None:
    """Another scheduler solves the same equation by the same steps; it starts from sigma times the noise where DDIM
    starts from sqrt(sigma^2 + 1) times it: hence the tolerance."""
    config = Diffusion("v_prediction").scheduler_config()
    settings: dict[str, Any] = {"num_inference_steps": 10, "guidance_scale": 2.0}
    pipeline.scheduler = DDIMScheduler(**config)
    expected = drawn_latents(pipeline, PROMPTS, generator=seeds(1, 2, 3), **settings)
    del config["clip_sample"]  # DDIM's own
    pipeline.scheduler = EulerDiscreteScheduler(**config)
    torch.testing.assert_close(drawn_latents(pipeline, PROMPTS, generator=seeds(1, 2, 3), **settings), expected, rtol=0, atol=0.02)


@pytest.mark.parametrize("size", [(10, 16), (16, 18), (1, 16)])
def test_a_size_that_cannot_be_made_raises(pipeline: MultimodalPipeline, size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="multiples of 4"):
        pipeline(PROMPTS[0], 1, height=size[0], width=size[1])


def test_sizes(pipeline: MultimodalPipeline) -> None:
    own = pipeline(PROMPTS[0], 1).images[0]
    assert own.size == (16, 16)  # sample_size 8, 2 pixels a latent
    assert pipeline(PROMPTS[0], 1, height=8, width=12).images[0].size == (12, 8)


def test_initial_noise_comes_from_the_generators() -> None:
    rows = initial_noise((2, 4, 3, 3), seeds(1, 2))
    assert torch.equal(rows[1], torch.randn(4, 3, 3, generator=seeds(2)[0]))
    assert torch.equal(initial_noise((2, 4, 3, 3), seeds(1)[0]), torch.randn(2, 4, 3, 3, generator=seeds(1)[0]))
    assert initial_noise((2, 4, 3, 3), None).shape == (2, 4, 3, 3)
    with pytest.raises(ValueError, match="3 generators for 2 prompts"):
        initial_noise((2, 4, 3, 3), seeds(1, 2, 3))


@pytest.mark.parametrize("pooled", [True, False])
def test_join_puts_the_empty_condition_before_each_full_one(pooled: bool) -> None:
    vectors = (torch.randn(1, 3), torch.randn(2, 3)) if pooled else (None, None)
    empty = Condition(torch.randn(1, 2, 6), torch.tensor([[True, True]]), [[]], vectors[0])
    full = Condition(torch.randn(2, 5, 6), torch.tensor([[True] * 5, [True] * 3 + [False] * 2]), [[Span(1, 2)], []], vectors[1])
    both = join(empty, full)
    assert both.tokens.shape == (4, 5, 6) and both.spans == [[], [], [Span(1, 2)], []]
    for b in range(2):
        assert torch.equal(both.tokens[b, :2], empty.tokens[0]) and both.mask[b].tolist() == [True, True, False, False, False]
    assert torch.equal(both.tokens[2:], full.tokens) and torch.equal(both.mask[2:], full.mask)
    if pooled:
        assert both.pooled is not None and torch.equal(both.pooled, torch.cat([vectors[0], vectors[0], vectors[1]]))  # type: ignore[list-item]
    else:
        assert both.pooled is None


def test_to_pil_clips_and_rounds() -> None:
    array = np.asarray(to_pil(torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0]).view(1, 1, 1, 5).expand(1, 3, 1, 5))[0])
    assert array[0, :, 0].tolist() == [0, 0, 128, 255, 255]
    noise = picture(1)
    assert np.array_equal(np.asarray(to_pil(pixels(noise)[None])[0]), np.asarray(noise))


def test_pipeline_of_a_module_draws_with_its_parts(vlm: Path, unet: UNet2DConditionModel, vae: AutoencoderKL, tmp_path: Path) -> None:
    unet.save_pretrained(tmp_path / "unet")
    vae.save_pretrained(tmp_path / "vae")
    rows = [Row("encoder", "frozen"), Row("adapter", "full", lr=1e-4), Row("unet", "lora", lr=1e-4)]
    diffusion = Diffusion("v_prediction", "linear", 0.001, 0.01, 500)
    encoder = Idefics2Encoder(str(vlm), image_tokens=16)
    module = MultimodalDiffusion(encoder, AdapterConfig(1, 2, 8), UNetConfig(str(tmp_path)), CodecConfig(str(tmp_path)), rows, diffusion)
    module.configure_model()
    pipeline = MultimodalPipeline.of(module)
    assert pipeline.unet is module.unet and pipeline.adapter is module.adapter and pipeline.codec.vae is module.codec.vae
    torch.testing.assert_close(pipeline.scheduler.alphas_cumprod, diffusion.alphas_cumprod)
    assert pipeline.scheduler.config.prediction_type == "v_prediction" and pipeline.scheduler.config.timestep_spacing == "trailing"
    before = pipeline(PROMPTS[0], 2, generator=seeds(1), output_type="pt").images
    with torch.no_grad():
        for name, parameter in module.unet.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    assert not torch.allclose(pipeline(PROMPTS[0], 2, generator=seeds(1), output_type="pt").images, before, atol=1e-4)


def test_pipeline_moves_and_casts_all_its_parts(pipeline: MultimodalPipeline) -> None:
    pipeline.to(torch.float64)
    parts = (pipeline.encoder, pipeline.adapter, pipeline.unet, pipeline.codec)
    assert {p.dtype for part in parts for p in part.parameters()} == {torch.float64}
    assert pipeline(PROMPTS, 2).images[0].size == (16, 16)
    pipeline.to("meta")
    assert pipeline.device.type == "meta" and all(p.is_meta for part in parts for p in part.parameters())
