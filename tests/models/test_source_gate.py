"""The gate on an edit's source, against the estimates of z_0 that its formula promises."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from lightning_mmgen.batch import Condition
from lightning_mmgen.diffusion import Diffusion
from lightning_mmgen.models.adapter import AdapterConfig
from lightning_mmgen.models.codec import CodecConfig
from lightning_mmgen.models.idefics2 import Idefics2Encoder
from lightning_mmgen.models.parameters import Row
from lightning_mmgen.models.source_gate import SourceGate
from lightning_mmgen.models.unet import UNetConfig, denoise, grow_input, pooled_features
from lightning_mmgen.module import MultimodalDiffusion

TIMESTEPS = torch.tensor([40, 500, 990])


def told(unet: UNet2DConditionModel, source: Tensor | None) -> Condition:
    torch.manual_seed(2)
    pooled = pooled_features(unet)
    tokens, mask = torch.randn(3, 5, 16), torch.ones(3, 5, dtype=torch.bool)
    return Condition(tokens, mask, [[]] * 3, torch.randn(3, pooled) if pooled else None, source=source)


def gated(unet: UNet2DConditionModel, kind: Literal["epsilon", "v_prediction"]) -> tuple[SourceGate, Diffusion, Tensor, Tensor]:
    """A new gate, its process, z_t and a source."""
    torch.manual_seed(1)
    grow_input(unet)
    torch.nn.init.normal_(unet.conv_in.weight, std=0.1)
    diffusion = Diffusion(kind)
    return SourceGate.of(unet, diffusion), diffusion, torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)


@pytest.mark.parametrize("shape", ["unet", "sd15_unet"])
def test_a_new_gate_copies_learns_and_leaves_what_has_no_source(shape: str, request: pytest.FixtureRequest) -> None:
    unet: UNet2DConditionModel = request.getfixturevalue(shape)
    gate, _, z_t, source = gated(unet, "v_prediction")
    source[1] = 0
    condition = told(unet, source)
    with_gate, without = (denoise(unet, z_t, TIMESTEPS, condition, (16, 16), None, g) for g in (gate, None))
    assert torch.equal(with_gate[1], without[1]) and not torch.isclose(with_gate[::2], without[::2]).any()
    bare = condition._replace(source=None)
    assert torch.equal(denoise(unet, z_t, TIMESTEPS, bare, (16, 16), None, gate), denoise(unet, z_t, TIMESTEPS, bare, (16, 16)))
    (unused,) = torch.autograd.grad(denoise(unet, z_t, TIMESTEPS, bare, (16, 16), None, gate).sum(), gate.conv.weight)
    assert not unused.any()  # but there: a process whose batch has no source still takes part
    with_gate.square().sum().backward()
    assert gate.conv.weight.grad is not None and gate.conv.weight.grad.abs().max() > 0
    assert not unet.conv_out._forward_hooks


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("logit", [-30.0, 0.0, 30.0])
def test_the_gate_moves_the_estimate_towards_the_source(
    kind: Literal["epsilon", "v_prediction"], logit: float, unet: UNet2DConditionModel
) -> None:
    gate, diffusion, z_t, source = gated(unet, kind)
    condition = told(unet, source)
    torch.nn.init.constant_(gate.conv.bias, logit)  # type: ignore[arg-type]
    with torch.no_grad():
        plain, found = (
            diffusion.estimate_z0(denoise(unet, z_t, TIMESTEPS, condition, (16, 16), None, g), z_t, TIMESTEPS) for g in (None, gate)
        )
    for row, t in enumerate(TIMESTEPS.tolist()):
        abar = float(diffusion.alphas_cumprod[t])
        share = {-30.0: 0.0, 0.0: 0.5, 30.0: 1.0}[logit] * min((1 - abar) ** 0.5 / 0.3, 1)
        expected = plain[row] + share * (source[row] - plain[row])
        torch.testing.assert_close(found[row], expected, rtol=1e-3, atol=1e-4 / abar**0.5)
    assert float(1 - diffusion.alphas_cumprod[TIMESTEPS[0]]) ** 0.5 < 0.3  # where the gate fades out


def test_a_saved_gate_is_the_same(unet: UNet2DConditionModel, tmp_path: Path) -> None:
    gate, _, z_t, source = gated(unet, "v_prediction")
    torch.nn.init.normal_(gate.conv.weight)
    gate.save_pretrained(tmp_path)
    again, condition = SourceGate.from_pretrained(tmp_path), told(unet, source)
    assert again.diffusion == gate.diffusion
    with torch.no_grad():
        own, other = (denoise(unet, z_t, TIMESTEPS, condition, (16, 16), None, x) for x in (gate, again))
    assert torch.equal(own, other)


def test_a_gate_needs_a_unet_that_sees_the_source(parts: Path) -> None:
    module = MultimodalDiffusion(
        Idefics2Encoder(str(parts / "vlm"), image_tokens=16),
        AdapterConfig(layers=2, heads=2, width=8),
        UNetConfig(str(parts / "unet"), None),
        CodecConfig(str(parts / "vae"), None),
        (Row("encoder", "frozen"), Row("adapter", "full", lr=1e-3), Row("unet", "frozen"), Row("source_gate", "full", lr=1e-3)),
        source_gate=True,
    )
    with pytest.raises(ValueError, match="unet.source_latents: true"):
        module.configure_model()
