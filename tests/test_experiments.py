"""Every YAML under ``experiments/`` runs through the real command line; the true-size forms are built without memory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml
from diffusers import AutoencoderKL
from lightning_mmgen.callbacks import sample
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close
from transformers import AutoTokenizer

from lightning_mmgen.batch import Batch, Edit, PackedImages
from lightning_mmgen.cli import main
from lightning_mmgen.data.instructions import DATA_SETS
from lightning_mmgen.losses import DenoisingStep
from lightning_mmgen.models.adapter import Adapter
from lightning_mmgen.models.weights import TOYBOX, locate
from lightning_mmgen.module import MultimodalDiffusion, SampleNoise
from lightning_mmgen.pipeline import MultimodalPipeline, to_pil
from lightning_mmgen.tools.main import main as mmgen
from lightning_mmgen.toybox.oracle import score
from lightning_mmgen.toybox.pretrain import VAEPretraining
from lightning_mmgen.toybox.pretrain_vlm import VLMPretraining
from lightning_mmgen.toybox.tasks import edit_session

ROOT = Path(__file__).parent.parent
EXPERIMENTS = ROOT / "experiments"
RECIPES = sorted(p for p in EXPERIMENTS.glob("*.yaml"))
PRETRAINING = sorted((EXPERIMENTS / "toybox").glob("*.yaml"))
OVERLAYS = sorted(p for p in (EXPERIMENTS / "overlays").glob("*.yaml"))


class TrueSize(NamedTuple):
    """A form of real size: its YAMLs, the committed configurations of UNet and VAE, side of its pictures, width and pooled width of the
    condition, tokens a reference."""

    files: tuple[str, ...]
    config: str
    side: int
    width: int
    pooled: int | None
    tokens: int


TRUE_SIZE = {
    "idefics2_sdxl": TrueSize(("instruct.yaml", "overlays/idefics2_sdxl.yaml"), "sdxl", 1024, 2048, 1280, 324),
    "sd15": TrueSize(("instruct.yaml", "overlays/sd15.yaml"), "sd15", 512, 768, None, 324),
    "encoder_4bit": TrueSize(("instruct.yaml", "overlays/sd15.yaml", "overlays/encoder_4bit.yaml"), "sd15", 512, 768, None, 324),
    "mumu_stage1": TrueSize(("mumu_stage1.yaml",), "sdxl", 1024, 2048, 1280, 324),
    "mumu_stage2": TrueSize(("mumu_stage2.yaml",), "sdxl", 1024, 2048, 1280, 1296),
}
INSTRUCT_IMAGEN = {
    "retrieval": ("retrieval.yaml",),
    "instruct_imagen": ("instruct_imagen_sdxl.yaml",),
    "references_both": ("instruct_imagen_sdxl.yaml", "overlays/references_both.yaml"),
    "references_vlm": ("retrieval.yaml", "overlays/references_vlm.yaml"),
    "multitask": ("instruct_imagen_sdxl.yaml", "overlays/multitask.yaml"),
    "without_retrieval": ("instruct_imagen_sdxl.yaml", "overlays/without_retrieval.yaml"),
    "single_task": ("instruct_imagen_sdxl.yaml", "overlays/single_task.yaml"),
}
"""Forms of SDXL's size that are fully trained."""
LAVENDER = {"lavender_llama32": "llama-3.2-11b-vision", "lavender_qwen": "qwen2.5-vl-7b"}
"""Models that learn to answer, and their committed configurations."""
EDITS = {name: (f"{name}.yaml",) for name in ("edit_alignment", "edit_instruction", "edit_magicbrush")}
ENGINES = {
    name: (f"experiments/overlays/{name}.yaml", kind)
    for name, kind in (("ddp", "DDPStrategy"), ("fsdp", "FSDP2"), ("deepspeed_zero2", "ZeRO"), ("deepspeed_zero3", "ZeRO"))
}
ONE = "tests/configs/one.jsonl"


