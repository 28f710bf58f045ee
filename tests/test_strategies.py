"""Two processes from the same YAML: the numbers of one process, and checkpoints that any of them goes on from."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
from PIL import Image as PILImage

from lightning_mmgen import cli
from lightning_mmgen.checkpoint import AtomicCheckpointIO
from lightning_mmgen.strategies import FSDP2, ZeRO
from lightning_mmgen.tools.generate import load_module

from . import engines
from .conftest import DROPOUT_ROWS
from .engines import ENGINES, Run, checkpoint, fit, largest_difference, losses, seen, written

STEPS, FOUR = "--trainer.max_steps=4", "--data.init_args.batch_size=4"
DROPOUT = f"--model.init_args.parameters={json.dumps(DROPOUT_ROWS)}"


@pytest.fixture(scope="module")
def folder(parts: Path, clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of 4 optimizer steps, two batches of 4 to a step and 5 to an epoch: ``one`` in one process, the others in two, 2 each.

    FSDP2 with dropout loses its second process after batch 6, the last checkpoint being that of step 2, batch 4, and goes on; so does one
    process from that checkpoint. From step 2 on ZeRO-3 goes on until its second process gets SIGTERM, and then one process."""
    folder = tmp_path_factory.mktemp("engines")
    (folder / "engines.yaml").write_text(engines.aligned(engines.YAML.format(parts=parts, clip=clip)))
    (folder / "plain.yaml").write_text(engines.PLAIN)
    (folder / "gated.yaml").write_text(engines.GATED)
    plain, looks = ("-c", str(folder / "plain.yaml"), STEPS), (STEPS, engines.reference(clip))
    gated = ("-c", str(folder / "gated.yaml"), STEPS)
    start = f"--ckpt_path={folder}/runs/{{}}/version_0/checkpoints/{{}}.ckpt".format
    fit(
        folder,
        Run("one", more=(*looks, FOUR)),
        *(Run(engine, engine, looks if engine == "fsdp" else (STEPS,)) for engine in ENGINES),
        Run("gated one", more=(*gated, FOUR)),
        *(Run(f"gated {engine}", engine, gated) for engine in ENGINES),
        Run("whole", "fsdp", (*plain, DROPOUT)),
        Run("killed", "fsdp", (*plain, DROPOUT), status=(1, -9), kill_at=6, rank=1),
        Run("alone", more=(*plain, FOUR, DROPOUT, start("killed", "last"))),
        Run("killed", "fsdp", (*plain, DROPOUT, "--ckpt_path=last")),
        Run("told", "deepspeed_zero3", (STEPS, start("fsdp", "step=2")), status=143, term_at=5),
        Run("back", more=(STEPS, FOUR, start("told", "last"))),
    )
    return folder


def test_nothing_is_compiled(folder: Path) -> None:
    assert not (folder / "compiled").exists()


@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_have_the_losses_and_weights_of_one(engine: str, folder: Path) -> None:
    alone, both = losses(folder, "one"), losses(folder, engine, 2)
    assert len(alone) == 7
    assert both[0] == pytest.approx(alone[0], abs=1e-6)
    assert both == pytest.approx(alone, abs=1e-4)
    assert max(abs(a - b) for a, b in zip(alone, alone[1:], strict=False)) > 1e-3, "batches differ"
    modules = [load_module(folder / f"runs/{name}/version_0/checkpoints/last.ckpt") for name in ("one", engine)]
    assert largest_difference(*({n: p.detach() for n, p in m.named_parameters()} for m in modules)) < 1e-4


@pytest.mark.parametrize("engine", ENGINES)
def test_a_gate_learns_in_two_processes_what_it_learns_in_one(engine: str, folder: Path) -> None:
    """Also where one process has no source to gate."""
    alone, both = losses(folder, "gated one"), losses(folder, f"gated {engine}", 2)
    assert both == pytest.approx(alone, abs=1e-4)
    sourceless = [{row["batch"] for row in seen(folder, f"gated {engine}", rank) if not row["edits"]} for rank in range(2)]
    assert sourceless[0] ^ sourceless[1], "a batch with edits in one process alone"
    one, two = (checkpoint(folder, f"gated {name}")["state_dict"] for name in ("one", engine))
    assert largest_difference(one, two) < 1e-4
    assert one["source_gate.conv.weight"].any(), "it has learned"


