"""Attention alignment of a VLM and of a generator."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning_mmgen.callbacks import EMA, AttentionAlignment
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader

from lightning_mmgen.answering import VisualInstructionTuning
from lightning_mmgen.batch import QuestionBatch, pack
from lightning_mmgen.checkpoint import AtomicCheckpointIO
from lightning_mmgen.cli import main
from lightning_mmgen.data.crops import CropDataModule
from lightning_mmgen.data.datamodule import MultimodalDataModule
from lightning_mmgen.data.sources import ToyboxSource
from lightning_mmgen.losses import ExponentialSchedule, min_max
from lightning_mmgen.models.adapter import AdapterConfig
from lightning_mmgen.models.aligner import AlignerConfig
from lightning_mmgen.models.codec import CodecConfig
from lightning_mmgen.models.idefics2 import Idefics2Encoder
from lightning_mmgen.models.mllama import MllamaEncoder
from lightning_mmgen.models.parameters import Row
from lightning_mmgen.models.unet import UNetConfig
from lightning_mmgen.module import MultimodalDiffusion
from lightning_mmgen.prompt import split
from lightning_mmgen.tools.generate import load_module

ROWS = (
    Row("encoder.vision", "frozen"),
    Row("encoder.projector", "frozen"),
    Row("encoder.language", "lora", lr=1e-2, rank=2, target_modules=["q_proj", "k_proj", "v_proj"]),
    Row("head", "frozen"),
    Row("aligner", "full", lr=1e-2),
)
SMALL = AlignerConfig("light", 8)


def questions(answers: list[str], words: list[list[str]], side: int = 8) -> QuestionBatch:
    """A question a sample, about pictures of 4 x 4 and 2 x 3 tokens in turn; the maps of ``words`` are blobs of their own."""
    pictures = [[torch.rand(3, *((16, 16) if b % 2 == 0 else (8, 12))) * 2 - 1] for b in range(len(answers))]
    targets = [{word: min_max(torch.rand(1, side, side))[0] for word in of} for of in words]
    asked = ["[ref#1] what is it?", "where is the thing in [ref#1] then?"]
    texts = [asked[b % 2] for b in range(len(answers))]
    seeds = torch.arange(len(answers))
    return QuestionBatch(texts, [[1]] * len(answers), pack(pictures), answers, [str(s) for s in seeds], seeds, targets)


BATCH = (["a red circle and circles", "two striped boxes"], [["circle", "red", "star"], ["Box"]])


class Weights(Callback):
    """The trained weights after each step."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.seen.append({n: p.detach().clone() for n, p in pl_module.trainable().items()})  # type: ignore[operator]

    on_train_start = on_train_batch_end  # type: ignore[assignment]


def fit(
    vlm: Path, batches: list[QuestionBatch], out: Path | None = None, rows: tuple[Row, ...] = ROWS, steps: int = 1, **given: Any
) -> tuple[VisualInstructionTuning, AttentionAlignment, L.Trainer]:
    torch.manual_seed(0)
    return fitted(VisualInstructionTuning(Idefics2Encoder(str(vlm), image_tokens=16), rows), batches, out, steps, **given)


def fitted(
    module: VisualInstructionTuning, batches: list[QuestionBatch], out: Path | None = None, steps: int = 1, **given: Any
) -> tuple[VisualInstructionTuning, AttentionAlignment, L.Trainer]:
    term = AttentionAlignment(**{"aligner": SMALL, **given})
    trainer = L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        callbacks=[term, Weights()],
        logger=TensorBoardLogger(str(out), name=None, version="") if out else False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    trainer.fit(module, DataLoader(batches, batch_size=None, collate_fn=lambda batch: batch))  # type: ignore[arg-type]
    return module, term, trainer


