"""``mmgen export``: a trained model as a folder that ``diffusers``, PEFT and :class:`MultimodalPipeline` load. No pickles."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.utils.state_dict_utils import convert_state_dict_to_diffusers, convert_unet_state_dict_to_peft
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..models.encoder import Encoder

if TYPE_CHECKING:
    from ..module import MultimodalDiffusion

UNET_LORA = "pytorch_lora_weights.safetensors"


def export(module: MultimodalDiffusion, out: str | Path, dtype: torch.dtype | None = None) -> Path:
    """Write what was trained to ``out``, and how to find the rest.

    - ``pytorch_lora_weights.safetensors``: the UNet's LoRA, for ``load_lora_weights`` of plain ``diffusers``; alpha, rank patterns and
      dropout travel in its metadata.
    - ``encoder_lora/``: the VLM's LoRA in PEFT's format, names as in the ``transformers`` model.
    - ``adapter/``, ``scheduler/``, ``model_index.json``; ``reference_attention/`` where references go through the UNet, and
      ``source_gate/`` where one keeps what stays of an edit's source.
    - ``unet/``, ``encoder.safetensors``: only where weights of them were fully trained.

    Args:
        dtype: of the fully trained weights; as they are if none is given.

    Raises:
        FileExistsError: ``out`` holds files, which would mix with the export.
    """
    root = Path(out)
    root.mkdir(parents=True, exist_ok=True)
    if any(root.iterdir()):
        raise FileExistsError(f"{out}: is not empty")
    _, unet_config, codec_config, _ = module.parts
    full = {n for n, p in module.named_parameters() if p.requires_grad and ".lora_" not in n}
    _merged(module.adapter, dtype or torch.float32).save_pretrained(root / "adapter")
    for name in ("reference_attention", "source_gate"):
        if (layers := getattr(module, name)) is not None:
            _merged(layers, dtype or torch.float32).save_pretrained(root / name)
    module.sampler.scheduler_of(module.diffusion.scheduler_config()).save_pretrained(root / "scheduler")
    if unet_config.from_scratch or any(n.startswith("unet.") for n in full):
        _plain_unet(module.unet, dtype).save_pretrained(root / "unet")
    if trained := {_plain(n.removeprefix("encoder.")): p for n, p in module.named_parameters() if n in full and n.startswith("encoder.")}:
        save_file({n: p.detach().to("cpu", dtype or p.dtype).contiguous() for n, p in trained.items()}, root / "encoder.safetensors")
    for file in root.glob("*/config.json"):  # where the weights once lay is nobody's business
        config_json = {k: v for k, v in json.loads(file.read_text()).items() if k != "_name_or_path"}
        file.write_text(json.dumps(config_json, indent=2, sort_keys=True) + "\n")
    if config := lora_config(module.unet):
        weights = convert_state_dict_to_diffusers(get_peft_model_state_dict(module.unet, adapter_name="default"))
        metadata = {f"unet.{k}": v for k, v in _plain_config(config).items()}
        save_file(
            _contiguous(weights, "unet."), root / UNET_LORA, {"format": "pt", "lora_adapter_metadata": json.dumps(metadata, sort_keys=True)}
        )
    if config := lora_config(module.encoder):
        _save_encoder_lora(module.encoder, config, root / "encoder_lora")
    index = {
        "_class_name": "MultimodalPipeline",
        "_library": "lightning_mmgen",
        "encoder": {
            "module": type(module.encoder).__module__.rsplit(".", 1)[-1],
            "class": type(module.encoder).__name__,
            "init": {k: v for k, v in module.encoder.settings().items() if k != "device"},  # where it lived is nobody's business
        },
        "unet": {"module": "unet", "class": "UNetConfig", "init": {**asdict(unet_config), "from_scratch": False}},
        "codec": {"module": "codec", "class": "CodecConfig", "init": asdict(codec_config)},
        "sampler": asdict(module.sampler),
    }
    (root / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    return root


def load_lora(encoder: Encoder, unet: UNet2DConditionModel, root: Path) -> None:
    """Put an export's LoRA, and the encoder's fully trained weights, onto freshly built parts; float32, as in training, whatever the
    dtype of the parts."""
    if (root / "encoder.safetensors").is_file():
        here = next(encoder.parameters()).device
        weights = {n: w.to(here, torch.float32) for n, w in load_file(root / "encoder.safetensors").items()}
        missing = encoder.load_state_dict(weights, strict=False, assign=True)
        if missing.unexpected_keys:
            raise ValueError(f"{root / 'encoder.safetensors'}: {missing.unexpected_keys[0]} is not in {encoder.pretrained}")
    if (root / UNET_LORA).is_file():
        unet.load_lora_adapter(root, weight_name=UNET_LORA, prefix="unet", use_safetensors=True)
        _set(unet, convert_unet_state_dict_to_peft({n.removeprefix("unet."): w for n, w in load_file(root / UNET_LORA).items()}))
    if (folder := root / "encoder_lora").is_dir():
        names = {outer: inner for inner, outer in encoder.transformers_names.items()}
        config = LoraConfig.from_pretrained(str(folder))
        for key in ("rank_pattern", "alpha_pattern"):
            setattr(config, key, {_rename(n.strip("^$"), names): v for n, v in getattr(config, key).items()})
        config.target_modules = [_rename(n, names) for n in sorted(config.target_modules or [])]
        inject_adapter_in_model(_exact(config), encoder)
        weights = {
            _rename(n.removeprefix("base_model.model."), names): v for n, v in load_file(folder / "adapter_model.safetensors").items()
        }
        _set(encoder, weights)


def _set(part: nn.Module, weights: dict[str, Tensor]) -> None:
    """Give a part's LoRA layers their weights; PEFT itself would round them to the dtype of the layer below."""
    layers = {re.sub(r"(\.lora_[AB])\.\w+", r"\1", n): p for n, p in part.named_parameters() if ".lora_" in n}
    if odd := sorted(set(layers) ^ set(weights)):
        raise ValueError(f"the LoRA is not of this {type(part).__name__}: {len(odd)} tensors differ, first {odd[0]}")
    for name, layer in layers.items():
        layer.data = layer.data.float()
        layer.data.copy_(weights[name])


