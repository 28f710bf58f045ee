"""``mmgen merge``: a checkpoint with the LoRA folded in equals the checkpoint with the LoRA beside it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_mmgen.module import MultimodalDiffusion
from lightning_mmgen.tools.export import UNET_LORA, export
from lightning_mmgen.tools.main import main
from lightning_mmgen.tools.merge import merge

from ..conftest import make_unet
from .test_export import ADAPTER, LANGUAGE, MIDDLE, PROJECTOR, UNET, VISION, trained


@pytest.fixture
def module(parts: Path) -> MultimodalDiffusion:
    """LoRA of two strengths and alphas in the UNet."""
    return trained(parts, [VISION, PROJECTOR, LANGUAGE, ADAPTER, UNET, MIDDLE])


@pytest.fixture
def fine_tune() -> UNet2DConditionModel:
    """Another UNet of the same shape."""
    torch.manual_seed(5)
    return make_unet().eval()


def predicted(unet: UNet2DConditionModel) -> Tensor:
    g = torch.Generator().manual_seed(0)
    z, tokens, pooled = (torch.randn(shape, generator=g) for shape in ((2, 4, 8, 8), (2, 5, 16), (2, 12)))
    added = {"text_embeds": pooled, "time_ids": torch.tensor([[16.0, 16, 0, 0, 16, 16]] * 2)}
    with torch.no_grad():
        return unet.float()(z, torch.tensor([10, 900]), tokens, added_cond_kwargs=added).sample


def with_lora(unet: UNet2DConditionModel, folder: Path, strength: float = 1.0) -> Tensor:
    """What plain diffusers predicts with the LoRA beside the weights."""
    unet.load_lora_adapter(folder, weight_name=UNET_LORA, prefix="unet")
    unet.set_adapters(unet.active_adapters(), strength)
    out = predicted(unet.eval())  # without dropout
    unet.unload_lora()
    return out


def pipeline_folder(unet: UNet2DConditionModel, folder: Path, variant: str | None = None) -> Path:
    unet.save_pretrained(folder / "unet", variant=variant)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionXLPipeline"}))
    (folder / "vae").mkdir()
    (folder / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"kept")
    return folder


@pytest.mark.parametrize("strength", [1.0, 0.4, 0.0])
def test_a_folder_with_the_lora_folded_in_predicts_as_with_it_beside(
    module: MultimodalDiffusion, fine_tune: UNet2DConditionModel, tmp_path: Path, strength: float
) -> None:
    lora, plain = export(module, tmp_path / "lora"), predicted(fine_tune)
    source = pipeline_folder(fine_tune, tmp_path / "source")
    merged = merge(str(lora), str(source), str(tmp_path / "merged"), strength)
    found = predicted(UNet2DConditionModel.from_pretrained(merged / "unet"))
    torch.testing.assert_close(found, with_lora(fine_tune, lora, strength), rtol=0, atol=2e-5)
    assert torch.allclose(found, plain, atol=1e-3) == (strength == 0)
    assert (merged / "vae" / "diffusion_pytorch_model.safetensors").read_bytes() == b"kept"
    assert {p.relative_to(merged) for p in merged.rglob("*")} == {p.relative_to(source) for p in source.rglob("*")}
    assert str(tmp_path) not in (merged / "unet" / "config.json").read_text()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_variant_is_summed_in_float32_and_stays_half(
    module: MultimodalDiffusion, fine_tune: UNet2DConditionModel, tmp_path: Path, dtype: torch.dtype
) -> None:
    lora = export(module, tmp_path / "lora")
    source = pipeline_folder(fine_tune.to(dtype), tmp_path / "source", "fp16")
    merged = merge(str(lora), str(source), str(tmp_path / "merged"))
    state = load_file(merged / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    before = load_file(source / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    assert {v.dtype for v in state.values()} == {dtype}
    a, b = (load_file(lora / UNET_LORA)[f"unet.{LAYER}.lora.{x}.weight"] for x in ("down", "up"))
    expected = before[f"{LAYER}.weight"].float() + 6 / 2 * b @ a  # alpha 6, rank 2
    assert torch.equal(state[f"{LAYER}.weight"], expected.to(dtype))


LAYER = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0"}
RESNET |= {"conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
ENDS = {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2", "time_embedding.linear_1": "time_embed.0"}
ENDS |= {"time_embedding.linear_2": "time_embed.2", "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}
ENDS |= {"mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1", "mid_block.resnets.1": "middle_block.2"}
ENDS |= {"down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op", "up_blocks.0.upsamplers.0.conv": "output_blocks.1.2.conv"}


def original_name(name: str) -> str:
    """A weight's name in the layout of the original Stable Diffusion code; two levels of one layer each."""
    for ours, theirs in ENDS.items():
        if name.startswith(ours + "."):
            name = theirs + name.removeprefix(ours)
    for side, blocks, first in (("down", "input_blocks", 1), ("up", "output_blocks", 0)):
        if found := re.match(rf"{side}_blocks\.(\d)\.(resnets|attentions)\.(\d)\.", name):
            level, kind, layer = int(found[1]), found[2], int(found[3])
            name = f"{blocks}.{first + 2 * level + layer}.{int(kind == 'attentions')}.{name[found.end() :]}"
    if re.match(r"(input_blocks|output_blocks)\.\d\.0\.|middle_block\.[02]\.", name):
        for ours, theirs in RESNET.items():
            name = name.replace(f".{ours}.", f".{theirs}.")
    return f"model.diffusion_model.{name}"