def test_a_words_map_is_that_of_the_rows_that_predict_it(vlm: Path) -> None:
    batch = questions(*BATCH)
    module, term, _ = fit(vlm, [batch], aggregation="mean")
    module.eval()
    step = module.answering_step(batch)
    aligned = term.align(step)
    assert [(w.name, w.sample, w.place[1:]) for w in aligned.words] == [("Box", 1, (2, 3)), ("circle", 0, (4, 4)), ("red", 0, (4, 4))]
    assert aligned.counts.all() and aligned.maps.shape == (3, 8, 8)
    tokenizer = module.encoder.tokenizer
    n, start = step.prompts.lengths[0], step.prompts.places[0][0].start
    ids = step.tokens[0, :n].tolist()
    pieces = [tokenizer.decode([i]) for i in ids]
    said = [i for i in range(start + 16, n) if step.answered[0, i] and pieces[i].strip() in ("circle", "s")]
    rows = [i - 1 for i in said][:-1]  # without that of the end, "</s>"
    assert "".join(pieces[i + 1] for i in rows) == " circle circles"
    module.encoder.language.set_attn_implementation("eager")  # type: ignore[operator]
    own = {"inputs_embeds": step.prompts.inputs[:1, :n], "position_ids": torch.arange(n)[None]}
    eager = module.encoder.language(**own, output_attentions=True, use_cache=False).attentions
    expected = []
    for layer, align in zip(eager, module.aligner, strict=True):  # type: ignore[arg-type]
        flat = layer[0, :, rows, start : start + 16].mean(1) * max(step.prompts.lengths)  # [heads, 16]
        expected.append(align(interpolate(flat.view(1, 4, 4, 4), (8, 8), mode="bilinear")))
    torch.testing.assert_close(aligned.maps[1], min_max(torch.stack(expected).mean(0))[0], rtol=1e-4, atol=1e-5)
    assert torch.equal(aligned.targets[2], batch.targets[0]["red"])  # type: ignore[index]


def test_the_term_is_the_mean_error_of_the_words_at_its_schedule(vlm: Path) -> None:
    batch = questions(*BATCH)
    module, term, trainer = fit(vlm, [batch], weight=ExponentialSchedule(6.0, 2.0, 4))
    module.eval()
    aligned = term.align(module.answering_step(batch))
    errors = (aligned.maps - aligned.targets).square().mean((1, 2))
    (value,) = term.compute(module.answering_step(batch)).values()
    assert trainer.global_step == 1 and errors.min() > 0
    torch.testing.assert_close(value, 6 * np.exp(-0.5) * errors.mean())
    assert trainer.callback_metrics["loss"] == trainer.callback_metrics["loss/language"] + trainer.callback_metrics["loss/alignment"]


def test_gradients_reach_the_aligner_and_the_queries_and_keys(vlm: Path) -> None:
    module, term, _ = fit(vlm, [questions(*BATCH)], steps=2)  # LoRA's first step moves B alone
    module.zero_grad()
    term.compute(module.answering_step(questions(*BATCH)))["alignment"].backward()
    touched = {n for n, p in module.trainable().items() if p.grad is not None and p.grad.abs().max() > 0}
    assert {n for n in module.trainable() if n.startswith("aligner.")} - touched <= {
        f"aligner.{i}.{n}"
        for i in (0, 1)
        for n in ("out.bias", "blocks.0.bias", "blocks.3.bias")  # norm and min-max forget a constant
    }
    assert any("layers.1.self_attn.q_proj.lora_B" in n for n in touched) and any("layers.1.self_attn.k_proj.lora_A" in n for n in touched)
    assert not any("layers.1.self_attn.v_proj" in n for n in touched)


def test_a_vlm_with_cross_attention_is_aligned_where_it_reads_pictures(mllama: Path) -> None:
    torch.manual_seed(0)
    encoder = MllamaEncoder(str(mllama), image_tokens=16)
    side = encoder.reference_size
    targets = [{"red": min_max(torch.rand(1, 8, 8))[0]}, {"box": min_max(torch.rand(1, 8, 8))[0]}]
    pictures = pack([[torch.rand(3, side, side) * 2 - 1] for _ in range(2)])
    batch = QuestionBatch(["[ref#1] what?"] * 2, [[1], [1]], pictures, ["a red one", "two boxes"], ["a", "b"], torch.arange(2), targets)
    module, term, _ = fitted(VisualInstructionTuning(encoder, ROWS), [batch], steps=2, layers=["*.cross_attn"])
    module.zero_grad()
    step = module.answering_step(batch)
    assert sorted((w.name, w.place[1:]) for w in term.align(step).words) == [("box", (4, 4)), ("red", (4, 4))]
    term.compute(step)["alignment"].backward()
    touched = {n for n, p in module.trainable().items() if p.grad is not None and p.grad.abs().max() > 0}
    assert any("cross_attn.q_proj.lora_B" in n for n in touched) and any("cross_attn.k_proj.lora_B" in n for n in touched)
    assert not any("cross_attn.v_proj" in n for n in touched) and any(n.startswith("aligner.") for n in touched)


