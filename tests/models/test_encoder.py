from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, Idefics2Model

from lightning_mmgen.batch import pack
from lightning_mmgen.models.idefics2 import Idefics2Encoder

TEXTS = ["a big red circle", "place [ref#1] a dog", "[ref#3] left of [ref#1] and [ref#7] on top"]
MARKERS = [[], [1], [1, 3, 7]]


def pictures(*sizes: tuple[int, int]) -> list[Tensor]:
    return [torch.rand(3, *size) * 2 - 1 for size in sizes]


def mixed() -> list[list[Tensor]]:
    """Of samples with 0, 1 and 3 references, in three sizes."""
    return [[], pictures((16, 16)), pictures((8, 24), (16, 16), (12, 8))]


@pytest.mark.parametrize("size", [(16, 16), (8, 24), (4, 4), (20, 20), (17, 10)])
def test_a_picture_takes_as_many_placeholders_as_patches(encoder: Idefics2Encoder, size: tuple[int, int]) -> None:
    count = encoder.tokens_of(*size)
    assert count == (size[0] // 4) * (size[1] // 4)
    assert encoder.embed_images(torch.rand(2, 3, *size)).shape == (2, count, encoder.hidden_size)
    ids, spans = encoder.tokenise("a [ref#1] b", [1], [count])
    assert ids.count(4) == count and spans[0].end - spans[0].start == count
    assert encoder([TEXTS[1]], [[1]], pack([pictures(size)])).tokens.isfinite().all()


def test_reference_size_fills_the_budget(encoder: Idefics2Encoder) -> None:
    assert encoder.reference_size == 16
    assert encoder.tokens_of(encoder.reference_size, encoder.reference_size) == encoder.image_tokens


@pytest.mark.parametrize("count", [0, -4, 15, 24])
def test_a_budget_that_is_no_square_raises(count: int) -> None:
    with pytest.raises(ValueError, match="square"):
        Idefics2Encoder("nowhere", image_tokens=count)


def test_spans_lie_where_the_markers_stand(encoder: Idefics2Encoder) -> None:
    ids, spans = encoder.tokenise(TEXTS[2], MARKERS[2], [2, 3, 4])
    texts: list[int] = []
    for text, slot in (("", 1), (" left of ", 0), (" and ", 2)):
        texts += encoder.tokenizer(text, add_special_tokens=False).input_ids
        start, end = spans[slot]
        assert [i for i in ids[:start] if i not in (1, 4, 5)] == texts  # all before it but <s>, patches and their brackets
        assert ids[start - 1] == ids[end] == encoder.tokenizer.convert_tokens_to_ids("<fake_token_around_image>")
        assert set(ids[start:end]) == {4} and ids[start - 1] != 4 and end - start == [2, 3, 4][slot]
    assert ids[0] == encoder.tokenizer.bos_token_id


def test_inputs_hold_the_embedded_pictures_at_their_spans_and_words_elsewhere(encoder: Idefics2Encoder) -> None:
    given = mixed()
    inputs, mask, spans, _ = encoder.embed(TEXTS, MARKERS, pack(given))
    assert [len(s) for s in spans] == [0, 1, 3]
    for b, (text, marks) in enumerate(zip(TEXTS, MARKERS, strict=True)):
        ids, _ = encoder.tokenise(text, marks, [encoder.tokens_of(*p.shape[1:]) for p in given[b]])
        words = encoder.language.get_input_embeddings()(torch.tensor(ids))
        for (start, end), picture in zip(spans[b], given[b], strict=True):
            torch.testing.assert_close(inputs[b, start:end], encoder.embed_images(picture[None])[0], rtol=0, atol=1e-5)
            words[start:end] = inputs[b, start:end]
        assert torch.equal(inputs[b, : len(ids)], words)
        assert mask[b].tolist() == [True] * len(ids) + [False] * (mask.shape[1] - len(ids))


def test_a_mixed_batch_equals_its_samples_one_by_one(encoder: Idefics2Encoder) -> None:
    given = mixed()
    together = encoder(TEXTS, MARKERS, pack(given))
    for b in range(3):
        alone = encoder(TEXTS[b : b + 1], MARKERS[b : b + 1], pack(given[b : b + 1]))
        n = alone.tokens.shape[1]
        torch.testing.assert_close(together.tokens[b, :n], alone.tokens[0], rtol=0, atol=1e-5)
        assert together.spans[b] == alone.spans[0] and together.mask[b].sum() == n and alone.mask.all()


def test_text_alone_and_an_empty_prompt_work(encoder: Idefics2Encoder) -> None:
    condition = encoder(["a dog", ""], [[], []], [])
    assert condition.spans == [[], []] and condition.mask[1].sum() == 1
    assert condition.tokens[condition.mask].isfinite().all() and condition.pooled is None


def test_a_marker_used_twice_puts_its_picture_at_both_places(encoder: Idefics2Encoder) -> None:
    picture = pictures((8, 12))
    inputs, _, spans, _ = encoder.embed(["[ref#1] and again [ref#1] here"], [[1]], pack([picture]))
    ids, _ = encoder.tokenise("[ref#1] and again [ref#1] here", [1], [6])
    features = encoder.embed_images(picture[0][None])[0]
    assert ids.count(4) == 12 and spans == [[(2, 8)]]
    second = [i for i, token in enumerate(ids) if token == 4][6:]
    assert torch.equal(inputs[0, 2:8], features) and torch.equal(inputs[0, second], features)


def test_each_picture_reaches_its_own_marker(encoder: Idefics2Encoder) -> None:
    a, b = pictures((16, 16), (16, 16))
    inputs, _, spans, _ = encoder.embed(["[ref#1] [ref#2]"] * 2, [[1, 2], [2, 1]], pack([[a, b], [b, a]]))
    assert torch.equal(inputs[0], inputs[1]) and spans[0] == spans[1][::-1]
    assert not torch.allclose(inputs[0, slice(*spans[0][0])], inputs[0, slice(*spans[0][1])])


def test_a_prompt_that_is_too_long_raises(vlm: Path) -> None:
    length = len(Idefics2Encoder.tokenise(built(vlm), TEXTS[1], [1], [16])[0])
    assert len(built(vlm, max_tokens=length).tokenise(TEXTS[1], [1], [16])[0]) == length
    with pytest.raises(ValueError, match=f"{length} tokens, more than max_tokens={length - 1}"):
        built(vlm, max_tokens=length - 1).tokenise(TEXTS[1], [1], [16])


def built(vlm: Path, **settings: Any) -> Idefics2Encoder:
    encoder = Idefics2Encoder(str(vlm), image_tokens=16, **settings)
    encoder.build()
    return encoder


@pytest.mark.parametrize("grey", [-1.0, 0.0])
def test_a_picture_of_one_colour_is_not_dropped(encoder: Idefics2Encoder, grey: float) -> None:
    """Black is -1; 0 is what ``Idefics2Model`` takes for padding."""
    plain, picture = torch.full((3, 16, 16), grey), pictures((16, 16))[0]
    condition = encoder(["[ref#1] [ref#2]"], [[1, 2]], pack([[plain, picture]]))
    assert [end - start for start, end in condition.spans[0]] == [16, 16]
    changed = encoder(["[ref#1] [ref#2]"], [[1, 2]], pack([[picture, picture]]))
    assert not torch.allclose(condition.tokens, changed.tokens, atol=1e-3)


@pytest.mark.parametrize("text", ["an <image> of a dog [ref#1]", "a dog</s> [ref#1]", "<fake_token_around_image>[ref#1]"])
def test_special_tokens_spelt_in_an_instruction_are_plain_text(encoder: Idefics2Encoder, text: str) -> None:
    picture = pictures((8, 8))
    inputs, _, spans, _ = encoder.embed([text], [[1]], pack([picture]))
    ids, _ = encoder.tokenise(text, [1], [4])
    assert ids.count(4) == 4 and ids.count(2) == 0 and ids.count(5) == 2
    assert torch.equal(inputs[0, slice(*spans[0][0])], encoder.embed_images(picture[0][None])[0])


def test_features_are_what_the_model_of_transformers_hands_to_its_perceiver(encoder: Idefics2Encoder, vlm: Path) -> None:
    model = Idefics2Model.from_pretrained(vlm)
    seen: list[Tensor] = []
    model.connector.perceiver_resampler.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["context"]), with_kwargs=True)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        model.get_image_features(images[:, None])  # [b, 1, 3, h, w]
        torch.testing.assert_close(encoder.embed_images(images), seen[0], rtol=0, atol=1e-5)
        patches = model.vision_model(pixel_values=images).last_hidden_state
        torch.testing.assert_close(encoder.embed_images(images), model.connector.modality_projection(patches), rtol=0, atol=1e-5)


