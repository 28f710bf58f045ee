"""Fine-tuning of vision-language models on questions, against their models of ``transformers``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image as PILImage
from torch import Tensor
from transformers import AutoModelForImageTextToText, LlavaForConditionalGeneration

from lightning_mmgen.answering import VisualInstructionTuning
from lightning_mmgen.batch import QuestionBatch, pack
from lightning_mmgen.models.chat import Chat
from lightning_mmgen.models.encoder import Encoder, clip_normalised
from lightning_mmgen.models.idefics2 import Idefics2Encoder
from lightning_mmgen.models.llava import LlavaEncoder
from lightning_mmgen.models.mllama import MllamaEncoder
from lightning_mmgen.models.parameters import Row
from lightning_mmgen.models.qwen2_5_vl import Qwen25VLEncoder
from lightning_mmgen.prompt import RecordError
from lightning_mmgen.tools.export_vlm import export_vlm

KINDS: dict[str, type[Encoder]] = {"vlm": Idefics2Encoder, "qwen": Qwen25VLEncoder, "llava": LlavaEncoder, "mllama": MllamaEncoder}
CONFIGS = Path(__file__).parent / "configs"
QWEN = (CONFIGS / "qwen2.5-vl-7b" / "chat_template.jinja").read_text()
TEXT = "selectattr('type', 'equalto', 'text') %}{{ c['text'] + ' ' }}{% endfor %}{% endfor %}"
LLAVA = (
    "{% for m in messages %}{{ m['role'].upper() + ': ' }}{% for c in m['content'] | selectattr('type', 'equalto', 'image') %}<image>\n"
    "{% endfor %}{% for c in m['content'] | " + TEXT + "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
IDEFICS2 = (
    "{% for m in messages %}{{ m['role'].capitalize() }}{{ ':' if m['content'][0]['type'] == 'image' else ': ' }}"
    "{% for c in m['content'] %}{{ c['text'] if c['type'] == 'text' else '<image>' }}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
FROZEN = [Row(name, "frozen") for name in ("encoder.vision", "encoder.projector", "head")]
LORA = Row("encoder.language", "lora", lr=1e-3, rank=2, alpha=8, target_modules=["q_proj", "v_proj"])


def tuned(folder: Path, rows: list[Row] | None = None, by: float = 0.3, **settings: Any) -> VisualInstructionTuning:
    """A module whose trained weights have moved far from where they began."""
    kind = KINDS[next(name for name in KINDS if folder.name.startswith(name))]
    module = VisualInstructionTuning(kind(str(folder), image_tokens=16, **settings), tuple(rows or [*FROZEN, LORA]), max_new_tokens=5)
    module.configure_model()
    with torch.no_grad():
        for parameter in module.trainable().values():
            parameter.add_(torch.randn_like(parameter), alpha=by)
    return module.eval()


def questions(encoder: Encoder) -> QuestionBatch:
    """Two, of unequal lengths, about a picture each."""
    side = encoder.reference_size
    asked, answers = ["[ref#1] which colour?", "[ref#1] where is the big red circle on top?"], ["red", "on the left of it"]
    pictures = [[torch.randint(256, (3, side, side)) / 127.5 - 1] for _ in asked]
    return QuestionBatch(asked, [[1], [1]], pack(pictures), answers, ["a", "b"], torch.tensor([1, 2]))


@pytest.mark.parametrize(
    ("name", "template", "asked", "answered"),
    [
        ("vlm", None, "[ref#1] which colour?", "[ref#1] which colour? red</s>"),
        ("vlm", IDEFICS2, "User:[ref#1] which colour?<end_of_utterance>\nAssistant:", " red<end_of_utterance>"),
        ("llava", LLAVA, "USER: [ref#1]\n which colour? ASSISTANT:", " red</s>"),
        ("qwen", QWEN, "<|im_start|>user\n[ref#1] which colour?<|im_end|>\n<|im_start|>assistant\n", "red<|im_end|>"),
    ],
)
def test_questions_are_asked_as_the_models_template_asks_them(
    name: str, template: str | None, asked: str, answered: str, request: pytest.FixtureRequest
) -> None:
    encoder = KINDS[name](str(request.getfixturevalue(name)), image_tokens=16)
    if name == "qwen":
        encoder.tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    encoder.tokenizer.chat_template = template
    chat = Chat(encoder)
    assert chat.asked("[ref#1] which colour?", [1]).endswith(asked)
    whole = chat.answered("[ref#1] which colour?", [1], "red")
    assert whole == (answered if template is None else chat.asked("[ref#1] which colour?", [1]) + answered)
    assert chat.spoken(f" red{whole[-4:] if template is None else next(e for e in chat.ends if whole.endswith(e))} and more") == "red"
    if template is not None:
        ids, _ = encoder.tokenise(whole, [1], [3], special=True)
        before, after = encoder.spell(3)
        spelt = whole.replace("[ref#1]", f"{before}{encoder.image_token * 3}{after}")
        assert encoder.tokenizer.decode(ids) == f"<s>{spelt}"
        assert encoder.tokenizer.unk_token_id not in ids
        with pytest.raises(RecordError, match="special token"):
            chat.asked(f"what is {encoder.image_token}?", [])


@pytest.mark.parametrize("template", [None, LLAVA], ids=["plain", "chat"])
def test_the_loss_is_the_models_own_on_the_answers_tokens_alone(llava: Path, template: str | None) -> None:
    module = VisualInstructionTuning(LlavaEncoder(str(llava), image_tokens=16), (*FROZEN, LORA))
    module.encoder.tokenizer.chat_template = template
    module.configure_model()
    module.eval()
    batch, model = questions(module.encoder), LlavaForConditionalGeneration.from_pretrained(llava)
    step = module.answering_step(batch)
    assert [len(step.tokens[b][step.answered[b]]) for b in range(2)] == [
        len(module.encoder.tokenizer(f" {a}</s>", add_special_tokens=False, split_special_tokens=template is None).input_ids)
        for a in batch.answers
    ]
    labels = step.tokens.masked_fill(~step.answered, -100)
    with torch.no_grad():
        given = {"pixel_values": clip_normalised(batch.references[0].pixels), "attention_mask": step.prompts.mask.long()}
        expected = model(input_ids=step.tokens, **given, labels=labels).loss
    torch.testing.assert_close(module.loss(step)["language"].detach(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["qwen", "llava", "mllama"])
def test_a_greedy_answer_is_what_the_model_generates(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    module = tuned(request.getfixturevalue(name))
    batch = questions(module.encoder)
    together = module.answer(batch)
    merged = AutoModelForImageTextToText.from_pretrained(export_vlm(module, tmp_path / "out"))
    for b, text in enumerate(batch.instructions):
        picture = batch.references[0].pixels[b]
        ids = torch.tensor([module.encoder.tokenise(text, [1], module.encoder.counts([[1]], pack([[picture]]))[0])[0]])
        shown = own_pictures(name, picture, merged, ids[0])
        said = merged.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **shown, do_sample=False, max_new_tokens=5)
        assert together[b] == module.chat.spoken(module.encoder.tokenizer.decode(said[0, ids.shape[1] :]))
    assert len(set(together)) == 2


def test_gradients_reach_the_rows_of_the_table_and_the_head(qwen: Path) -> None:
    module = tuned(qwen, [*FROZEN[:2], LORA, Row("head", "full", lr=1e-3)]).train()
    loss = module.loss(module.answering_step(questions(module.encoder)))["language"]
    loss.backward()
    reached = {n for n, p in module.named_parameters() if p.grad is not None}
    assert reached == set(module.trainable()) == {n for n in reached if ".lora_" in n} | {"head.weight"}


def test_a_module_that_cannot_train_says_so(vlm: Path) -> None:
    with pytest.raises(ValueError, match="row 'head'"):
        VisualInstructionTuning(Idefics2Encoder(str(vlm), image_tokens=16), (LORA, Row("head", "lora", lr=1e-3)))
    with pytest.raises(ValueError, match=r"encoder\.mix"):
        VisualInstructionTuning(Idefics2Encoder(str(vlm), image_tokens=16, mix=0.3), (LORA,))


@pytest.mark.parametrize("name", ["qwen", "llava", "mllama"])
def test_the_export_is_the_same_model_in_plain_transformers(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    module = tuned(request.getfixturevalue(name), [*FROZEN[:2], LORA, Row("head", "full", lr=1e-3)])
    folder = export_vlm(module, tmp_path / "out")
    batch = questions(module.encoder)
    step = module.answering_step(batch)
    plain = AutoModelForImageTextToText.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert type(plain).__name__ == module.encoder.architecture and tokenizer.get_vocab() == module.encoder.tokenizer.get_vocab()
    again = VisualInstructionTuning(type(module.encoder)(str(folder), image_tokens=16), (*FROZEN, LORA))
    again.configure_model()
    with torch.no_grad():
        torch.testing.assert_close(again.eval().answering_step(batch).logits, step.logits, rtol=0, atol=2e-4)
        for b in range(2):
            n = step.prompts.lengths[b]
            ids = step.tokens[b : b + 1, :n]
            found = plain(input_ids=ids, **own_pictures(name, batch.references[0].pixels[b], plain, ids[0]))
            torch.testing.assert_close(found.logits[0], step.logits[b, :n], rtol=0, atol=2e-4)
    assert str(tmp_path) not in (folder / "config.json").read_text() and "vlm" not in (folder / "config.json").read_text()
    with pytest.raises(FileExistsError, match="not empty"):
        export_vlm(module, folder)


def own_pictures(name: str, pixels: Tensor, model: Any, ids: Tensor) -> dict[str, Tensor]:
    """A picture [3, h, w] as the model of ``transformers`` takes it."""
    shown = clip_normalised(pixels)
    if name == "llava":
        return {"pixel_values": shown[None]}
    if name == "mllama":
        tiles, first = torch.zeros(1, 1, 2, 3, 16, 16), torch.tensor([[[1, 0]]])
        tiles[0, 0, 0] = shown
        at = int((ids == model.config.image_token_id).nonzero())
        seen = torch.zeros(1, len(ids), 1, 2, dtype=torch.long)
        seen[:, at:, 0, 0] = 1
        return {"pixel_values": tiles, "aspect_ratio_ids": torch.tensor([[1]]), "aspect_ratio_mask": first, "cross_attention_mask": seen}
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    image = PILImage.fromarray(((pixels + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())
    given = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, min_pixels=64, max_pixels=10_000)([image], return_tensors="pt")
    kinds = (ids == model.config.image_token_id).int()[None]
    return {"pixel_values": given.pixel_values, "image_grid_thw": given.image_grid_thw, "mm_token_type_ids": kinds}


def test_an_idefics2_without_its_perceiver_is_exported_for_this_package_alone(
    vlm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = tuned(vlm)
    folder = export_vlm(module, tmp_path / "out")
    warning = capsys.readouterr().err.strip().splitlines()[-1]
    assert warning.startswith("warning: ") and "perceiver" in warning
    again = VisualInstructionTuning(Idefics2Encoder(str(folder), image_tokens=16), (*FROZEN, LORA))
    again.configure_model()
    batch = questions(module.encoder)
    torch.testing.assert_close(again.eval().answering_step(batch).logits, module.answering_step(batch).logits, rtol=0, atol=2e-4)
