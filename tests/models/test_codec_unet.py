from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from lightning_mmgen.batch import Condition
from lightning_mmgen.models.codec import Codec, CodecConfig
from lightning_mmgen.models.unet import UNetConfig, denoise, grow_input, pooled_features, takes_source

# -- codec ---------------------------------------------------------------------------------------------------------------------


def test_codec_encodes_and_decodes_as_diffusers_with_scale_and_shift(vae: AutoencoderKL) -> None:
    codec, pixels, latents = Codec(vae), torch.rand(2, 3, 8, 12) * 2 - 1, torch.randn(2, 4, 4, 6)
    assert (codec.factor, codec.channels, codec.scale, codec.shift) == (2, 4, 0.5, 0.3)
    with torch.no_grad():
        torch.testing.assert_close(codec.encode(pixels), (vae.encode(pixels).latent_dist.mode() - 0.3) * 0.5)
        torch.testing.assert_close(codec.decode(latents), vae.decode(latents / 0.5 + 0.3).sample.clamp(-1, 1))
    assert codec.decode(latents * 100).abs().max() == 1


def test_codec_without_shift(vae: AutoencoderKL) -> None:
    vae.register_to_config(shift_factor=None)
    pixels = torch.rand(1, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(Codec(vae).encode(pixels), vae.encode(pixels).latent_dist.mode() * 0.5)


def test_codec_samples_the_posterior_with_the_given_noise(vae: AutoencoderKL) -> None:
    codec, pixels, noise = Codec(vae), torch.rand(2, 3, 8, 8), torch.randn(2, 4, 4, 4)
    with torch.no_grad():
        posterior = vae.encode(pixels).latent_dist
    torch.testing.assert_close(codec.encode(pixels, noise), (posterior.mean + posterior.std * noise - 0.3) * 0.5)
    torch.testing.assert_close(codec.encode(pixels, torch.zeros_like(noise)), codec.encode(pixels))
    assert not torch.allclose(codec.encode(pixels, noise), codec.encode(pixels), atol=1e-3)


def test_an_edit_keeps_the_pixels_of_a_source_that_it_leaves(vae: AutoencoderKL) -> None:
    codec, pictures = Codec(vae), torch.rand(2, 3, 8, 12) * 2 - 1
    source = codec.encode(pictures)
    assert (codec.decode(source) - pictures).abs().max() > 0.1, "this VAE holds every detail"
    torch.testing.assert_close(codec.decode_edit(source, pictures, source, 0.1), pictures, rtol=0, atol=1e-5)
    torch.testing.assert_close(codec.decode_edit(source + 9, pictures, source, 0.1), codec.decode(source + 9), rtol=0, atol=1e-5)
    none = torch.zeros_like(source)
    assert torch.equal(codec.decode_edit(source, torch.zeros_like(pictures), none, 0.1), codec.decode(source))
    near = source + torch.full((1, 4, 1, 1), 0.2)  # a mean square of 0.04
    with torch.no_grad():
        plain = [vae.decode(z / 0.5 + 0.3).sample for z in (near, source)]
    kept = torch.exp(torch.tensor(-0.04 / 0.1))
    expected = (plain[0] + kept * (pictures - plain[1])).clamp(-1, 1)
    torch.testing.assert_close(codec.decode_edit(near, pictures, source, 0.1), expected, rtol=0, atol=1e-5)


def test_what_an_edit_keeps_changes_smoothly(vae: AutoencoderKL) -> None:
    codec, pictures = Codec(vae), torch.rand(1, 3, 8, 8) * 2 - 1
    source = codec.encode(pictures)
    half = source.clone()
    half[..., 2:] += 9
    columns = torch.tensor([1, 1, 1, 0.75, 0.25, 0, 0, 0])  # of two latents of each kind, their centres 2 pixels apart
    expected = codec.reconstruct(half) + columns * (pictures - codec.reconstruct(source))
    torch.testing.assert_close(codec.decode_edit(half, pictures, source, 0.1), expected.clamp(-1, 1), rtol=0, atol=1e-5)


def test_codec_stays_frozen_and_in_evaluation_mode(vae: AutoencoderKL) -> None:
    root = torch.nn.ModuleDict({"codec": Codec(vae.train())}).train()
    assert not any(m.training for m in root["codec"].modules())
    assert not any(p.requires_grad for p in root.parameters())
    assert not root["codec"].encode(torch.rand(1, 3, 4, 4, requires_grad=True)).requires_grad


def test_codec_computes_in_float32_under_autocast(vae: AutoencoderKL) -> None:
    codec, pixels = Codec(vae), torch.rand(1, 3, 8, 8)
    exact = codec.decode(codec.encode(pixels))
    with torch.autocast("cpu", torch.bfloat16):
        latents = codec.encode(pixels)
        assert latents.dtype == torch.float32 and torch.equal(codec.decode(latents), exact)


def test_codec_config_loads_or_creates(vae: AutoencoderKL, tmp_path: Path) -> None:
    vae.save_pretrained(tmp_path / "vae")
    pixels = torch.rand(1, 3, 8, 8)
    for config in (CodecConfig(str(tmp_path)), CodecConfig(str(tmp_path / "vae"), None)):
        assert torch.equal(config.build().encode(pixels), Codec(vae).encode(pixels))
        with torch.device("meta"):
            empty = config.build(weights=False)
        assert {n: p.shape for n, p in empty.named_parameters()} == {n: p.shape for n, p in Codec(vae).named_parameters()}


# -- UNet ----------------------------------------------------------------------------------------------------------------------


def condition(width: int) -> Condition:
    """Two samples of 5 and 3 tokens of width 16, with a pooled vector where ``width`` is not 0."""
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    return Condition(torch.randn(2, 5, 16), mask, [[], []], torch.randn(2, width) if width else None)


def test_pooled_features_of_both_shapes(unet: UNet2DConditionModel, sd15_unet: UNet2DConditionModel) -> None:
    assert pooled_features(unet) == 12 and pooled_features(sd15_unet) == 0
    unet.register_to_config(addition_embed_type="image")
    with pytest.raises(ValueError, match="addition_embed_type='image'"):
        pooled_features(unet)


def test_denoise_calls_the_sdxl_unet_as_diffusers_does(unet: UNet2DConditionModel) -> None:
    given, z_t, t = condition(12), torch.randn(2, 4, 8, 8), torch.tensor([999, 3])
    given = given._replace(mask=torch.ones_like(given.mask))
    with torch.no_grad():
        out = denoise(unet, z_t, t, given, (16, 20))
        ids = torch.tensor([[16.0, 20.0, 0.0, 0.0, 16.0, 20.0]] * 2)
        expected = unet(z_t, t, given.tokens, added_cond_kwargs={"text_embeds": given.pooled, "time_ids": ids}).sample
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)
        assert not torch.allclose(denoise(unet, z_t, t, given, (20, 16)), out, atol=1e-4)