@pytest.mark.parametrize("words", [[["star"], []], None])
def test_nothing_that_matches_is_a_zero_of_the_graph(vlm: Path, words: list[list[str]] | None) -> None:
    batch = questions(BATCH[0], words or [[], []])
    batch = batch if words else batch._replace(targets=None)
    module, term, trainer = fit(vlm, [batch])
    assert trainer.callback_metrics["loss/alignment"] == 0
    module.zero_grad()
    term.compute(module.answering_step(batch))["alignment"].backward()
    grads = {n: p.grad for n, p in module.trainable().items() if "v_proj" not in n or "layers.0" in n}
    assert all(g is not None and not g.any() for g in grads.values())


def test_in_the_first_steps_the_aligner_alone_is_trained(vlm: Path) -> None:
    _, _, trainer = fit(vlm, [questions(*BATCH)] * 3, steps=3, pretraining=2)
    start, one, two, three = next(c for c in trainer.callbacks if isinstance(c, Weights)).seen  # type: ignore[attr-defined]
    moved = [{n.split(".")[0] for n in start if not torch.equal(a[n], b[n])} for a, b in ((start, one), (one, two), (two, three))]
    assert moved == [{"aligner"}, {"aligner"}, {"aligner", "encoder"}]


def test_training_brings_maps_to_their_targets_and_draws_them(vlm: Path, tmp_path: Path) -> None:
    batch = questions(*BATCH)
    fit(vlm, [batch] * 30, tmp_path, steps=30, every=15)
    events = EventAccumulator(str(tmp_path), {"images": 0})
    events.Reload()
    values = [e.value for e in events.Scalars("loss/alignment")]
    assert np.mean(values[-3:]) < 0.6 * values[0]
    images = events.Images("attention")
    assert [i.step for i in images] == [15, 30] and (images[0].width, images[0].height) == (2 * 392, 2 * 142)
    assert images[0].encoded_image_string != images[1].encoded_image_string


@pytest.mark.parametrize("given", [{"weight": -1.0}, {"pretraining": -1}, {"count": 0}, {"pos": ("NOUN",)}, {"target": "vlm"}])
def test_a_wrong_argument_is_an_error(vlm: Path, given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="AttentionAlignment: |words: parts of speech need a spaCy pipeline"):
        fit(vlm, [questions(*BATCH)], **given)


def test_a_table_without_the_aligner_and_targets_of_two_sizes_are_errors(vlm: Path) -> None:
    with pytest.raises(ValueError, match="parameter aligner.0.blocks.0.weight falls under no row"):
        fit(vlm, [questions(*BATCH)], rows=ROWS[:-1])
    batch = questions(*BATCH)
    assert batch.targets is not None
    batch.targets[1]["Box"] = torch.rand(4, 4)
    with pytest.raises(ValueError, match=r"targets of several sizes in a batch: \[\(4, 4\), \(8, 8\)\]"):
        fit(vlm, [batch])


# -- the generator ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawn(experiment: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run of the command line on captions, and its folder."""
    out, term = tmp_path_factory.mktemp("drawn"), {"aligner": {"variant": "light", "width": 8}, "every": 2}
    added = [{"class_path": "AttentionAlignment", "init_args": term}, {"class_path": "EMA", "init_args": {"decay": 0.5}}]
    source = json.dumps({"class_path": "ToyboxSource", "init_args": {"tasks": {"caption": 1.0}, "length": 8}})
    rows = [
        {"match": "encoder", "train": "frozen"},
        {"match": "adapter", "train": "full", "lr": 1e-2},
        {"match": "unet", "train": "lora", "rank": 2, "lr": 1e-2},
        {"match": "aligner", "train": "full", "lr": 1e-2},
    ]
    args = [
        "fit",
        "-c",
        str(experiment),
        *(f"--trainer.callbacks+={json.dumps(callback)}" for callback in added),
        f"--data.init_args.train={source}",
        "--data.init_args.regions=8",
    ]
    args += [f"--model.init_args.parameters={json.dumps(rows)}", "--model.init_args.condition_dropout.both=0"]
    return main([*args, f"--trainer.logger.init_args.save_dir={out}"]), out


def alignment_of(cli: Any) -> AttentionAlignment:
    return next(c for c in cli.trainer.callbacks if isinstance(c, AttentionAlignment))


def a_step(fitted: Any) -> Any:
    batch, _ = next(iter(fitted.datamodule.train_dataloader()))
    fitted.model.eval()
    return fitted.model.denoising_step(batch)


class Fitted(NamedTuple):
    """A generator after a step."""

    model: MultimodalDiffusion
    datamodule: MultimodalDataModule
    term: AttentionAlignment