def test_an_experiment_reads_like_a_table() -> None:
    for path in EXPERIMENTS.rglob("*.yaml"):
        assert len(path.read_text().splitlines()) < 100, path


QUESTIONS = [r for r in RECIPES if "VisualInstructionTuning" in r.read_text()]


@pytest.mark.parametrize("recipe", [r for r in RECIPES if r not in QUESTIONS], ids=lambda p: p.stem)
def test_recipe_on_the_toybox(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text, own = recipe.read_text(), ["overlays/toybox.yaml"]
    own += ["overlays/toybox_references.yaml"] if "reference_attention" in text else []
    own += ["overlays/toybox_edits.yaml"] if "source_latents: true" in text else []
    step_on_the_toybox([recipe.name, *own, f"overlays/toybox_{recipe.stem}.yaml"])


def test_what_made_the_toybox_edit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    step_on_the_toybox(["edit_instruction.yaml", *(f"overlays/{n}.yaml" for n in ("toybox", "toybox_edits", "toybox_edit_tuning"))])


def test_the_five_minutes_start_from_the_embedded_stage_1_and_its_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    callbacks = json.dumps([{"class_path": "CaptionTeacher", "init_args": {"pooled": 1.0}}])
    more = ["--trainer.max_steps=0", "--data.init_args.workers=0", f"--trainer.callbacks={callbacks}", "--trainer.logger=false"]
    more.append("--model.init_args.schedule.decay=constant")
    model = main(["fit", "-c", str(EXPERIMENTS / "instruct.yaml"), *more]).model
    stage_1 = torch.load(locate("toybox/retrieval.ckpt"), weights_only=True)
    base = Adapter.from_pretrained(locate("toybox/adapter")).state_dict()
    assert set(stage_1["state_dict"]) == set(model.trainable())
    assert all(torch.equal(model.get_parameter(name), weights.float()) for name, weights in stage_1["state_dict"].items())
    (teacher,) = model.terms()
    own = {name.removeprefix("adapter."): weights for name, weights in teacher.first.items() if name.startswith("adapter.")}
    assert own.keys() == base.keys() and all(torch.equal(own[name].float(), weights.float()) for name, weights in base.items())
    assert any(not torch.equal(model.adapter.state_dict()[name], weights.float()) for name, weights in base.items())


def test_the_embedded_model_edits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    files = ["edit_instruction.yaml", *(f"overlays/{n}.yaml" for n in ("toybox", "toybox_edits", "toybox_edit_instruction"))]
    more = ["--trainer.max_steps=0", "--trainer.callbacks=[]", "--trainer.logger=false", "--model.init_args.schedule.decay=constant"]
    model = main(["fit", *(x for f in files for x in ("-c", str(EXPERIMENTS / f))), *more]).model.eval()
    shipped = torch.load(locate("toybox/edits.ckpt"), weights_only=True)
    assert set(shipped["state_dict"]) == set(model.trainable()) and not shipped["callbacks"]
    assert all(torch.equal(model.get_parameter(name), weights.float()) for name, weights in shipped["state_dict"].items())
    wanted = [edit_session(np.random.default_rng((5, i)), True, 1)[0] for i in range(12)]
    drawn = to_pil(sample(MultimodalPipeline.of(model), wanted, seed=1, side=64))
    found = [score(np.asarray(image), record.extra["truth"]) for image, record in zip(drawn, wanted, strict=True)]
    copied = [score(np.asarray(record.references[0].image), record.extra["truth"]) for record in wanted]
    assert sum(bool(f.success) for f in found) >= 8 and not any(f.success for f in copied)
    assert np.mean([f.following for f in found]) > 0.9


@pytest.fixture(scope="module")
def looks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Attention targets of the toybox's first four questions."""
    folder = tmp_path_factory.mktemp("attention")
    told = ["--data", "toybox/short question", "--model", "toybox", "--mode", "fast", "--steps", "2", "--compare", "1", "--count", "4"]
    assert mmgen(["build", "attention", *told, "--out", str(folder)]) == 0
    return folder


@pytest.mark.parametrize("recipe", QUESTIONS, ids=lambda p: p.stem)
def test_recipe_of_questions_on_the_toybox(recipe: Path, looks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    few = [f"--data.init_args.targets={looks}", "--data.init_args.train.init_args.length=4"]
    own = ["overlays/toybox_questions.yaml"] if recipe.stem != "lavender" else []
    model = step_on_the_toybox([recipe.name, *own], few)
    assert model.trainer.callback_metrics["loss/alignment"] > 0 and all(p.requires_grad for p in model.aligner.parameters())


def step_on_the_toybox(files: list[str], more: Sequence[str] = ()) -> Any:
    more = [*more, "--trainer.fast_dev_run=true", "--data.init_args.batch_size=2", "--model.init_args.start=null"]
    cli = main(["fit", *(x for f in files if (EXPERIMENTS / f).is_file() for x in ("-c", str(EXPERIMENTS / f))), *more])
    assert cli.trainer.global_step == 1
    assert torch.isfinite(cli.trainer.callback_metrics["loss"])
    return cli.model


@pytest.mark.parametrize("form", sorted(set(INSTRUCT_IMAGEN) - {"retrieval", "instruct_imagen"}))
def test_forms_of_instruct_imagen_on_the_toybox(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    toybox = ["overlays/toybox.yaml", *(["overlays/toybox_references.yaml"] if form != "references_vlm" else [])]
    recipe, overlay = INSTRUCT_IMAGEN[form]
    model = step_on_the_toybox([recipe, *toybox, overlay] if form == "references_both" else [recipe, overlay, *toybox])
    layers = model.reference_attention
    assert (layers is None) == (form == "references_vlm")
    assert layers is None or layers.in_prompt == (form == "references_both")


@pytest.mark.parametrize("recipe", PRETRAINING, ids=lambda p: p.stem)
def test_what_made_the_toybox(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    batch = "--data.init_args.batch_size=2" if recipe.stem.startswith("base") else "--model.init_args.batch_size=2"
    cli = main(["fit", "-c", str(recipe), "--trainer.fast_dev_run=true", batch])
    assert cli.trainer.global_step == 1


def test_a_vlm_goes_on_from_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    vlm = yaml.safe_load((EXPERIMENTS / "toybox" / "vlm.yaml").read_text())["model"]["init_args"]
    training = VLMPretraining(**vlm | {"start": "toybox/vlm"})
    shipped = type(training.net).from_pretrained(TOYBOX / "vlm", dtype=torch.float32)
    assert_close(training.net.state_dict(), shipped.state_dict(), rtol=0, atol=0)
    assert training.tokenizer.get_vocab() == AutoTokenizer.from_pretrained(TOYBOX / "vlm").get_vocab()


def test_a_vae_goes_on_from_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    net = VAEPretraining("vae", start="toybox/vae").net
    shipped = AutoencoderKL.from_pretrained(TOYBOX / "vae", torch_dtype=torch.float32)
    assert_close(net.state_dict(), shipped.state_dict(), rtol=0, atol=0)


def test_an_overlay_there_and_back_changes_names_and_sizes_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    files = [EXPERIMENTS / "instruct.yaml", *(EXPERIMENTS / "overlays" / f"{n}.yaml" for n in ("idefics2_sdxl", "toybox"))]
    cli = main(["fit", *(x for f in files for x in ("-c", str(f))), "--trainer.fast_dev_run=true", "--data.init_args.batch_size=2"])
    assert cli.trainer.global_step == 1
    plain = main(["-c", str(files[0])], run=False).model
    assert cli.model.table.rows == plain.table.rows and cli.model.betas == plain.betas and cli.model.schedule == plain.schedule


@pytest.mark.parametrize("form", TRUE_SIZE)
def test_nothing_of_the_toybox_is_left_at_true_size(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = true_size(form, monkeypatch)
    assert model.betas == (0.9, 0.999) and model.diffusion.timestep_sampling == "uniform"
    assert {r.optimizer for r in model.table.rows} == {"adamw"}


def command_line(form: str) -> list[str]:
    """The form's files, and data for it."""
    files = (INSTRUCT_IMAGEN | EDITS | {name: (f"{name}.yaml",) for name in LAVENDER} | {name: of.files for name, of in TRUE_SIZE.items()})[
        form
    ]
    data = [f"--data.init_args.train={ONE}", f"--data.init_args.held_out={ONE}"]
    if "instruct_imagen_sdxl.yaml" in files:
        sources = dict.fromkeys(["depth"] if form == "single_task" else DATA_SETS, ONE)
        data = [f"--data.init_args.train={json.dumps(sources)}", "--data.init_args.length=100", "--data.init_args.held_out=null"]
    data += ["--data.init_args.targets=null"] if form in LAVENDER else []
    return [*(x for f in files for x in ("-c", f"experiments/{f}")), *data]


def true_size(form: str, monkeypatch: pytest.MonkeyPatch) -> MultimodalDiffusion:
    """The module of a form of real size, its hub names replaced by committed configurations, on the meta device."""
    monkeypatch.chdir(ROOT)
    config = TRUE_SIZE[form].config if form in TRUE_SIZE else "sd15" if form in ("edit_alignment", "edit_instruction") else "sdxl"
    names = [f"--model.init_args.{part}.pretrained=tests/configs/{config}" for part in ("unet", "codec")]
    names.append("--model.init_args.encoder.init_args.pretrained=tests/configs/idefics2-8b")
    trainer = ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.callbacks=null", "--trainer.fast_dev_run=true"]
    model = main([*command_line(form), *names, *trainer], run=False).model
    with torch.device("meta"):
        model.build(weights=False)
    return model


@pytest.mark.parametrize("form", TRUE_SIZE)
def test_true_size(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = true_size(form, monkeypatch)
    _, config, side, width, pooled, tokens = TRUE_SIZE[form]
    counts = {s.row.match: (s.trainable, s.total - s.trainable) for s in model.table.states}
    assert counts["encoder.vision"] == (0, 417_792_240)
    assert counts["encoder.projector"] == (395_264, 91_750_400)  # 8 x (1152 + 14336) x 2 + 8 x (14336 + 4096)
    assert counts["encoder.language"] == (6_815_744, 7_110_672_384)
    assert counts["unet"][1] == {"sdxl": 2_567_463_684, "sd15": 859_520_964}[config]  # published sizes
    assert counts["unet"][0] == lora_size(model.unet, 8)
    assert counts["adapter"][1] == 0
    assert counts["codec"] == (0, 83_653_863)

    step = true_step(model, side)
    assert step.condition.tokens.shape == (2, step.condition.mask.shape[1], width)
    assert [[s.end - s.start for s in spans] for spans in step.condition.spans] == [[tokens, tokens], [tokens]]
    assert (step.condition.pooled is None) == (pooled is None) and (pooled is None or step.condition.pooled.shape == (2, pooled))
    assert all(p.grad is not None for n, p in model.named_parameters() if p.requires_grad and "encoder.vision" not in n)


@pytest.mark.parametrize("form", ["retrieval", "references_both", "references_vlm"])
def test_instruct_imagen_at_true_size(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = true_size(form, monkeypatch)
    assert (model.diffusion.prediction_type, model.diffusion.beta_schedule) == ("v_prediction", "squaredcos_cap_v2")
    counts = {s.row.match: (s.trainable, s.total - s.trainable) for s in model.table.states}
    assert counts["unet"] == (2_567_463_684, 0) and counts["encoder"][0] == 0
    assert counts.get("reference_attention") == (None if form == "references_vlm" else (6_560_000, 0))  # 4 x 1280^2 + 5 x 1280
    assert {r.optimizer for r in model.table.rows if r.train == "full"} == {"adafactor"}
    step = true_step(model, 1024)
    tokens = {"references_both": 1296, "references_vlm": 324}.get(form)
    spans = [[tokens, tokens], [tokens]] if tokens else [[], []]
    assert [[s.end - s.start for s in of] for of in step.condition.spans] == spans
    context = step.condition.context
    assert (context is None) == (form == "references_vlm")
    assert context is None or context.tokens.shape == (2, 2 * 16 * 16, 1280)  # 512 px: 64 x 64 latents, 16 x 16 at the lowest level
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("form", ["edit_alignment", "edit_instruction"])
def test_edits_at_true_size(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = true_size(form, monkeypatch)
    counts = {s.row.match: (s.trainable, s.total - s.trainable) for s in model.table.states}
    assert counts["unet.conv_in"] == (8 * 320 * 9 + 320, 0)  # twice the four channels of the latents
    layers = {n.removesuffix(".base_layer"): m for n, m in model.unet.named_modules() if isinstance(m, nn.Linear) and ".lora_" not in n}
    targets = [m for n, m in layers.items() if n.endswith(("to_q", "to_k", "to_v"))]
    assert counts["unet"] == (sum(16 * (m.in_features + m.out_features) for m in targets), 859_520_964 - (4 * 320 * 9 + 320))
    found = {(m.r["default"], m.scaling["default"], m.lora_dropout["default"].p) for m in model.unet.modules() if hasattr(m, "lora_A")}
    assert found == {(16, 2.0, 0.05)}  # the post: rank 16, alpha 32, dropout .05
    step = true_step(model, 512)
    assert step.condition.source is not None and step.condition.source.shape == (2, 4, 64, 64)
    assert model.unet.conv_in.weight.grad is not None


@pytest.mark.parametrize("form", LAVENDER)
def test_models_that_answer_at_true_size(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    name = f"--model.init_args.encoder.init_args.pretrained=tests/configs/{LAVENDER[form]}"
    trainer = ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.callbacks=null", "--trainer.fast_dev_run=true"]
    model = main([*command_line(form), name, *trainer], run=False).model
    with torch.device("meta"):
        model.build(weights=False)
    counts = {s.row.match: (s.trainable, s.total - s.trainable) for s in model.table.states}
    assert sum(frozen for _, frozen in counts.values()) == {"lavender_llama32": 10_670_220_835, "lavender_qwen": 8_292_166_656}[form]
    layers, wide, narrow = {"lavender_llama32": (40, 4096, 1024), "lavender_qwen": (28, 3584, 512)}[form]
    assert counts["encoder.language"][0] == layers * 8 * (3 * wide + narrow)  # q_proj: wide + wide, v_proj: wide + narrow
    assert all(trained == 0 for match, (trained, _) in counts.items() if match != "encoder.language")
    found = {(m.r["default"], m.scaling["default"], m.lora_dropout["default"].p) for m in model.modules() if hasattr(m, "lora_A")}
    assert found == {(8, 4.0, 0.05)}  # the paper: rank 8, alpha 32, dropout .05
    side = model.encoder.reference_size
    assert (side, model.encoder.grid_of(side, side)) == {"lavender_llama32": (560, (40, 40)), "lavender_qwen": (504, (18, 18))}[form]
    texts = [model.chat.answered("[ref#1] which colour?", [1], "red"), model.chat.answered("[ref#1] where?", [1], "on the left")]
    assert all(text.endswith(next(iter(model.chat.ends - {"</s>"}))) for text in texts)
    if form == "lavender_qwen":
        return  # its tower asks for the values of tensors, which have none here
    group = PackedImages(torch.empty(2, 3, side, side), torch.tensor([0, 1]), torch.tensor([0, 0]))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        as_fake(model)
        prompts = model.train().prompts(texts, [[1], [1]], [group._replace(pixels=mode.from_tensor(group.pixels))])
        logits = model(prompts)
        logits.float().mean().backward()
    assert logits.shape == (*prompts.tokens.shape, 128_256)
    assert prompts.columns == [[(1, 40, 40)], [(1, 40, 40)]]
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def true_step(model: MultimodalDiffusion, side: int) -> DenoisingStep:
    """A step of two prompts, forward and back, without memory."""
    groups = [
        PackedImages(
            torch.empty(3, 3, model.encoder.reference_size, model.encoder.reference_size), torch.tensor([0, 0, 1]), torch.tensor([0, 1, 0])
        )
    ]
    texts, markers = ["a [ref#1] man on a [ref#2] scooter", "a [ref#1] cat"], [[1, 2], [1]]
    draw = SampleNoise(torch.tensor([1, 2]), (4, side // 8, side // 8), model.diffusion)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        as_fake(model)
        batch = Batch(
            texts,
            markers,
            [g._replace(pixels=mode.from_tensor(g.pixels)) for g in groups],
            torch.empty(2, 3, side, side),
            [],
            [],
            torch.zeros(2),
            edit=Edit(torch.empty(2, 3, side, side), torch.ones(2, 1, side, side), torch.zeros(2), torch.ones(2)),
        )
        step = model.train().predict(batch, draw)
        step.prediction.float().mean().backward()
    assert step.prediction.shape == (2, 4, side // 8, side // 8)
    return step


def lora_size(unet: nn.Module, rank: int) -> int:
    """Plain recount: rank x (in + out) for every attention projection."""
    layers = {n.removesuffix(".base_layer"): m for n, m in unet.named_modules() if isinstance(m, nn.Linear) and ".lora_" not in n}
    return sum(rank * (m.in_features + m.out_features) for n, m in layers.items() if n.endswith(("to_q", "to_k", "to_v", "to_out.0")))


def as_fake(module: nn.Module) -> None:
    """Replace meta tensors by fake ones of a device, which transformers' masks accept."""
    for part in module.modules():
        for store in (part._parameters, part._buffers):
            for name, value in store.items():
                if value is not None:
                    fake: Any = torch.empty_like(value, device="cpu")
                    store[name] = nn.Parameter(fake, requires_grad=value.requires_grad) if isinstance(value, nn.Parameter) else fake


@pytest.mark.parametrize("form", [*TRUE_SIZE, "retrieval", "instruct_imagen", *EDITS, *LAVENDER])
def test_a_gpu_recipe_without_a_gpu_fails_in_one_line(
    form: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning_mmgen import cli

    monkeypatch.chdir(ROOT)
    if torch.cuda.is_available():
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr("sys.argv", ["lightning", "fit", *command_line(form)])
    assert cli.command() == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and "gpu" in error.lower()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("recipe", ["instruct", "edit_instruction"])
def test_an_engine_goes_with_a_recipe(recipe: str, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    files = [f"experiments/{recipe}.yaml", "experiments/overlays/toybox.yaml", "experiments/overlays/toybox_edits.yaml", ENGINES[engine][0]]
    args = ["--trainer.accelerator=cpu", "--trainer.devices=2", "--model.init_args.start=null"]
    trainer = main([*(x for f in files if recipe != "instruct" or "toybox" not in f for x in ("-c", f)), *args], run=False).trainer
    assert type(trainer.strategy).__name__ == ENGINES[engine][1] and trainer.world_size == 2
    if engine.startswith("deepspeed"):
        assert trainer.strategy.config["zero_optimization"]["stage"] == int(engine[-1])


def test_overlays_are_all_tested() -> None:
    forms = [*(form.files for form in TRUE_SIZE.values()), *INSTRUCT_IMAGEN.values()]
    used = {Path(f).stem for files in forms for f in files if f.startswith("overlays/")}
    found, own = {p.stem for p in OVERLAYS}, {f"toybox_{r.stem}" for r in RECIPES}
    assert found == used | {"toybox", "toybox_references", "toybox_edits", "toybox_edit_tuning", "toybox_questions", *ENGINES} | own & found
