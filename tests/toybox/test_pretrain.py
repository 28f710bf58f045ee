from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL

from lightning_mmgen.models.weights import TOYBOX
from lightning_mmgen.toybox.pretrain import Pictures, whiten


def test_whitened_latents_have_unit_covariance_and_decode_to_the_same_pictures() -> None:
    torch.manual_seed(0)
    vae = AutoencoderKL.from_pretrained(TOYBOX / "vae", torch_dtype=torch.float32)
    with torch.no_grad():  # latents of very different sizes, correlated, and off zero
        mix = torch.randn(16, 16) * torch.logspace(-0.5, 0.5, 16)[:, None]
        vae.quant_conv.weight[:16, :, 0, 0] = mix @ vae.quant_conv.weight[:16, :, 0, 0]
        vae.quant_conv.bias[:16] = mix @ vae.quant_conv.bias[:16] + 3
        vae.post_quant_conv.weight[:, :, 0, 0] = vae.post_quant_conv.weight[:, :, 0, 0] @ mix.inverse()
        data = Pictures(64)
        pixels = torch.stack([data[i] for i in range(64)])
        before = vae.decode(vae.encode(pixels[:4]).latent_dist.mean).sample
        whiten(vae, pixels, floor=0.0)
        posterior = vae.encode(pixels).latent_dist
        after = vae.decode(posterior.mean[:4]).sample
    z = posterior.mean.movedim(1, -1).flatten(0, -2)
    torch.testing.assert_close(torch.cov(z.T), torch.eye(16), atol=0.02, rtol=0)
    assert z.mean(0).abs().max() < 0.01 and vae.config.scaling_factor == 1.0
    torch.testing.assert_close(after, before, atol=1e-3, rtol=0)


def test_a_direction_that_hardly_varies_is_scaled_to_the_floor_only() -> None:
    vae = AutoencoderKL.from_pretrained(TOYBOX / "vae", torch_dtype=torch.float32)
    with torch.no_grad():
        vae.quant_conv.weight[3] *= 1e-4
        data = Pictures(16)
        pixels = torch.stack([data[i] for i in range(16)])
        whiten(vae, pixels, floor=0.1)
        z = vae.encode(pixels).latent_dist.mean.movedim(1, -1).flatten(0, -2)
    spread = torch.linalg.eigvalsh(torch.cov(z.T)).clamp(min=0).sqrt()
    assert spread[0] < 0.01 and spread[-1] == pytest.approx(1.0, abs=0.02)