def lora_config(part: nn.Module) -> LoraConfig | None:
    """The PEFT configuration of a part with LoRA in it, with rank and alpha of every layer spelt out."""
    found = {n: m for n, m in part.named_modules() if hasattr(m, "lora_A") and "default" in m.lora_A}
    if not found:
        return None
    first = next(iter(found.values()))
    dropout = first.lora_dropout["default"]
    return LoraConfig(
        r=first.r["default"],
        lora_alpha=first.lora_alpha["default"],
        lora_dropout=float(getattr(dropout, "p", 0.0)),
        target_modules=list(found),
        rank_pattern={n: m.r["default"] for n, m in found.items() if m.r["default"] != first.r["default"]},
        alpha_pattern={n: m.lora_alpha["default"] for n, m in found.items() if m.lora_alpha["default"] != first.lora_alpha["default"]},
    )


def _exact(config: LoraConfig) -> LoraConfig:
    """Match the modules by their whole names, as the names of some are ends of others'."""
    names = config.target_modules
    assert isinstance(names, (list, set))
    config.target_modules = "|".join(n.replace(".", r"\.") for n in sorted(names))
    return config


def _save_encoder_lora(encoder: Encoder, config: LoraConfig, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    names = encoder.transformers_names
    weights = {f"base_model.model.{_rename(n, names)}": v for n, v in get_peft_model_state_dict(encoder, adapter_name="default").items()}
    save_file(_contiguous(weights, ""), folder / "adapter_model.safetensors", {"format": "pt"})
    for key in ("rank_pattern", "alpha_pattern"):
        setattr(config, key, {_rename(n, names): v for n, v in getattr(config, key).items()})
    config.target_modules = [_rename(n, names) for n in sorted(config.target_modules or [])]
    config.base_model_name_or_path = encoder.pretrained
    (folder / "adapter_config.json").write_text(json.dumps(_plain_config(config), indent=2, sort_keys=True) + "\n")


def _rename(name: str, prefixes: dict[str, str]) -> str:
    for old, new in sorted(prefixes.items(), key=lambda pair: -len(pair[0])):  # a part may lie within another
        if name == old or name.startswith(old + "."):
            return new + name.removeprefix(old)
    return name


def _merged(part: nn.Module, dtype: torch.dtype) -> Any:
    """A copy with LoRA added to the weights."""
    part = copy.deepcopy(part)
    for name, layer in list(part.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
            part.set_submodule(name, layer.get_base_layer())
    for parameter in part.parameters():
        parameter.data = parameter.data.to(dtype)
    return part


def _plain(name: str) -> str:
    return name.replace(".base_layer.", ".")


def _plain_unet(unet: UNet2DConditionModel, dtype: torch.dtype | None) -> UNet2DConditionModel:
    """A copy of the UNet without its LoRA layers."""
    with torch.device("meta"):
        bare = UNet2DConditionModel.from_config(unet.config)
    weights = {_plain(n): v.detach().to(dtype or v.dtype) for n, v in unet.state_dict().items() if ".lora_" not in n}
    bare.load_state_dict(weights, assign=True)
    return bare


def _plain_config(config: LoraConfig) -> dict[str, Any]:
    values = config.to_dict()
    return {
        k: sorted(v) if isinstance(v, set) else v
        for k, v in values.items()
        if isinstance(v, (str, int, float, bool, list, dict, set, type(None)))
    }


def _contiguous(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + n: v.detach().cpu().contiguous() for n, v in weights.items()}
