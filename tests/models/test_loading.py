"""Weights that come after their module: the model that they make is the one that ``from_pretrained`` makes, in every tensor."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForImageTextToText

from lightning_mmgen.models.encoder import Encoder
from lightning_mmgen.models.idefics2 import Idefics2Encoder
from lightning_mmgen.models.llava import LlavaEncoder
from lightning_mmgen.models.loading import Weights, awaited, fill
from lightning_mmgen.models.mllama import MllamaEncoder
from lightning_mmgen.models.qwen2_5_vl import Qwen25VLEncoder
from lightning_mmgen.models.unet import UNetConfig

KINDS: dict[str, type[Encoder]] = {"vlm": Idefics2Encoder, "qwen": Qwen25VLEncoder, "llava": LlavaEncoder, "mllama": MllamaEncoder}


def tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers, those that no checkpoint holds among them."""
    return dict(module.named_parameters()) | dict(module.named_buffers())


def assert_same(a: nn.Module, b: nn.Module) -> None:
    one, two = tensors(a), tensors(b)
    assert one.keys() == two.keys()
    for name in one:
        assert one[name].dtype == two[name].dtype and torch.equal(one[name], two[name]), name


def filled(module: nn.Module) -> nn.Module:
    """The module, read by one process."""
    assert all(p.is_meta for p in module.parameters())
    fill(module, awaited(module), torch.device("cpu"))
    return module


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> tuple[type[Encoder], Path]:
    return KINDS[request.param], request.getfixturevalue(request.param)


def build(kind: type[Encoder], folder: Path, weights: Weights, **settings: Any) -> Encoder:
    encoder = kind(str(folder), 16, **settings)  # type: ignore[call-arg]
    encoder.build(weights)
    return encoder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_encoder_read_later_is_the_encoder(kind: tuple[type[Encoder], Path], dtype: str) -> None:
    before = torch.get_rng_state()
    late = build(*kind, "later", dtype=dtype)
    assert torch.equal(torch.get_rng_state(), before)
    assert_same(filled(late), build(*kind, True, dtype=dtype))
    assert torch.equal(torch.get_rng_state(), before)


def test_names_of_older_checkpoints_are_understood(llava: Path, tmp_path: Path) -> None:
    """Those of the model itself, which ``save_pretrained`` does not write."""
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(llava / file, tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(llava)
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, tmp_path / "model.safetensors", {"format": "pt"})
    written, known = load_file(llava / "model.safetensors").keys(), model.state_dict().keys()
    assert written != known
    assert_same(filled(build(LlavaEncoder, tmp_path, "later")), build(LlavaEncoder, llava, True))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("source_latents", [False, True])
def test_a_unet_in_several_files_is_read_later(unet: UNet2DConditionModel, tmp_path: Path, dtype: str, source_latents: bool) -> None:
    unet.save_pretrained(tmp_path / "unet", max_shard_size="50KB")
    assert len(list((tmp_path / "unet").glob("*.safetensors"))) > 1
    config = UNetConfig(str(tmp_path), dtype=dtype, source_latents=source_latents)
    late = config.build("later")
    assert late.down_blocks[0].resnets[0].conv1.weight.is_meta
    fill(late, awaited(late), torch.device("cpu"))
    assert_same(late, config.build())


def test_what_is_no_safetensors_is_read_whole_with_a_line_of_warning(unet: UNet2DConditionModel, tmp_path: Path) -> None:
    unet.save_pretrained(tmp_path, safe_serialization=False)
    with pytest.warns(UserWarning, match=r"every process reads all of it, for conv_in\.weight is not in diffusion_pytorch_model"):
        late = UNetConfig(str(tmp_path), None).build("later")
    assert_same(late, unet)


def test_a_parameter_of_another_shape_is_left_to_from_pretrained(unet: UNet2DConditionModel, tmp_path: Path) -> None:
    unet.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file({**load_file(file), "conv_out.bias": torch.zeros(5)}, file)
    with pytest.warns(UserWarning, match=r"conv_out\.bias"), pytest.raises(ValueError, match=r"conv_out\.bias"):
        UNetConfig(str(tmp_path), None).build("later")