@pytest.mark.parametrize("engine", ["one", *ENGINES])
def test_every_row_keeps_its_own_rate(engine: str, folder: Path) -> None:
    """Two steps of warm-up, and a cosine to 0 at the fourth; five batches an epoch, two to a step."""
    base = {"encoder.projector": 1e-3, "encoder.language": 2e-3, "adapter": 3e-3, "unet": 4e-3, "aligner": 5e-3}
    found = [row["lr"] for row in seen(folder, engine)]
    done = [0, 1, 1, 2, 3, 3, 4]  # optimizer steps by the end of each batch
    factors = [(n + 1) / 2 if n < 2 else (1 + math.cos(math.pi * (n - 2) / 2)) / 2 for n in done]
    assert found == [pytest.approx({row: factor * rate for row, rate in base.items()}) for factor in factors]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_checkpoint_of_two_is_that_of_one_process(engine: str, folder: Path) -> None:
    for file in ("step=2.ckpt", "last.ckpt"):
        one, two = (checkpoint(folder, name, file) for name in ("one", engine))
        assert largest_difference(one["state_dict"], two["state_dict"]) < 1e-4
        assert all(".lora_" in name or name.startswith(("adapter.", "aligner.")) for name in two["state_dict"])
        states: list[dict[Any, Any]] = [
            {(i, k): v for i, s in c["optimizer_states"][0]["state"].items() for k, v in s.items()} for c in (one, two)
        ]
        assert largest_difference(*states) < 1e-4
        assert [g["params"] for g in one["optimizer_states"][0]["param_groups"]] == [
            g["params"] for g in two["optimizer_states"][0]["param_groups"]
        ]
        ema = next(k for k in one["callbacks"] if k.startswith("EMA"))
        assert one["callbacks"][ema]["updates"] == two["callbacks"][ema]["updates"] == one["global_step"]
        assert largest_difference(one["callbacks"][ema]["mean"], two["callbacks"][ema]["mean"]) < 1e-4
    (alone,), files = (engines.held(folder, name) for name in ("one", engine))
    assert sum(files) == alone, "each element once, and none that is not trained"
    assert len(files) == (1 if engine == "ddp" else 3)
    assert all(abs(size - (alone - files[0]) / 2) < 0.01 * alone for size in files[1:]), "each process writes its half of what is cut"


@pytest.mark.parametrize("engine", ENGINES)
def test_pictures_are_those_of_one_process_during_training(engine: str, folder: Path) -> None:
    """In float32 to 1e-4 before training; as files of 8 bits to a level."""
    one, two = (checkpoint(folder, name)["callbacks"] for name in ("one", engine))
    grid = next(k for k in one if k.startswith("PictureGrid"))
    assert largest_difference({"before": one[grid]["before"]}, {"before": two[grid]["before"]}) < 1e-4
    runs = [folder / f"runs/{name}/version_0" for name in ("one", engine)]
    names = [sorted(str(p.relative_to(run)) for p in run.rglob("*.png")) for run in runs]
    assert names[0] == names[1] and {f"pictures-{step:06d}.png" for step in (2, 4)} < set(names[0])
    assert {f"evaluation/pictures/{step:06d}-{i:04d}.png" for step in (0, 2, 4) for i in (0, 1)} < set(names[0])
    for name in names[0]:
        a, b = (np.asarray(PILImage.open(run / name), dtype=np.int16) for run in runs)
        assert a.shape == b.shape and np.abs(a - b).max() <= 1, name
    first, last = (np.asarray(PILImage.open(runs[1] / f"evaluation/pictures/{step:06d}-0000.png"), dtype=np.int16) for step in (0, 4))
    assert np.abs(first - last).max() > 1, "training shows"


