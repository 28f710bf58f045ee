"""Mllama, whose pictures enter by cross-attention, against its model and its processor of ``transformers``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as PILImage
from transformers import MllamaForConditionalGeneration
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil
from transformers.models.mllama.processing_mllama import convert_sparse_cross_attention_mask_to_dense, get_cross_attention_token_mask

from lightning_mmgen.batch import pack
from lightning_mmgen.models.encoder import Place
from lightning_mmgen.models.mllama import MllamaEncoder
from lightning_mmgen.models.parameters import ParameterTable, Row

from .conftest import picture


class Root(torch.nn.Module):
    def __init__(self, encoder: MllamaEncoder, head: torch.nn.Module) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head
        self.codec = torch.nn.Linear(1, 1)


@pytest.fixture
def root(mllama: Path) -> Root:
    encoder = MllamaEncoder(str(mllama), image_tokens=16)
    return Root(encoder, encoder.build())


@pytest.mark.parametrize("text", ["place [ref#1] a dog", "[ref#1]which colour?", "[ref#2][ref#1] beside [ref#2] on top"])
def test_its_scores_are_those_of_its_model_and_its_processor(root: Root, mllama: Path, text: str) -> None:
    """Of pictures of one tile, which the library fits, fills up to two tiles, and hides from the words before them by itself."""
    encoder, model = root.encoder, MllamaForConditionalGeneration.from_pretrained(mllama)
    markers = [k for k in (1, 2) if f"[ref#{k}]" in text]
    images = {k: PILImage.fromarray((torch.rand(16, 16, 3) * 255).byte().numpy()) for k in markers}
    shown = [torch.from_numpy(np.array(images[k])).permute(2, 0, 1) / 127.5 - 1 for k in markers]
    as_published = {"image_mean": OPENAI_CLIP_MEAN, "image_std": OPENAI_CLIP_STD}
    processor = MllamaImageProcessorPil(max_image_tiles=2, size={"height": 16, "width": 16}, **as_published)
    given = processor([[images[int(k)] for k in text if k in "12"]], return_tensors="pt")
    ids, _ = encoder.tokenise(text, markers, [1] * len(markers))
    token = encoder.tokenizer.convert_tokens_to_ids("<|image|>")
    sparse = [get_cross_attention_token_mask(ids, token)]
    dense = convert_sparse_cross_attention_mask_to_dense(sparse, [[1] * len(sparse[0])], 2, len(ids))
    with torch.no_grad():
        expected = model(
            input_ids=torch.tensor([ids]),
            pixel_values=given.pixel_values,
            aspect_ratio_ids=given.aspect_ratio_ids,
            aspect_ratio_mask=given.aspect_ratio_mask,
            cross_attention_mask=torch.from_numpy(dense),
        ).logits
        blind = model(input_ids=torch.tensor([ids])).logits
        found = root.head(encoder([text], [markers], pack([shown])).tokens)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    assert (found - blind).abs().max() > 0.01


def test_a_prompt_is_read_alike_beside_any_others(root: Root) -> None:
    encoder = root.encoder
    texts, markers = ["a big red circle", "place [ref#1] a dog", "[ref#3] left of [ref#1] on top", ""], [[], [1], [1, 3], []]
    given = [[picture(4, 4, encoder) for _ in of] for of in markers]
    together = encoder(texts, markers, pack(given))
    for b in range(4):
        alone = encoder(texts[b : b + 1], markers[b : b + 1], pack(given[b : b + 1]))
        torch.testing.assert_close(together.tokens[b, : alone.tokens.shape[1]], alone.tokens[0], rtol=0, atol=2e-5)


def test_the_columns_of_its_attention_that_are_patches_lie_where_prompts_say(root: Root) -> None:
    encoder = root.encoder
    shown = [picture(4, 4, encoder), picture(4, 4, encoder)]
    prompts = encoder.embed(["[ref#2] by [ref#1]", "a [ref#1] b"], [[1, 2], [1]], pack([shown, shown[:1]]))
    assert prompts.pictures is not None and prompts.pictures.shape == (2, 2 * 2 * 17, 24)  # two tiles of 16 patches and a class token
    assert prompts.columns == [[Place(1, 4, 4), Place(35, 4, 4)], [Place(1, 4, 4)]]
    assert [[p[1:] for p in of] for of in prompts.places] == [[(1, 1), (1, 1)], [(1, 1)]]
    second = shown[1].clone()
    second[:, 4:8, 8:12] += 0.5  # the patch in row 1, column 2
    states, changed = (encoder.embed_images(p[None])[0, 1:17, :24] for p in (shown[1], second))
    assert int((states - changed).norm(dim=-1).argmax()) == 1 * 4 + 2


@pytest.mark.parametrize("trained", ["projector", "language"])
def test_gradients_reach_exactly_the_rows_of_the_table(root: Root, trained: str) -> None:
    rows = [Row(f"encoder.{part}", "frozen") for part in ("vision", "projector", "language") if part != trained]
    lora = Row(f"encoder.{trained}", "lora", lr=1e-3, target_modules=["q_proj", "v_proj"] if trained == "language" else None)
    table = ParameterTable([*rows, lora, Row("head", "frozen"), Row("codec", "frozen")])
    table.apply(root, ["encoder"])
    encoded = root.encoder(["a [ref#1] toy"], [[1]], pack([[picture(4, 4, root.encoder)]]))
    root.head(encoded.tokens).square().sum().backward()
    reached = {n for n, p in root.named_parameters() if p.grad is not None}
    assert reached == {n for n, _ in table.states[2].parameters}
    assert reached and all(n.startswith(f"encoder.{trained}.") and "lora_" in n for n in reached)
    assert trained == "projector" or any("cross_attn.q_proj" in n for n in reached)


def test_a_picture_of_another_size_is_an_error(root: Root) -> None:
    with pytest.raises(ValueError, match=r"reads pictures of 16 x 16 px \(image_tokens: 16\), not of 20 x 16"):
        root.encoder(["a [ref#1] toy"], [[1]], pack([[picture(4, 5, root.encoder)]]))