def generator_of(parts: Path, data: MultimodalDataModule, **term: Any) -> Fitted:
    module = MultimodalDiffusion(
        Idefics2Encoder(str(parts / "vlm"), image_tokens=16),
        AdapterConfig(layers=1, heads=2, width=8),
        UNetConfig(str(parts / "unet"), None),
        CodecConfig(str(parts / "vae"), None),
        (
            *(Row(part, "frozen") for part in ("encoder", "adapter", "codec")),
            Row("unet", "lora", lr=1e-2, rank=2),
            Row("aligner", "full", lr=1e-2),
        ),
    )
    alignment = AttentionAlignment(aligner=SMALL, **term)
    quiet: Any = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    L.Trainer(max_steps=1, limit_val_batches=0, accelerator="cpu", callbacks=[alignment], **quiet).fit(module, data)
    return Fitted(module, data, alignment)


def test_a_phrases_map_in_the_unet_is_compared_with_its_box(drawn: Any) -> None:
    cli, _ = drawn
    term, step = alignment_of(cli), a_step(cli)
    aligned = term.align(step)
    record = cli.datamodule.train.record(0)
    boxes = {box.phrase: box for box in record.boxes}
    assert aligned.counts.all() and {w.name for w in aligned.words if w.sample == step.batch.ids.index(step.batch.ids[0])}
    for word, target in zip(aligned.words, aligned.targets, strict=True):
        assert word.name in step.batch.instructions[word.sample]
        ids, _ = cli.model.encoder.tokenise(step.batch.instructions[word.sample], [], [])
        assert cli.model.encoder.tokenizer.decode([ids[t] for t in word.tokens]).strip() == word.name
        assert 0 < target.mean() < 0.6
    assert boxes and cli.trainer.callback_metrics["loss/alignment"] > 0


def test_the_maps_of_the_generator_are_drawn(drawn: Any) -> None:
    events = EventAccumulator(str(drawn[1] / "tiny" / "version_0"), {"images": 0})
    events.Reload()
    assert [i.step for i in events.Images("attention")] == [2]


def test_a_checkpoint_with_an_aligner_generates_without_one(drawn: Any) -> None:
    cli, out = drawn
    path = next((out / "tiny" / "version_0").rglob("last.ckpt"))
    saved = AtomicCheckpointIO().load_checkpoint(path)
    assert any(n.startswith("aligner.") for n in saved["state_dict"])
    module = load_module(path)
    mean = next(c for c in cli.trainer.callbacks if isinstance(c, EMA)).mean
    assert not hasattr(module, "aligner") and module.trainable().keys() == {n for n in mean if not n.startswith("aligner.")}
    assert all(torch.equal(p, mean[n]) for n, p in module.trainable().items())


def test_the_picture_tokens_of_a_reference_look_at_its_box_too(parts: Path) -> None:
    data = CropDataModule(ToyboxSource({"crops": 1.0}, length=8), control_share=0, target_size=16, batch_size=2, regions=8)
    fitted = generator_of(parts, data, pictures=True, layers=[0])
    step = a_step(fitted)
    words = fitted.term.align(step).words
    for shown in [w for w in words if w.name.endswith("(picture)")]:
        span = step.condition.spans[shown.sample][step.batch.phrases[shown.sample].index(shown.name.removesuffix(" (picture)"))]
        assert shown.tokens == tuple(range(span.start, span.end)) and len(shown.tokens) == 16
    assert {w.name.endswith("(picture)") for w in words} == {True, False}


def test_the_unet_learns_to_look_where_the_vlm_looks(parts: Path) -> None:
    data = MultimodalDataModule(ToyboxSource({"subject": 1.0}, length=8), target_size=16, batch_size=2)
    fitted = generator_of(parts, data, target="vlm", vlm_layers=[1])
    term, step = fitted.term, a_step(fitted)
    records = dict(term.told)
    aligned = term.align(step)
    assert list(records) == ["layers.1.self_attn"] and aligned.targets.shape[1:] == (4, 4)
    word, target = next((w, t) for w, t in zip(aligned.words, aligned.targets, strict=True) if len(w.tokens) == 1)
    slot = next(s for _, s in split(step.batch.instructions[word.sample], step.batch.markers[word.sample]) if s is not None)
    span = step.condition.spans[word.sample][slot]
    rows = records["layers.1.self_attn"].rows(torch.tensor([word.sample]), torch.tensor([word.tokens[0]]))
    torch.testing.assert_close(target, min_max(rows[0].mean(0)[span.start : span.end].view(4, 4)), rtol=1e-4, atol=1e-5)
    assert not aligned.targets.requires_grad and aligned.targets.amax() > 0.99
