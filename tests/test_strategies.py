"""Two processes from the same YAML: the numbers of one process, and checkpoints that any of them goes on from."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from lightning_mmgen import cli
from lightning_mmgen.strategies import FSDP2, ZeRO
from lightning_mmgen.tools.generate import load_module

from . import engines
from .engines import Run, checkpoint, fit, largest_difference, losses, seen

SIX, FOUR = "--trainer.max_steps=6", "--data.init_args.batch_size=4"


@pytest.fixture(scope="module")
def folder(parts: Path, clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process over two epochs of 5 batches of 4. FSDP2 in two processes over the same, 2 each, is killed in batch 9 and goes on; from
    batch 8 on ZeRO-3 does the same until its second process gets SIGTERM, and one process does the last batch."""
    folder = tmp_path_factory.mktemp("engines")
    (folder / "engines.yaml").write_text(engines.YAML.format(parts=parts, clip=clip))
    start = f"--ckpt_path={folder}/runs/{{}}/version_0/checkpoints/{{}}.ckpt".format
    fit(
        folder,
        Run("one", more=(SIX, FOUR)),
        Run("fsdp", "fsdp", (SIX,), status=-9, kill_at=9),
        Run("fsdp", "fsdp", (SIX, "--ckpt_path=last")),
        Run("zero3", "deepspeed_zero3", (SIX, start("fsdp", "step=4")), status=143, term_at=8),
        Run("back", more=(SIX, FOUR, start("zero3", "last"))),
    )
    return folder


def test_two_processes_have_the_losses_of_one(folder: Path) -> None:
    alone, both = losses(folder, "one"), losses(folder, "fsdp", 2)
    assert len(alone) == 10
    assert both[0] == pytest.approx(alone[0], abs=1e-6)
    assert both == pytest.approx(alone, abs=1e-4)
    assert max(abs(a - b) for a, b in zip(alone, alone[1:], strict=False)) > 1e-3, "batches differ"


def test_a_killed_run_of_two_neither_loses_nor_repeats_a_sample(folder: Path) -> None:
    alone = [row["ids"] for row in seen(folder, "one")]
    ranks = [[row["ids"] for row in seen(folder, "fsdp", rank)] for rank in (0, 1)]
    assert [[x for pair in zip(a, b, strict=True) for x in pair] for a, b in zip(*ranks, strict=True)] == alone


def test_every_row_keeps_its_own_rate(folder: Path) -> None:
    rates = [[row["lr"] for row in seen(folder, name)] for name in ("one", "fsdp")]
    assert rates[0] == rates[1]
    assert len({tuple(r.values()) for r in rates[0]}) > 3 and len(set(rates[0][0].values())) == 4


def test_a_checkpoint_of_two_is_that_of_one_process(folder: Path) -> None:
    one, two = (checkpoint(folder, name) for name in ("one", "fsdp"))
    assert largest_difference(one["state_dict"], two["state_dict"]) < 1e-4
    assert all(".lora_" in name or name.startswith("adapter.") for name in two["state_dict"])
    states: list[dict[Any, Any]] = [
        {(i, k): v for i, s in c["optimizer_states"][0]["state"].items() for k, v in s.items()} for c in (one, two)
    ]
    assert largest_difference(*states) < 1e-4
    assert [g["params"] for g in one["optimizer_states"][0]["param_groups"]] == [
        g["params"] for g in two["optimizer_states"][0]["param_groups"]
    ]
    sizes = [(folder / f"runs/{name}/version_0/checkpoints/last.ckpt").stat().st_size for name in ("one", "fsdp")]
    assert abs(sizes[0] - sizes[1]) < 30_000  # the second process's random state


def test_averages_and_pictures_are_those_of_one_process(folder: Path) -> None:
    one, two = (checkpoint(folder, name)["callbacks"] for name in ("one", "fsdp"))
    ema, grid = (next(k for k in one if k.startswith(name)) for name in ("EMA", "PictureGrid"))
    assert one[ema]["updates"] == two[ema]["updates"] == 6
    assert largest_difference(one[ema]["mean"], two[ema]["mean"]) < 1e-4
    assert largest_difference({"before": one[grid]["before"]}, {"before": two[grid]["before"]}) < 1e-4
    modules = [load_module(folder / f"runs/{name}/version_0/checkpoints/last.ckpt") for name in ("one", "fsdp")]
    assert largest_difference(*({n: p.detach() for n, p in m.named_parameters()} for m in modules)) < 1e-4


def test_two_processes_share_the_drawing_and_score_as_one(folder: Path) -> None:
    one, two = (
        [json.loads(line) for line in (folder / f"runs/{name}/version_0/evaluation/reference.jsonl").read_text().splitlines()]
        for name in ("one", "fsdp")
    )
    assert [(row["step"], row["id"]) for row in one] == [(row["step"], row["id"]) for row in two] and len(one) == 4
    for a, b in zip(one, two, strict=True):
        assert a["scores"] == pytest.approx(b["scores"], abs=1e-4)
    assert {"clip_i", "copy_paste", "ignored"} <= one[0]["scores"].keys() and one[0]["scores"]["ignored"] > 1e-4


def test_another_engine_goes_on_and_stops_when_one_rank_is_told_to(folder: Path) -> None:
    """FSDP2 in two processes, from batch 8 on ZeRO-3 in two, whose second gets SIGTERM, and the last batch in one process."""
    assert checkpoint(folder, "zero3")["global_step"] == 5
    found = losses(folder, "zero3", 2) + losses(folder, "back")
    assert found == pytest.approx(losses(folder, "one")[7:], abs=1e-4)
    assert largest_difference(checkpoint(folder, "back")["state_dict"], checkpoint(folder, "one")["state_dict"]) < 1e-4


@pytest.mark.parametrize("kind", [FSDP2, ZeRO])
def test_what_needs_a_gpu_says_so_before_anything_is_built(kind: Any) -> None:
    with pytest.raises(ValueError, match="there is no GPU here"):
        kind(offload=True)


def test_quantised_weights_are_not_cut(experiment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    args = ["-c", str(experiment), "--trainer.strategy={class_path: lightning_mmgen.strategies.FSDP2}", "--trainer.devices=1"]
    made = cli.main([*args, "--model.init_args.encoder.init_args.quantization=nf4"], run=False)
    made.model.trainer = made.trainer
    with pytest.raises(ValueError, match=re.escape("encoder.quantization: nf4 is for one process or DDP, not for FSDP2")):
        made.model.check()