def test_a_single_file_in_the_original_layout_keeps_all_else(
    module: MultimodalDiffusion, fine_tune: UNet2DConditionModel, parts: Path, tmp_path: Path
) -> None:
    lora = export(module, tmp_path / "lora")
    names = {name: original_name(name) for name in fine_tune.state_dict()}
    state = {names[n]: v.contiguous() for n, v in fine_tune.state_dict().items()} | {"first_stage_model.decoder.x": torch.ones(3)}
    save_file(state, tmp_path / "tune.safetensors", {"modelspec.title": "a fine-tune"})
    tune, out = str(tmp_path / "tune.safetensors"), str(tmp_path / "out.safetensors")
    assert main(["merge", "--lora", str(lora), "--into", tune, "--out", out]) == 0
    merged = load_file(out)
    assert set(merged) == set(state) and torch.equal(merged["first_stage_model.decoder.x"], torch.ones(3))
    with safe_open(out, "pt") as file:
        assert file.metadata() == {"modelspec.title": "a fine-tune"}
    expected = with_lora(fine_tune, lora)
    fine_tune.load_state_dict({n: merged[theirs] for n, theirs in names.items()})
    torch.testing.assert_close(predicted(fine_tune), expected, rtol=0, atol=2e-5)
    by_hand = merge(str(lora / UNET_LORA), tune, str(tmp_path / "by_hand"), config=str(parts / "unet"))
    assert all(torch.equal(v, merged[n]) for n, v in load_file(by_hand).items())


def test_what_cannot_be_merged_is_one_line(
    module: MultimodalDiffusion, sd15_unet: UNet2DConditionModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lora = str(export(module, tmp_path / "lora"))
    other = str(pipeline_folder(sd15_unet, tmp_path / "sd15"))
    (tmp_path / "empty").mkdir()
    save_file({"x": torch.ones(1)}, tmp_path / "x.safetensors")

    def fails(*args: str) -> str:
        assert main(["merge", *args]) == 1
        text = capsys.readouterr().err
        assert text.count("\n") == 1
        return text

    out = ("--out", str(tmp_path / "out"))
    assert "is not a LoRA of this UNet" in fails("--lora", lora, "--into", other, *out)
    assert "no such LoRA" in fails("--lora", str(tmp_path / "empty"), "--into", other, *out)
    assert "no diffusion_pytorch_model" in fails("--lora", lora, "--into", str(tmp_path / "empty"), *out)
    assert "no such checkpoint" in fails("--lora", lora, "--into", str(tmp_path / "nowhere"), *out)
    assert "give --config" in fails("--lora", f"{lora}/{UNET_LORA}", "--into", str(tmp_path / "x.safetensors"), *out)
    assert "does not fit" in fails("--lora", lora, "--into", str(tmp_path / "x.safetensors"), *out)
    assert "exists already" in fails("--lora", lora, "--into", other, "--out", str(tmp_path / "empty"))
    assert not (tmp_path / "out").exists()


def test_a_sum_that_overflows_is_refused(module: MultimodalDiffusion, fine_tune: UNet2DConditionModel, tmp_path: Path) -> None:
    lora, source = export(module, tmp_path / "lora"), pipeline_folder(fine_tune.half(), tmp_path / "source")
    with pytest.raises(ValueError, match="overflows torch.float16"):
        merge(str(lora), str(source), str(tmp_path / "merged"), strength=1e6)
