"""Every vision-language encoder against its model of ``transformers``, at tiny size."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image as PILImage
from torch import Tensor
from transformers import (
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLModel,
)
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from lightning_mmgen.batch import pack
from lightning_mmgen.models.encoder import Encoder, clip_normalised
from lightning_mmgen.models.idefics2 import Idefics2Encoder
from lightning_mmgen.models.llava import LlavaEncoder
from lightning_mmgen.models.parameters import ParameterTable, Row
from lightning_mmgen.models.qwen2_5_vl import Qwen25VLEncoder
from lightning_mmgen.models.weights import locate

WIDE = {"initializer_range": 0.2}  # so that every input shows in the output
TEXT: dict[str, Any] = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, **WIDE}
TEXT |= {"num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3, "vocab_size": 520}
QWEN_TOKENS = ["<|image_pad|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>"]


def save_tokenizer(folder: Path, *more: str) -> Any:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(locate("toybox/vlm")) / name, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(list(more), special_tokens=True)
    tokenizer.save_pretrained(folder)
    return tokenizer


@pytest.fixture(scope="session")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Patches of 4 px, 2 x 2 of them a token, windows of 2 x 2 tokens but in the last layer."""
    folder = tmp_path_factory.mktemp("qwen")
    ids = dict(zip(QWEN_TOKENS, save_tokenizer(folder, *QWEN_TOKENS).convert_tokens_to_ids(QWEN_TOKENS), strict=True))
    vision = {"hidden_size": 16, "out_hidden_size": 24, "intermediate_size": 32, "depth": 2, "num_heads": 2, "patch_size": 4, **WIDE}
    vision |= {"window_size": 16, "fullatt_block_indexes": [1], "spatial_merge_size": 2, "temporal_patch_size": 2}
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [1, 1, 1]}
    config = Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_parameters": rope},
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    torch.manual_seed(0)
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Patches of 4 px; the last layer but one of three is read."""
    folder = tmp_path_factory.mktemp("llava")
    tokenizer = save_tokenizer(folder)
    vision = {"model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, **WIDE}
    vision |= {"num_attention_heads": 2, "image_size": 16, "patch_size": 4}
    text = {**TEXT, "model_type": "llama"}
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=tokenizer.convert_tokens_to_ids("<image>"))
    torch.manual_seed(0)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.fixture(params=["idefics2", "qwen2_5_vl", "llava"])
def any_encoder(request: pytest.FixtureRequest) -> Encoder:
    """Each encoder, with a budget of 16 tokens a picture."""
    kinds = {"idefics2": (Idefics2Encoder, "vlm"), "qwen2_5_vl": (Qwen25VLEncoder, "qwen"), "llava": (LlavaEncoder, "llava")}
    kind, folder = kinds[request.param]
    encoder = kind(str(request.getfixturevalue(folder)), image_tokens=16)
    encoder.build()
    return encoder


def picture(rows: int, columns: int, encoder: Encoder) -> Tensor:
    return torch.rand(3, rows * encoder.patch_size, columns * encoder.patch_size) * 2 - 1


@pytest.mark.parametrize("grid", [(4, 4), (2, 6), (1, 1), (5, 3), (3, 4)])
def test_a_picture_takes_as_many_tokens_as_placeholders(any_encoder: Encoder, grid: tuple[int, int]) -> None:
    shown = picture(*grid, any_encoder)
    count = any_encoder.tokens_of(*shown.shape[1:])
    assert count == grid[0] * grid[1]
    assert any_encoder.embed_images(shown[None]).shape == (1, count, any_encoder.hidden_size)
    ids, spans = any_encoder.tokenise("a [ref#1] b", [1], [count])
    assert ids.count(any_encoder.tokenizer.convert_tokens_to_ids(any_encoder.image_token)) == count
    assert spans[0].end - spans[0].start == count
    assert any_encoder(["a [ref#1] b"], [[1]], pack([[shown]])).tokens.isfinite().all()


def test_pictures_stand_where_their_markers_do(any_encoder: Encoder) -> None:
    first, second = picture(2, 3, any_encoder), picture(4, 4, any_encoder)
    prompts = any_encoder.embed(["place [ref#2] by [ref#1] and [ref#2]"], [[1, 2]], pack([[first, second]]))
    for (start, end), shown in zip(prompts.spans[0], (first, second), strict=True):
        torch.testing.assert_close(prompts.inputs[0, start:end], any_encoder.embed_images(shown[None])[0], rtol=0, atol=1e-5)
    assert [p[1:] for p in prompts.places[0]] == [(4, 4), (2, 3), (4, 4)]
    assert [prompts.places[0][1].start, prompts.places[0][0].start] == [s.start for s in prompts.spans[0]]
    again = prompts.places[0][2].start
    torch.testing.assert_close(prompts.inputs[0, again : again + 16], prompts.inputs[0, slice(*prompts.spans[0][1])], rtol=0, atol=0)


def test_a_ragged_batch_equals_its_samples_one_by_one(any_encoder: Encoder) -> None:
    texts, markers = ["a big red circle", "place [ref#1] a dog", "[ref#3] left of [ref#1] and [ref#7] on top", ""], [[], [1], [1, 3, 7], []]
    sizes = [[], [(4, 4)], [(2, 6), (4, 4), (3, 2)], []]
    given = [[picture(*s, any_encoder) for s in row] for row in sizes]
    together = any_encoder(texts, markers, pack(given))
    assert together.mask[3].sum() == 1  # an empty prompt is one token
    for b in range(4):
        alone = any_encoder(texts[b : b + 1], markers[b : b + 1], pack(given[b : b + 1]))
        n = alone.tokens.shape[1]
        torch.testing.assert_close(together.tokens[b, :n], alone.tokens[0], rtol=0, atol=2e-5)
        assert together.spans[b] == alone.spans[0] and together.mask[b].sum() == n and alone.mask.all()


def ids_of(encoder: Encoder, text: str, *grids: tuple[int, int]) -> Tensor:
    markers = list(range(1, len(grids) + 1))
    return torch.tensor([encoder.tokenise(text, markers, [r * c for r, c in grids])[0]])


def test_llava_reads_as_its_model_does(llava: Path) -> None:
    model, encoder = LlavaModel.from_pretrained(llava), LlavaEncoder(str(llava), image_tokens=16)
    encoder.build()
    shown, text = picture(4, 4, encoder), "place [ref#1] a dog"
    with torch.no_grad():
        expected = model(input_ids=ids_of(encoder, text, (4, 4)), pixel_values=clip_normalised(shown[None])).last_hidden_state
        torch.testing.assert_close(encoder([text], [[1]], pack([[shown]])).tokens, expected, rtol=0, atol=1e-5)
    assert len(encoder.vision.encoder.layers) == 2  # type: ignore[union-attr, arg-type]


def test_qwen_reads_as_its_model_and_its_picture_processor_do(qwen: Path) -> None:
    """Pictures of two sizes, whose patches, windows and three-dimensional positions the library makes by itself."""
    model, encoder = Qwen2_5_VLModel.from_pretrained(qwen), Qwen25VLEncoder(str(qwen), image_tokens=16)
    encoder.build()
    grids, text = ((4, 4), (2, 6)), "place [ref#2] by [ref#1] a dog"
    images = [PILImage.fromarray((torch.rand(r * 8, c * 8, 3) * 255).byte().numpy()) for r, c in grids]
    pixels = [torch.tensor(list(i.getdata())).view(i.height, i.width, 3).permute(2, 0, 1) / 127.5 - 1 for i in images]
    processor = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, min_pixels=64, max_pixels=10_000)
    given = processor([images[1], images[0]], return_tensors="pt")  # in the order of the text
    ids = ids_of(encoder, text, *grids)
    kinds = (ids == encoder.tokenizer.convert_tokens_to_ids("<|image_pad|>")).int()
    with torch.no_grad():
        expected = model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=given.pixel_values,
            image_grid_thw=given.image_grid_thw,
            mm_token_type_ids=kinds,
        ).last_hidden_state
        found = encoder([text], [[1, 2]], pack([pixels])).tokens
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def test_qwens_positions_are_the_librarys(qwen: Path) -> None:
    model, encoder = Qwen2_5_VLModel.from_pretrained(qwen), Qwen25VLEncoder(str(qwen), image_tokens=16)
    encoder.build()
    grids = ((5, 2), (1, 1), (2, 6))
    ids = ids_of(encoder, "[ref#2][ref#1] beside [ref#3]", *grids)
    kinds = (ids == encoder.tokenizer.convert_tokens_to_ids("<|image_pad|>")).int()
    grid = torch.tensor([[1, 2 * r, 2 * c] for r, c in (grids[1], grids[0], grids[2])])
    expected, _ = model.get_rope_index(ids, kinds, grid)
    shown = [picture(*g, encoder) for g in grids]
    prompts = encoder.embed(["[ref#2][ref#1] beside [ref#3]"], [[1, 2, 3]], pack([shown]))
    assert torch.equal(encoder.positions(prompts.mask, prompts.places)["position_ids"], expected)


class Root(torch.nn.Module):
    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder


@pytest.mark.parametrize("trained", ["projector", "language"])
def test_gradients_reach_exactly_the_rows_of_the_table(any_encoder: Encoder, trained: str) -> None:
    rows = [Row(f"encoder.{part}", "frozen") for part in ("vision", "projector", "language") if part != trained]
    table = ParameterTable([*rows, Row(f"encoder.{trained}", "lora", lr=1e-3), Row("codec", "frozen")])
    root = Root(any_encoder)
    root.codec = torch.nn.Linear(1, 1)
    table.apply(root, ["encoder"])
    root.encoder(["a [ref#1] toy"], [[1]], pack([[picture(4, 4, any_encoder)]])).tokens.square().sum().backward()
    reached = {n for n, p in root.named_parameters() if p.grad is not None}
    assert reached == {n for n, _ in table.states[2].parameters}
    assert reached and all(n.startswith(f"encoder.{trained}.") and "lora_" in n for n in reached)


def test_all_of_the_tower_that_is_there_takes_part(any_encoder: Encoder) -> None:
    any_encoder(["a [ref#1] toy"], [[1]], pack([[picture(4, 4, any_encoder)]])).tokens.square().sum().backward()
    idle = [n for n, p in any_encoder.named_parameters() if p.grad is None]
    assert all("post_layernorm" in n for n in idle)  # CLIP's, for its pooled vector


def test_settings_build_an_encoder_like_this_one(any_encoder: Encoder) -> None:
    again = type(any_encoder)(**any_encoder.settings())
    assert again.settings() == any_encoder.settings()
    with torch.device("meta"):
        again.build(weights=False)
    assert {n: p.shape for n, p in again.named_parameters()} == {n: p.shape for n, p in any_encoder.named_parameters()}
    parts = {n.split(".")[0] for n, _ in again.named_parameters()}
    assert parts == {"vision", "projector", "language"} <= set(again.transformers_names)


def test_the_parts_lie_in_the_model_of_transformers_where_their_names_say(any_encoder: Encoder, request: pytest.FixtureRequest) -> None:
    import transformers

    whole = getattr(transformers, any_encoder.architecture).from_pretrained(any_encoder.pretrained)
    names = sorted(any_encoder.transformers_names.items(), key=lambda pair: -len(pair[1]))
    for name, parameter in any_encoder.named_parameters():
        part, rest = name.split(".", 1)
        assert torch.equal(whole.get_parameter(f"{dict(names)[part]}.{rest}"), parameter), name


def test_a_model_of_another_architecture_is_refused(llava: Path) -> None:
    with pytest.raises(ValueError, match="is a LlavaForConditionalGeneration; Qwen25VLEncoder reads Qwen2_5_VL"):
        Qwen25VLEncoder(str(llava), image_tokens=16).build()


def test_clip_pixels_are_those_of_clips_own_processor() -> None:
    pixels = torch.rand(2, 3, 4, 4) * 2 - 1
    plain = [[((pixels[i, c] + 1) / 2 - OPENAI_CLIP_MEAN[c]) / OPENAI_CLIP_STD[c] for c in range(3)] for i in range(2)]
    torch.testing.assert_close(clip_normalised(pixels), torch.stack([torch.stack(p) for p in plain]))
