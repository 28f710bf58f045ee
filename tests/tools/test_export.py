"""What ``mmgen export`` writes, loaded by this package and by plain ``diffusers`` and PEFT."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Idefics2ForConditionalGeneration

from lightning_mmgen.diffusion import Diffusion
from lightning_mmgen.models.adapter import Adapter, AdapterConfig
from lightning_mmgen.models.codec import CodecConfig
from lightning_mmgen.models.idefics2 import Idefics2Encoder
from lightning_mmgen.models.parameters import Row
from lightning_mmgen.models.unet import UNetConfig
from lightning_mmgen.module import MultimodalDiffusion
from lightning_mmgen.pipeline import MultimodalPipeline, Sampler
from lightning_mmgen.tools.export import export

from ..test_pipeline import PROMPTS, seeds

VISION, ADAPTER = Row("encoder.vision", "frozen"), Row("adapter", "full", lr=1e-3)
PROJECTOR = Row("encoder.projector", "lora", lr=1e-3, rank=3, alpha=5, dropout=0.1)
LANGUAGE = Row("encoder.language", "lora", lr=1e-3, rank=2, alpha=7, dropout=0.1)
UNET = Row("unet", "lora", lr=1e-3, rank=2, alpha=6, dropout=0.2)
MIDDLE = Row("unet.mid_block", "lora", lr=1e-3, rank=4, alpha=3, dropout=0.2)


def trained(parts: Path, rows: list[Row], dtype: str = "float32", from_scratch: bool = False, by: float = 0.3) -> MultimodalDiffusion:
    """A module of the tiny parts whose trained weights have moved far from where they began."""
    module = MultimodalDiffusion(
        Idefics2Encoder(str(parts / "vlm"), image_tokens=16, dtype=dtype),
        AdapterConfig(layers=2, heads=2, width=8),
        UNetConfig(str(parts / "unet"), None, dtype, from_scratch),
        CodecConfig(str(parts / "vae"), None),
        rows,
        Diffusion("v_prediction", zero_terminal_snr=True),
    )
    torch.manual_seed(1)
    module.configure_model()
    with torch.no_grad():
        for parameter in module.trainable().values():
            parameter.add_(torch.randn_like(parameter), alpha=by)
    return module.eval()


@pytest.fixture
def module(parts: Path) -> MultimodalDiffusion:
    """LoRA of two strengths in the UNet and of two in the VLM, with dropout; the adapter fully trained."""
    return trained(parts, [VISION, PROJECTOR, LANGUAGE, ADAPTER, UNET, MIDDLE])


def drawn(pipeline: MultimodalPipeline) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    pictures = pipeline(PROMPTS, 2, 3.0, generator=seeds(1, 2, 3), output_type="pt").images
    assert isinstance(pictures, Tensor)
    return pictures


def assert_reloads(module: MultimodalDiffusion, folder: Path) -> None:
    """The export draws the module's pictures, to the last bit, and by default with the module's sampler."""
    pipeline = MultimodalPipeline.from_pretrained(export(module, folder))
    assert pipeline.sampler == module.sampler
    assert torch.equal(drawn(pipeline), drawn(MultimodalPipeline.of(module).frozen()))


def test_an_export_draws_the_same_pictures(module: MultimodalDiffusion, parts: Path, tmp_path: Path) -> None:
    assert_reloads(module, tmp_path)
    untrained = MultimodalPipeline.of(trained(parts, module.table.rows, by=0.0))
    assert not torch.allclose(drawn(MultimodalPipeline.of(module)), drawn(untrained), atol=0.1)


def test_an_export_keeps_scheduler_and_guidance_rule(module: MultimodalDiffusion, tmp_path: Path) -> None:
    constant = drawn(MultimodalPipeline.of(module))
    module.sampler = Sampler(2, 3.0, "ddpm", "alternating")
    assert_reloads(module, tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["sampler"] == asdict(module.sampler)
    assert json.loads((tmp_path / "scheduler" / "scheduler_config.json").read_text())["_class_name"] == "DDPMScheduler"
    assert not torch.allclose(drawn(MultimodalPipeline.from_pretrained(tmp_path)), constant, atol=1e-3)


def test_an_index_without_scheduler_and_rule_is_ddim_with_constant_guidance(module: MultimodalDiffusion, tmp_path: Path) -> None:
    index = json.loads((export(module, tmp_path) / "model_index.json").read_text())
    index["sampler"] = {"steps": 3, "guidance_scale": 2.0}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    pipeline = MultimodalPipeline.from_pretrained(tmp_path)
    assert pipeline.sampler == Sampler(3, 2.0, "ddim", "constant") and type(pipeline.scheduler) is DDIMScheduler


def test_an_export_holds_no_pickles(module: MultimodalDiffusion, tmp_path: Path) -> None:
    files = {str(p.relative_to(tmp_path)) for p in export(module, tmp_path).rglob("*") if p.is_file()}
    assert files == {
        "model_index.json",
        "pytorch_lora_weights.safetensors",
        "adapter/config.json",
        "adapter/diffusion_pytorch_model.safetensors",
        "encoder_lora/adapter_config.json",
        "encoder_lora/adapter_model.safetensors",
        "scheduler/scheduler_config.json",
    }


def unet_inputs() -> dict[str, Any]:
    added = {"text_embeds": torch.randn(2, 12), "time_ids": torch.randn(2, 6)}
    return {"sample": torch.randn(2, 4, 8, 8), "timestep": 7, "encoder_hidden_states": torch.randn(2, 5, 16), "added_cond_kwargs": added}


@torch.no_grad()
def test_plain_diffusers_loads_the_unet_lora_at_its_strengths(module: MultimodalDiffusion, parts: Path, tmp_path: Path) -> None:
    weights, alphas, metadata = StableDiffusionXLPipeline.lora_state_dict(str(export(module, tmp_path)), return_lora_metadata=True)
    unet, inputs = UNet2DConditionModel.from_pretrained(parts / "unet"), unet_inputs()
    before = unet(**inputs).sample
    StableDiffusionXLPipeline.load_lora_into_unet(weights, alphas, unet, metadata=metadata)
    after = unet.eval()(**inputs).sample
    assert torch.equal(after, module.unet(**inputs).sample)
    assert not torch.allclose(after, before, atol=0.01)
    config = unet.peft_config["default_0"]
    assert config.lora_dropout == 0.2
    strengths = {(m.r["default_0"], m.scaling["default_0"], "mid_block" in n) for n, m in unet.named_modules() if hasattr(m, "scaling")}
    assert strengths == {(2, 3.0, False), (4, 0.75, True)}


@torch.no_grad()
def test_plain_peft_loads_the_vlm_lora(module: MultimodalDiffusion, parts: Path, tmp_path: Path) -> None:
    folder = export(module, tmp_path) / "encoder_lora"
    plain = Idefics2ForConditionalGeneration.from_pretrained(parts / "vlm")
    ids = torch.tensor([module.encoder.tokenise("a red cat beside a box", [], [])[0]])
    pictures, grid = torch.randn(1, 3, 16, 16), torch.ones(1, 4, 4, dtype=torch.bool)

    def states() -> tuple[Tensor, Tensor]:
        patches = plain.model.vision_model(pixel_values=pictures, patch_attention_mask=grid).last_hidden_state
        return plain.model.text_model(input_ids=ids).last_hidden_state, plain.model.connector.modality_projection(patches)

    before = states()
    loaded = PeftModel.from_pretrained(plain, str(folder)).eval()
    ours = module.encoder(["a red cat beside a box"], [[]], []).tokens, module.encoder.embed_images(pictures)
    for was, now, expected in zip(before, states(), ours, strict=True):
        torch.testing.assert_close(now, expected, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(now, was, atol=0.01)
    config = loaded.peft_config["default"]
    assert config.lora_dropout == 0.1 and config.base_model_name_or_path == str(parts / "vlm")
    assert {(m.r["default"], m.lora_alpha["default"]) for m in loaded.modules() if hasattr(m, "lora_alpha")} == {(3, 5), (2, 7)}


def test_a_fully_trained_unet_with_lora_in_its_middle(parts: Path, tmp_path: Path) -> None:
    module = trained(parts, [Row("encoder", "frozen"), ADAPTER, Row("unet", "full", lr=1e-3), MIDDLE])
    assert_reloads(module, tmp_path)
    names = set(load_file(tmp_path / "unet" / "diffusion_pytorch_model.safetensors"))
    assert names == set(UNet2DConditionModel.from_pretrained(parts / "unet").state_dict())
    assert not (tmp_path / "encoder_lora").exists() and not (tmp_path / "encoder.safetensors").exists()


def test_a_unet_without_lora_is_a_folder_of_plain_diffusers(parts: Path, tmp_path: Path) -> None:
    module = trained(parts, [Row("encoder", "frozen"), ADAPTER, Row("unet", "full", lr=1e-3)])
    assert_reloads(module, tmp_path)
    assert not (tmp_path / "pytorch_lora_weights.safetensors").exists()
    loaded = UNet2DConditionModel.from_pretrained(tmp_path / "unet").state_dict()
    assert all(torch.equal(loaded[n], w) for n, w in module.unet.state_dict().items())


def test_a_unet_from_scratch_is_exported_whole(parts: Path, tmp_path: Path) -> None:
    assert_reloads(trained(parts, [Row("encoder", "frozen"), ADAPTER, UNET], from_scratch=True), tmp_path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_fully_trained_projector(dtype: str, parts: Path, tmp_path: Path) -> None:
    """It and the LoRA stay float32 where the VLM and the UNet are not."""
    module = trained(parts, [VISION, Row("encoder.projector", "full", lr=1e-3), LANGUAGE, ADAPTER, UNET], dtype)
    assert_reloads(module, tmp_path)
    saved = load_file(tmp_path / "encoder.safetensors")
    assert set(saved) == {f"projector.{n}" for n, _ in module.encoder.projector.named_parameters()}
    assert {w.dtype for w in saved.values()} == {torch.float32}


def test_an_adapter_with_lora_is_exported_merged(parts: Path, tmp_path: Path) -> None:
    module = trained(parts, [Row("encoder", "frozen"), Row("adapter", "lora", lr=1e-3, rank=2, alpha=6), UNET])
    pipeline = MultimodalPipeline.from_pretrained(export(module, tmp_path))
    torch.testing.assert_close(drawn(pipeline), drawn(MultimodalPipeline.of(module)), rtol=0, atol=1e-4)
    assert any(".lora_" in n for n in module.adapter.state_dict())  # the module itself stays as it is


def test_dtype_is_of_the_fully_trained_weights(parts: Path, tmp_path: Path) -> None:
    rows = [VISION, Row("encoder.projector", "full", lr=1e-3), LANGUAGE, ADAPTER, Row("unet", "full", lr=1e-3), MIDDLE]
    module = trained(parts, rows)
    export(module, tmp_path, torch.float16)
    for file in ("adapter/diffusion_pytorch_model", "unet/diffusion_pytorch_model", "encoder"):
        assert {w.dtype for w in load_file(tmp_path / f"{file}.safetensors").values()} == {torch.float16}
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    torch.testing.assert_close(drawn(MultimodalPipeline.from_pretrained(tmp_path)), drawn(MultimodalPipeline.of(module)), rtol=0, atol=0.1)


def test_the_adapter_is_a_diffusers_model(module: MultimodalDiffusion, tmp_path: Path) -> None:
    loaded = Adapter.from_pretrained(export(module, tmp_path) / "adapter").state_dict()
    assert all(torch.equal(loaded[n], w) for n, w in module.adapter.state_dict().items())


def test_weights_that_are_not_the_encoders_are_refused(parts: Path, tmp_path: Path) -> None:
    module = trained(parts, [VISION, Row("encoder.projector", "full", lr=1e-3), Row("encoder.language", "frozen"), ADAPTER, UNET])
    save_file({"projector.gone": torch.zeros(1)}, export(module, tmp_path) / "encoder.safetensors")
    with pytest.raises(ValueError, match=r"projector\.gone is not in"):
        MultimodalPipeline.from_pretrained(tmp_path)
