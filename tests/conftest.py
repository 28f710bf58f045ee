"""Tiny parts, made from configurations with random weights: what a test builds a model of."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: one core a worker, and a process that a test starts

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPConfig, CLIPModel, Idefics2Config, Idefics2ForConditionalGeneration, PreTrainedTokenizerFast

from lightning_mmgen.models.adapter import Adapter
from lightning_mmgen.models.idefics2 import Idefics2Encoder
from lightning_mmgen.models.weights import locate

from .models.conftest import llava, mllama, qwen  # noqa: F401 (fixtures)

SEVERAL_PROCESSES = ("test_strategies", "test_ranks", "test_building")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Those that share runs of several processes come first: one worker then has all of them, and makes the runs once."""
    items.sort(key=lambda item: item.path.stem not in SEVERAL_PROCESSES)


@pytest.fixture(autouse=True)
def seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test starts from the same random state; YAMLs may name classes of the tests."""
    torch.manual_seed(0)
    monkeypatch.setenv("MMGEN_ALLOW", "tests")


@pytest.fixture(scope="session")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an Idefics2: patches of 4 px, pictures of 16 px, hidden states of width 24."""
    folder = tmp_path_factory.mktemp("vlm")
    wide = {"initializer_range": 0.2}  # so that every input shows in the output
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, **wide}
    vision |= {"image_size": 16, "patch_size": 4}
    text = {"model_type": "mistral", "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, **wide}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6}
    text |= {"vocab_size": 512, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    perceiver = {"hidden_size": 24, "resampler_n_latents": 4, "resampler_depth": 1, **wide}
    perceiver |= {"resampler_n_heads": 2, "resampler_head_dim": 8, "num_key_value_heads": 1}
    config = Idefics2Config(vision_config=vision, text_config=text, perceiver_config=perceiver, image_token_id=4)
    torch.manual_seed(0)
    Idefics2ForConditionalGeneration(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(locate("toybox/vlm")) / name, folder)
    return folder


@pytest.fixture
def encoder(vlm: Path) -> Idefics2Encoder:
    """The VLM with a budget of 16 tokens a picture."""
    encoder = Idefics2Encoder(str(vlm), image_tokens=16)
    encoder.build()
    return encoder


@pytest.fixture
def adapter() -> Adapter:
    """From the tiny VLM to the SDXL-shaped UNet."""
    return Adapter(in_features=24, out_features=16, pooled_features=12, layers=2, heads=2, width=8, pooled="mean")


UNET = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 16,
    "attention_head_dim": (2, 4),
}


def make_unet() -> UNet2DConditionModel:
    """SDXL-shaped: attention from the second level on, a pooled vector of width 12."""
    return UNet2DConditionModel(
        **UNET,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 12,
    )


@pytest.fixture
def unet() -> UNet2DConditionModel:
    """SDXL-shaped."""
    return make_unet()


@pytest.fixture
def sd15_unet() -> UNet2DConditionModel:
    """SD1.5-shaped: attention from the first level on, no pooled vector."""
    down, up = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
    return UNet2DConditionModel(**UNET, down_block_types=down, up_block_types=up)


@pytest.fixture
def vae() -> AutoencoderKL:
    """Two pixels a latent."""
    return make_vae()


def make_vae() -> AutoencoderKL:
    """Two pixels a latent, four channels, with a scale and a shift."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        scaling_factor=0.5,
        shift_factor=0.3,
    )


@pytest.fixture(scope="session")
def parts(vlm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the tiny ``vlm``, ``unet`` (pictures of 16 px) and ``vae``."""
    folder = tmp_path_factory.mktemp("parts")
    (folder / "vlm").symlink_to(vlm)
    torch.manual_seed(0)
    make_unet().save_pretrained(folder / "unet")
    make_vae().save_pretrained(folder / "vae")
    return folder


CLIP_WORDS = ["<pad>", "<unk>", "<s>", "</s>", "a", "red", "blue", "green", "cat", "box", "star", "on"]


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a CLIP for pictures of 16 px and texts of 12 tokens."""
    folder = tmp_path_factory.mktemp("clip")
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(CLIP_WORDS)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 3)])
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=raw, **names).save_pretrained(folder)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.5}
    text = {**size, "vocab_size": len(CLIP_WORDS), "max_position_embeddings": 12, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    vision = {**size, "image_size": 16, "patch_size": 4}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    return folder


LORA: dict[str, Any] = {"train": "lora", "rank": 2, "lr": 1e-2, "dropout": 0.2}
DROPOUT_ROWS: list[dict[str, Any]] = [
    {"match": "encoder.vision", "train": "frozen"},
    {"match": "encoder.projector", **LORA},
    {"match": "encoder.language", **LORA},
    {"match": "adapter", "train": "full", "lr": 1e-2},
    {"match": "unet", **LORA},
]
"""A parameter table with dropout in its LoRA: training draws from the process's generator."""


@pytest.fixture(scope="session")
def experiment(parts: Path) -> Path:
    """A YAML that trains the tiny parts on toybox records for two steps; it writes to ``runs/`` of the working directory."""
    path = parts / "experiment.yaml"
    path.write_text(f"""
seed_everything: 7
model:
  class_path: MultimodalDiffusion
  init_args:
    encoder: {{class_path: Idefics2Encoder, init_args: {{pretrained: {parts}/vlm, image_tokens: 16}}}}
    adapter: {{layers: 1, heads: 2, width: 8}}
    unet: {{pretrained: {parts}/unet, subfolder: null}}
    codec: {{pretrained: {parts}/vae, subfolder: null}}
    sampler: {{steps: 2, guidance_scale: 2.0}}
    parameters:
      - {{match: encoder.vision, train: frozen}}
      - {{match: encoder.projector, train: lora, rank: 2, lr: 1.0e-2}}
      - {{match: encoder.language, train: lora, rank: 2, lr: 2.0e-2}}
      - {{match: adapter, train: full, lr: 3.0e-2}}
      - {{match: unet, train: lora, rank: 2, lr: 4.0e-2}}
data:
  class_path: MultimodalDataModule
  init_args:
    train: {{class_path: ToyboxSource, init_args: {{tasks: {{subject: 0.5, caption: 0.5}}, length: 8}}}}
    held_out: {{class_path: ToyboxSource, init_args: {{tasks: {{subject: 1.0}}, length: 4, held_out: true}}}}
    target_size: 16
    batch_size: 2
trainer:
  max_steps: 2
  accelerator: cpu
  limit_val_batches: 0
  num_sanity_val_steps: 0
  log_every_n_steps: 1
  enable_progress_bar: false
  enable_model_summary: false
  logger: {{class_path: TensorBoardLogger, init_args: {{save_dir: runs, name: tiny}}}}
  callbacks:
    - {{class_path: ModelCheckpoint, init_args: {{every_n_train_steps: 1, save_last: true, enable_version_counter: false}}}}
""")
    return path


def logged(out: Path) -> dict[str, list[float]]:
    """The losses of the first run in a folder, step by step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "tiny" / "version_0"))
    events.Reload()
    return {tag: [e.value for e in events.Scalars(tag)] for tag in events.Tags()["scalars"] if tag.startswith("loss")}
