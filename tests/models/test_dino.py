from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModel,
    BitImageProcessor,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    DINOv3ViTConfig,
    PreTrainedConfig,
    ResNetConfig,
    ViTConfig,
)

from lightning_mmgen.models.dino import Dino
from lightning_mmgen.pipeline import to_pil

SIZE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.5}
SIZE |= {"image_size": 16, "patch_size": 4}
DINOS = [ViTConfig(**SIZE), Dinov2Config(**SIZE), Dinov2WithRegistersConfig(**SIZE, num_register_tokens=3), DINOv3ViTConfig(**SIZE)]


@pytest.fixture(params=DINOS, ids=lambda config: config.model_type)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A tiny one, saved."""
    AutoModel.from_config(request.param).save_pretrained(tmp_path)
    return tmp_path


def pictures(side: int) -> Tensor:
    """Two that 8 bits a channel hold exactly, [2, 3, side, side]."""
    return torch.randint(256, (2, 3, side, side)) / 127.5 - 1


@torch.no_grad()
def test_its_features_are_the_models_own_of_processed_pictures(folder: Path) -> None:
    dino, model, given = Dino.from_pretrained(str(folder)), AutoModel.from_pretrained(folder).eval(), pictures(16)
    processor = BitImageProcessor(do_resize=False, do_center_crop=False, image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225])
    tokens = model(**processor(to_pil(given), return_tensors="pt")).last_hidden_state
    torch.testing.assert_close(dino.cls(given), tokens[:, 0], rtol=0, atol=1e-4)
    torch.testing.assert_close(dino.patches(given), tokens[:, tokens.shape[1] - 16 :], rtol=0, atol=1e-4)
    assert tokens.std() > 0.1 and dino.cls(given).shape == (2, dino.width)


@torch.no_grad()
def test_patch_tokens_lie_row_by_row(folder: Path) -> None:
    dino, one = Dino.from_pretrained(str(folder)), pictures(16)[:1]
    for block in dino.model.modules():
        if hasattr(block, "o_proj"):
            block.o_proj.weight.zero_()  # without attention a patch token knows its own patch alone
    other = one.clone()
    other[..., 4:8, 8:12] *= -1
    changed = (dino.patches(one) - dino.patches(other)).abs().sum(-1) > 1e-6
    assert changed.nonzero().tolist() == [[0, 1 * 4 + 2]]


@torch.no_grad()
def test_keys_are_the_last_layers_projection_of_its_input(folder: Path) -> None:
    dino, given = Dino.from_pretrained(str(folder)), pictures(16)
    (*_, last) = (module for module in dino.model.modules() if hasattr(module, "k_proj"))
    inputs: list[Tensor] = []
    last.register_forward_pre_hook(lambda _, args, kwargs: inputs.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True)
    keys = dino.keys(given)
    torch.testing.assert_close(keys, torch.nn.functional.linear(inputs[0], last.k_proj.weight, last.k_proj.bias))
    assert not last.k_proj._forward_hooks and keys.shape[1] >= 1 + 16


def test_gradients_reach_pictures_of_another_size_and_no_weight(folder: Path) -> None:
    dino = Dino.from_pretrained(str(folder)).train()
    given = pictures(24).requires_grad_()
    (dino.cls(given).square().sum() + dino.patches(given).square().sum()).backward()
    assert given.grad is not None and (given.grad.abs().amax(1) > 0).all()
    assert not dino.model.training and all(p.grad is None and not p.requires_grad for p in dino.parameters())


@pytest.mark.parametrize(
    "config",
    [ResNetConfig(embedding_size=4, hidden_sizes=[4], depths=[1]), Dinov2Config(**{**SIZE, "image_size": (16, 16)})],
)
def test_another_kind_of_model_is_an_error_of_one_line(config: PreTrainedConfig, tmp_path: Path) -> None:
    AutoModel.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"^.*{config.model_type} is no DINO.*$"):
        Dino.from_pretrained(str(tmp_path))
