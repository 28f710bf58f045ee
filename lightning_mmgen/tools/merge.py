"""``mmgen merge``: another checkpoint of the base with the trained UNet LoRA folded in (MUMU: it works in fine-tunes of SDXL)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ..models.unet import UNetConfig
from .export import UNET_LORA

WEIGHTS = "diffusion_pytorch_model*.safetensors*"


def merge(lora: str, into: str, out: str, strength: float = 1.0, config: str | None = None) -> Path:
    """Write ``into`` with a UNet LoRA folded into its UNet: W + strength * alpha / rank * B A, found in float32 and stored in the
    dtype that ``into`` has.

    Args:
        lora: a folder that ``mmgen export`` wrote, or a ``pytorch_lora_weights.safetensors``.
        into: a pipeline's or a UNet's folder in diffusers' layout, or a single ``.safetensors`` file in the original layout.
        out: the folder, or the file, to write; all else of ``into`` comes along.
        strength: 1 is the LoRA as trained.
        config: for a single file, the folder of the UNet's ``config.json``; by default that of the base that the export names.

    Raises:
        FileNotFoundError: no LoRA, or no safetensors weights there.
        FileExistsError: ``out`` exists.
        ValueError: the LoRA is of another UNet, or its sum overflows the dtype.
    """
    source, target = Path(into), Path(out)
    if target.exists():
        raise FileExistsError(f"{out}: exists already")
    if not source.exists():
        raise FileNotFoundError(f"{into}: no such checkpoint")
    return _folder(lora, source, target, strength) if source.is_dir() else _file(lora, source, target, strength, config)


def fold(unet: UNet2DConditionModel, lora: str, strength: float) -> None:
    """Fold the LoRA into a float32 UNet in place, by diffusers' own loader."""
    path = Path(lora) / UNET_LORA if Path(lora).is_dir() else Path(lora)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such LoRA")
    try:
        unet.load_lora_adapter(path.parent, weight_name=path.name, prefix="unet", use_safetensors=True)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{path}: is not a LoRA of this UNet ({' '.join(str(error).split())[:160]})") from error
    with safe_open(path, "pt") as file:
        given = sum(name.startswith("unet.") for name in file.keys())  # noqa: SIM118
    taken = sum(".lora_" in name for name, _ in unet.named_parameters())
    if not given or given != taken:
        raise ValueError(f"{path}: is not a LoRA of this UNet (it holds {given} tensors for a UNet, of which {taken} fit)")
    unet.fuse_lora(lora_scale=strength, safe_fusing=True)
    unet.unload_lora()


def _folder(lora: str, source: Path, target: Path, strength: float) -> Path:
    here = source / "unet" if (source / "unet").is_dir() else source
    files = sorted(p for p in here.glob(WEIGHTS) if p.suffix == ".safetensors")
    if not files:
        raise FileNotFoundError(f"{here}: no {WEIGHTS}")
    variant = None if any(p.name.count(".") == 1 for p in files) else files[0].name.split(".")[1]
    with safe_open(files[0], "pt") as stored:
        dtype = stored.get_tensor(next(iter(stored.keys()))).dtype
    unet = UNet2DConditionModel.from_pretrained(here, torch_dtype=torch.float32, variant=variant, use_safetensors=True)
    fold(unet, lora, strength)
    _finite(unet.state_dict(), dtype)
    unet.register_to_config(_name_or_path=str(source.name))
    shutil.copytree(source, target, ignore=lambda folder, names: [n for n in names if Path(folder) == here and Path(n).match(WEIGHTS)])
    unet.to(dtype).save_pretrained(target / here.relative_to(source), variant=variant)
    return target


def _file(lora: str, source: Path, target: Path, strength: float, config: str | None) -> Path:
    state = load_file(source)
    with safe_open(source, "pt") as stored:
        metadata = stored.metadata()
    settings = _config(lora, config)
    unet = UNet2DConditionModel.from_config(settings)
    try:
        names: dict[str, Any] = convert_ldm_unet_checkpoint({name: name for name in state}, settings)  # ours -> the file's
        unet.load_state_dict({ours: state[theirs].float() for ours, theirs in names.items()})
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"{source}: does not fit the UNet's configuration ({' '.join(str(error).split())[:160]})") from error
    fold(unet, lora, strength)
    folded = unet.state_dict()
    for ours, theirs in names.items():
        _finite({theirs: folded[ours]}, state[theirs].dtype)
        state[theirs] = folded[ours].to(state[theirs].dtype)
    target.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, target, metadata)
    return target


def _config(lora: str, folder: str | None) -> dict[str, Any]:
    """The UNet's configuration for a single file, which has none."""
    if folder is not None:
        return UNetConfig(folder, None).read()
    index = Path(lora) / "model_index.json"
    if not index.is_file():
        raise ValueError("a single file has no configuration of its UNet: give --config, or an export's folder as --lora")
    return UNetConfig(**json.loads(index.read_text())["unet"]["init"]).read()


def _finite(state: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    for name, value in state.items():
        if not torch.isfinite(value.to(dtype)).all():
            raise ValueError(f"{name} overflows {dtype} with this LoRA; lower --strength")