def test_denoise_calls_the_sd15_unet_as_diffusers_does(sd15_unet: UNet2DConditionModel) -> None:
    given, z_t, t = condition(0), torch.randn(2, 4, 8, 8), torch.tensor([999, 3])
    given = given._replace(mask=torch.ones_like(given.mask))
    with torch.no_grad():
        torch.testing.assert_close(denoise(sd15_unet, z_t, t, given, (16, 16)), sd15_unet(z_t, t, given.tokens).sample, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", ["unet", "sd15_unet"])
def test_masked_tokens_have_no_effect_and_real_ones_do(shape: str, request: pytest.FixtureRequest) -> None:
    unet: UNet2DConditionModel = request.getfixturevalue(shape)
    given, z_t, t = condition(pooled_features(unet)), torch.randn(2, 4, 8, 8), torch.tensor([999, 3])
    changed, late = given.tokens.clone(), given.tokens.clone()
    changed[1, 3:] = 50.0
    late[1, 2] += torch.randn(16)
    with torch.no_grad():
        out = denoise(unet, z_t, t, given, (16, 16))
        torch.testing.assert_close(denoise(unet, z_t, t, given._replace(tokens=changed), (16, 16)), out, rtol=0, atol=1e-6)
        short = Condition(given.tokens[1:, :3], given.mask[1:, :3], [[]], None if given.pooled is None else given.pooled[1:])
        torch.testing.assert_close(denoise(unet, z_t[1:], t[1:], short, (16, 16)), out[1:], rtol=0, atol=1e-5)
        assert (denoise(unet, z_t, t, given._replace(tokens=late), (16, 16))[1] - out[1]).abs().max() > 1e-4


def test_unet_config_loads_or_creates(unet: UNet2DConditionModel, tmp_path: Path) -> None:
    unet.save_pretrained(tmp_path / "unet")
    for config in (UNetConfig(str(tmp_path)), UNetConfig(str(tmp_path / "unet"), None)):
        assert torch.equal(config.build().conv_in.weight, unet.conv_in.weight)
        assert config.build(weights=False).conv_in.weight.shape == unet.conv_in.weight.shape
    fresh = UNetConfig(str(tmp_path), from_scratch=True).build()
    assert not torch.equal(fresh.conv_in.weight, unet.conv_in.weight) and dict(fresh.config)["sample_size"] == 8


@pytest.mark.parametrize("how", [{}, {"from_scratch": True}, {"weights": False}])
def test_unet_config_sets_the_dtype_however_it_builds(unet: UNet2DConditionModel, tmp_path: Path, how: dict[str, bool]) -> None:
    unet.save_pretrained(tmp_path / "unet")
    config = UNetConfig(str(tmp_path), dtype="bfloat16", from_scratch=how.get("from_scratch", False))
    assert {p.dtype for p in config.build(how.get("weights", True)).parameters()} == {torch.bfloat16}


def test_denoise_casts_to_the_dtype_of_the_unet(unet: UNet2DConditionModel) -> None:
    given, z_t, t = condition(12), torch.randn(2, 4, 8, 8), torch.tensor([999, 3])
    with torch.no_grad():
        exact = denoise(unet, z_t, t, given, (16, 16))
        rough = denoise(unet.to(torch.bfloat16), z_t, t, given, (16, 16))
    assert (rough.float() - exact).abs().max() < 0.1


# -- source latents --------------------------------------------------------------------------------------------------------------


def test_a_unet_that_takes_sources_begins_as_it_was_and_saves_as_diffusers_knows_it(unet: UNet2DConditionModel, tmp_path: Path) -> None:
    unet.save_pretrained(tmp_path)
    grown = UNetConfig(str(tmp_path), None, source_latents=True).build()
    z, condition = (
        torch.randn(2, 4, 8, 8),
        Condition(torch.randn(2, 3, 16), torch.ones(2, 3, dtype=torch.bool), [[], []], torch.randn(2, 12)),
    )
    shown = condition._replace(source=torch.randn(2, 4, 8, 8))
    with torch.no_grad():
        before = denoise(unet.eval(), z, torch.tensor([10, 900]), condition, (16, 16))
        for given in (condition, shown):
            torch.testing.assert_close(denoise(grown.eval(), z, torch.tensor([10, 900]), given, (16, 16)), before, rtol=0, atol=1e-6)
        grown.conv_in.weight[:, 4:].normal_()
        assert not torch.allclose(denoise(grown, z, torch.tensor([10, 900]), shown, (16, 16)), before, atol=1e-3)
        torch.testing.assert_close(denoise(grown, z, torch.tensor([10, 900]), condition, (16, 16)), before, rtol=0, atol=1e-6)
    grown.save_pretrained(tmp_path / "grown")
    again = UNetConfig(str(tmp_path / "grown"), None, source_latents=True).build()  # one that has the channels stays as it is
    assert takes_source(again) and not takes_source(unet) and torch.equal(again.conv_in.weight, grown.conv_in.weight)
    grow_input(again)
    assert again.config.in_channels == 8
