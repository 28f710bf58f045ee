"""Answers and forgetting of a fine-tuned model, through the command line; its export and its predictions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from lightning_mmgen.callbacks import AnswerEvaluation, LanguageEvaluation
from lightning_mmgen.callbacks.answers import exact_match
from transformers import AutoModelForImageTextToText

from lightning_mmgen.answering import VisualInstructionTuning
from lightning_mmgen.cli import main
from lightning_mmgen.data.sources import ToyboxSource
from lightning_mmgen.models.idefics2 import Idefics2Encoder
from lightning_mmgen.models.parameters import Row
from lightning_mmgen.tools.generate import load, load_module
from lightning_mmgen.tools.main import main as mmgen


@pytest.fixture
def experiment(qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two steps of a tiny Qwen2.5-VL on toybox questions."""
    monkeypatch.chdir(tmp_path)
    source = "{class_path: ToyboxSource, init_args: {tasks: {short question: 1.0}, length: 8, held_out: %s}}"
    (tmp_path / "experiment.yaml").write_text(f"""
seed_everything: 7
model:
  class_path: VisualInstructionTuning
  init_args:
    encoder: {{class_path: Qwen25VLEncoder, init_args: {{pretrained: {qwen}, image_tokens: 16}}}}
    max_new_tokens: 3
    parameters:
      - {{match: encoder.vision, train: frozen}}
      - {{match: encoder.projector, train: frozen}}
      - {{match: encoder.language, train: lora, rank: 2, lr: 1.0e-1, target_modules: [q_proj, v_proj]}}
      - {{match: head, train: full, lr: 1.0e-1}}
data: {{class_path: VQADataModule, init_args: {{train: {source % "false"}, held_out: {source % "true"}, batch_size: 2}}}}
trainer:
  max_steps: 2
  accelerator: cpu
  limit_val_batches: 1
  num_sanity_val_steps: 0
  log_every_n_steps: 1
  enable_progress_bar: false
  logger: {{class_path: TensorBoardLogger, init_args: {{save_dir: runs, name: tiny}}}}
  callbacks:
    - {{class_path: AnswerEvaluation, init_args: {{every: 1, count: 5, batch_size: 2}}}}
    - {{class_path: LanguageEvaluation, init_args: {{count: 5, batch_size: 2}}}}
    - {{class_path: ModelCheckpoint, init_args: {{every_n_train_steps: 1, save_last: true, enable_version_counter: false}}}}
""")
    return tmp_path / "experiment.yaml"


def test_a_run_tells_accuracy_and_forgetting_and_its_checkpoint_answers_predicts_and_exports(
    experiment: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cli = main(["fit", "-c", str(experiment)])
    answers, language = (next(c for c in cli.trainer.callbacks if isinstance(c, kind)) for kind in (AnswerEvaluation, LanguageEvaluation))
    assert len(answers.before["accuracy"]) == 5
    (before,), (after,) = language.before["language"], language.after["language"]
    assert after != before
    printed = capsys.readouterr().out
    assert "answered word for word" in printed and f"{before:>16.3f}{after:>16.3f}" in printed
    assert {"loss/language", "loss", "data/bad_rows"} <= set(cli.trainer.callback_metrics)

    last = "runs/tiny/version_0/checkpoints/last.ckpt"
    module = load(last)
    assert isinstance(module, VisualInstructionTuning)
    for name, weight in cli.model.trainable().items():
        torch.testing.assert_close(module.get_parameter(name), weight, rtol=0, atol=0)
    with pytest.raises(ValueError, match="VisualInstructionTuning draws no pictures"):
        load_module(last)
    assert mmgen(["export", "--ckpt", last, "--out", "out"]) == 0
    plain = AutoModelForImageTextToText.from_pretrained("out")
    torch.testing.assert_close(plain.lm_head.weight, module.head.weight)
    assert not torch.equal(plain.lm_head.weight, AutoModelForImageTextToText.from_pretrained(module.encoder.pretrained).lm_head.weight)

    main(["predict", "-c", str(experiment), "--ckpt_path", last, "--return_predictions", "false"])
    (written,) = Path("runs").rglob("answers.jsonl")
    rows = [json.loads(line) for line in written.read_text().splitlines()]
    source = ToyboxSource({"short question": 1.0}, length=8, held_out=True)
    assert [(r["question"], r["answer"]) for r in rows] == [(f"[ref#1] {q.question}", q.answer) for q in source]
    assert all(isinstance(r["said"], str) for r in rows)


def test_the_language_score_is_the_mean_over_the_tokens_of_all_texts(vlm: Path) -> None:
    rows = [Row(name, "frozen") for name in ("encoder", "head")]
    module = VisualInstructionTuning(Idefics2Encoder(str(vlm), image_tokens=16), tuple(rows)).eval()
    module.configure_model()
    texts = ["a small red circle", "a toy"]
    with torch.no_grad():
        total, count = module.language_score(texts)
        surprise = []
        for text in texts:
            prompts = module.encoder.embed([text], [[]], [])
            logged = module(prompts)[0].log_softmax(-1)
            surprise += [-float(logged[i - 1, prompts.tokens[0, i]]) for i in range(1, prompts.lengths[0])]
    assert (total, count) == (pytest.approx(sum(surprise), rel=1e-5), len(surprise))


@pytest.mark.parametrize(
    ("said", "right", "same"), [("Red.", "red", True), (" on  the left", "on the left", True), ("red", "dark red", False), ("", "2", False)]
)
def test_answers_match_word_for_word(said: str, right: str, same: bool) -> None:
    assert exact_match(said, right) == same
