"""Large parts are built by each process for itself: what it holds of them, and no more."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

from . import engines
from .conftest import make_unet, make_vae
from .engines import Run, fit

SHARING = ("fsdp", "deepspeed_zero3")

DISAGREEING = Run("odd", "fsdp", ("--model.init_args.schedule.warmup=${oc.env:LOCAL_RANK}",), status=1)


@pytest.fixture(scope="module")
def folder(vlm: Path, clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process built, and two under FSDP2 and ZeRO-3, of a UNet of 83 M parameters, 332 MB; and two that were
    given different configurations."""
    folder = tmp_path_factory.mktemp("building")
    (folder / "vlm").symlink_to(vlm)
    make_vae().save_pretrained(folder / "vae")
    wide = {"block_out_channels": (160, 640), "attention_head_dim": (5, 10), "norm_num_groups": 32}
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config({**make_unet().config, **wide})
    unet = unet.to_empty(device="cpu")
    for parameter in unet.parameters():
        parameter.data.uniform_(-0.02, 0.02)
    unet.save_pretrained(folder / "unet")
    (folder / "engines.yaml").write_text(engines.bare(engines.YAML.format(parts=folder, clip=clip)))
    fit(folder, *(building(folder, name, engine) for name, engine in (("one", None), *((e, e) for e in SHARING))), DISAGREEING)
    return folder


def building(folder: Path, name: str, engine: str | None) -> Run:
    recorder = {"class_path": "tests.recorder.BuiltRecorder", "init_args": {"out": str(folder / f"{name}.built")}}
    no_steps = ("--trainer.max_steps=0", "--model.init_args.schedule.decay=constant")
    return Run(name, engine, (*no_steps, f"--trainer.callbacks+={json.dumps(recorder)}"))


@pytest.mark.parametrize("engine", SHARING)
def test_each_of_two_processes_takes_little_more_than_half_the_memory_of_one(folder: Path, engine: str) -> None:
    files = ("one.built.0", f"{engine}.built.0", f"{engine}.built.1")
    one, *two = (json.loads((folder / f"{name}.json").read_text())["built"] for name in files)
    assert one > 332e6
    assert max(two) <= 0.65 * one


@pytest.mark.parametrize("engine", SHARING)
def test_two_processes_build_the_weights_and_buffers_of_one(folder: Path, engine: str) -> None:
    one, two = (json.loads((folder / f"{name}.built.json").read_text()) for name in ("one", engine))
    assert one == two
    assert {"unet.conv_in.weight", "adapter.project_out.weight", "encoder.language.rotary_emb.inv_freq"} <= one.keys()
    assert any("lora_A" in name for name in one)


def test_ranks_that_were_given_different_configurations_stop_before_they_build(folder: Path) -> None:
    for rank in (0, 1):
        log = (folder / f"odd.{rank}.log").read_text()
        assert "error: rank 1 has another configuration than rank 0: model.init_args.schedule.warmup is 1, not 0" in log
        assert "Traceback" not in log