@pytest.mark.parametrize(
    ("engine", "evaluation", "steps"), [*((engine, "clip_score", (0, 2, 4)) for engine in ENGINES), ("fsdp", "reference", (0, 4))]
)
def test_scores_are_those_of_one_process_during_training(engine: str, evaluation: str, steps: tuple[int, ...], folder: Path) -> None:
    one, two = (
        [json.loads(line) for line in (folder / f"runs/{name}/version_0/evaluation/{evaluation}.jsonl").read_text().splitlines()]
        for name in ("one", engine)
    )
    assert [(row["step"], row["id"]) for row in one] == [(row["step"], row["id"]) for row in two]
    assert [row["step"] for row in one] == [step for step in steps for _ in range(2)]
    for a, b in zip(one, two, strict=True):
        assert a["scores"] == pytest.approx(b["scores"], abs=1e-4)
    if evaluation == "reference":
        assert {"clip_i", "copy_paste", "ignored"} <= one[0]["scores"].keys() and one[0]["scores"]["ignored"] > 1e-4


def test_a_killed_run_of_two_goes_on_bit_equal(folder: Path) -> None:
    """Dropout, other on each process, included. One process was killed, and the other ended by itself, in an error; batches 5 and 6 were
    lost."""
    assert "Error" in (folder / "killed.0.log").read_text()
    for rank in (0, 1):
        rows = [[(row["batch"], row["loss"], row["ids"], row["lr"]) for row in seen(folder, name, rank)] for name in ("whole", "killed")]
        assert rows[0] == rows[1] and len(rows[0]) == 7
    assert [row["batch"] for row in written(folder, "killed", 1)] == [*range(1, 7), 5, 6, 7]
    whole, killed = (checkpoint(folder, name) for name in ("whole", "killed"))
    assert largest_difference(whole["state_dict"], killed["state_dict"]) == 0
    assert losses(folder, "whole", 2) != pytest.approx(losses(folder, "one"), abs=1e-4), "dropout is on"


def test_a_killed_run_neither_loses_nor_repeats_a_sample_on_one_process(folder: Path) -> None:
    ranks = [[row["ids"] for row in written(folder, "killed", rank)[:4]] for rank in (0, 1)]
    before = [[x for pair in zip(a, b, strict=True) for x in pair] for a, b in zip(*ranks, strict=True)]
    assert before + [row["ids"] for row in seen(folder, "alone")] == [row["ids"] for row in seen(folder, "one")]


def test_another_engine_goes_on_and_stops_when_one_rank_is_told_to(folder: Path) -> None:
    """FSDP2 in two processes, from batch 5 on ZeRO-3 in two, whose second gets SIGTERM, and the last two batches in one process."""
    assert checkpoint(folder, "told")["global_step"] == 3
    found = losses(folder, "told", 2) + losses(folder, "back")
    assert found == pytest.approx(losses(folder, "one")[4:], abs=1e-4)
    assert largest_difference(checkpoint(folder, "back")["state_dict"], checkpoint(folder, "one")["state_dict"]) < 1e-4


@pytest.mark.parametrize("kind", [FSDP2, ZeRO])
def test_what_needs_a_gpu_says_so_before_anything_is_built(kind: Any) -> None:
    with pytest.raises(ValueError, match="there is no GPU here"):
        kind(offload=True)


@pytest.mark.parametrize("kind", [FSDP2, ZeRO])
def test_a_trainer_of_ones_own_writes_pieces_too(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    trainer = L.Trainer(strategy=kind(), accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    assert isinstance(trainer.strategy.checkpoint_io, AtomicCheckpointIO)


def test_quantised_weights_are_not_cut(experiment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    args = ["-c", str(experiment), "--trainer.strategy={class_path: lightning_mmgen.strategies.FSDP2}", "--trainer.devices=1"]
    made = cli.main([*args, "--model.init_args.encoder.init_args.quantization=nf4"], run=False)
    made.model.trainer = made.trainer
    with pytest.raises(ValueError, match=re.escape("encoder.quantization: nf4 is for one process or DDP, not for FSDP2")):
        made.model.check()