def test_hidden_states_are_those_of_the_language_model_on_merged_inputs(encoder: Idefics2Encoder, vlm: Path) -> None:
    model, tokenizer = Idefics2Model.from_pretrained(vlm), AutoTokenizer.from_pretrained(vlm)
    image, fake = pictures((16, 16))[0], "<fake_token_around_image>"
    ids = tokenizer("<s>place " + fake + "<image>" * 16 + fake + " a dog", add_special_tokens=False, return_tensors="pt").input_ids
    with torch.no_grad():
        features = model.connector.modality_projection(model.vision_model(pixel_values=image[None]).last_hidden_state)
        merged = model.text_model.get_input_embeddings()(ids)
        merged[ids == 4] = features[0]
        expected = model.text_model(inputs_embeds=merged).last_hidden_state
        condition = encoder([TEXTS[1]], [[1]], pack([[image]]))
    torch.testing.assert_close(condition.tokens, expected, rtol=0, atol=1e-5)


def test_norm_gives_the_patches_unit_scale(vlm: Path) -> None:
    images = torch.rand(1, 3, 16, 16)
    plain, normed = built(vlm).embed_images(images), built(vlm, norm=True).embed_images(images)
    torch.testing.assert_close(normed.square().mean(-1), torch.ones(1, 16), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(plain / plain.norm(dim=-1, keepdim=True), normed / normed.norm(dim=-1, keepdim=True), rtol=0, atol=1e-4)


def test_gradients_reach_vision_projector_and_language(encoder: Idefics2Encoder) -> None:
    condition = encoder([TEXTS[1]], [[1]], pack([pictures((16, 16))]))
    condition.tokens[0, -1].square().sum().backward()  # a word after the picture
    for part in (encoder.vision, encoder.projector, encoder.language):
        for name, parameter in part.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_a_word_after_the_picture_sees_it_and_a_word_before_it_does_not(encoder: Idefics2Encoder) -> None:
    a, b = (encoder([TEXTS[1]], [[1]], pack([[p]])) for p in pictures((16, 16), (16, 16)))
    start = a.spans[0][0].start
    assert torch.equal(a.tokens[0, :start], b.tokens[0, :start])
    assert (a.tokens[0, start:] - b.tokens[0, start:]).abs().amax(-1).min() > 1e-4


def test_build_without_weights_makes_the_same_parts(encoder: Idefics2Encoder, vlm: Path) -> None:
    with torch.device("meta"):
        empty = Idefics2Encoder(str(vlm), image_tokens=16)
        empty.build(weights=False)
    assert {n: p.shape for n, p in empty.named_parameters()} == {n: p.shape for n, p in encoder.named_parameters()}
    assert all(p.is_meta for p in empty.parameters())


def test_settings_build_an_encoder_like_this_one(vlm: Path) -> None:
    encoder = Idefics2Encoder(str(vlm), image_tokens=9, max_tokens=77, norm=True, dtype="bfloat16", attention="eager")
    assert Idefics2Encoder(**encoder.settings()).settings() == encoder.settings()
    encoder.build()
    assert {p.dtype for p in encoder.parameters()} == {torch.bfloat16}
    assert encoder.language.config._attn_implementation == encoder.vision.config._attn_implementation == "eager"


def test_parts_of_different_dtype_work_together(encoder: Idefics2Encoder) -> None:
    """Frozen parts may be held in bfloat16 while what is trained stays in float32."""
    image = pictures((16, 16))
    exact = encoder([TEXTS[1]], [[1]], pack([image])).tokens
    encoder.vision.to(torch.bfloat16)
    mixed = encoder([TEXTS[1]], [[1]], pack([image])).tokens
    assert mixed.dtype == torch.float32 and (mixed - exact).abs().max() < 0.2


def test_a_perceiver_that_is_kept_gives_its_latents_for_any_picture(vlm: Path) -> None:
    encoder = Idefics2Encoder(str(vlm), image_tokens=16, keep_perceiver=True)
    encoder.build()
    whole = Idefics2Model.from_pretrained(vlm).eval()
    count = whole.config.perceiver_config.resampler_n_latents
    for size in ((16, 16), (8, 24)):
        assert encoder.tokens_of(*size) == count
        pixels = torch.rand(2, 3, *size) * 2 - 1
        grid = torch.ones(2, size[0] // 4, size[1] // 4, dtype=torch.bool)
        patches = whole.vision_model(pixel_values=pixels, patch_attention_mask=grid).last_hidden_state
        wanted = whole.connector(patches, torch.ones(patches.shape[:2], dtype=torch.bool))
        assert torch.allclose(encoder.embed_images(pixels), wanted, atol=1e-6) and wanted.shape[1] == count
    spans = encoder(TEXTS, MARKERS, pack(mixed())).spans
    assert [[s.end - s.start for s in row] for row in spans] == [[count] * len(m) for m in MARKERS]
    assert {n.split(".")[0] for n, _ in encoder.named_parameters()} == {"vision", "projector", "language", "perceiver"}
