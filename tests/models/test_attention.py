"""Captured maps against eager attention, for every kind of model, padded and packed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention as UNetAttention
from diffusers.models.attention_processor import AttnAddedKVProcessor, AttnProcessor
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, MistralConfig, MistralModel, MllamaTextModel
from transformers.models.mllama.configuration_mllama import MllamaTextConfig

from lightning_mmgen.batch import Condition, pack
from lightning_mmgen.models import attention, packing
from lightning_mmgen.models.attention import captured, choose, grid_of, layers_of
from lightning_mmgen.models.encoder import Encoder, Prompts
from lightning_mmgen.models.packing import use_by_sample
from lightning_mmgen.models.unet import denoise

from .conftest import TEXT, picture

TEXTS, MARKERS = ["[ref#1] a big red circle", "a dog", "place [ref#2] left of [ref#1]"], [[1], [], [1, 2]]


@pytest.fixture(params=["padded", "packed"])
def layout(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each layout, whatever the lengths."""
    monkeypatch.setattr(packing, "is_ragged", lambda _: request.param == "packed")
    return str(request.param)


def prompts(encoder: Encoder) -> Prompts:
    return encoder.embed(TEXTS, MARKERS, pack([[picture(2, 3, encoder)], [], [picture(4, 4, encoder), picture(2, 3, encoder)]]))


def eager_maps(encoder: Encoder, read: Prompts) -> list[tuple[Tensor, ...]]:
    """The maps of each sample, read alone: of each layer [1, heads, n, n]."""
    positions = encoder.positions(read.mask, read.places)
    encoder.language.set_attn_implementation("eager")  # type: ignore[operator]
    out = []
    for b, n in enumerate(read.lengths):
        own = positions[..., b : b + 1, :n]
        alone = encoder.language(inputs_embeds=read.inputs[b : b + 1, :n], position_ids=own, output_attentions=True, use_cache=False)
        out.append(alone.attentions)
    return out


@pytest.mark.parametrize("kind", ["sdpa_by_sample", "sdpa", "eager"])
def test_rows_of_a_language_model_are_those_of_eager_attention(any_encoder: Encoder, layout: str, kind: str) -> None:
    read = prompts(any_encoder)
    any_encoder.language.set_attn_implementation(kind)  # type: ignore[operator]
    plain = any_encoder.read(read)
    with captured(any_encoder.language) as maps:
        assert torch.equal(any_encoder.read(read), plain)
    sample, query = torch.tensor([2, 0, 2, 1]), torch.tensor([9, 5, read.lengths[2] - 1, 0])
    expected = eager_maps(any_encoder, read)
    for name, layer in (("layers.0.self_attn", 0), ("layers.1.self_attn", 1)):
        rows = maps[name].rows(sample, query)
        assert rows.shape == (4, 4, max(read.lengths)) and maps[name].size == (3, rows.shape[2], rows.shape[2])
        assert len(maps[name].keys) == (1 if layout == "packed" else 3)
        for i, (b, q) in enumerate(zip(sample.tolist(), query.tolist(), strict=True)):
            n = read.lengths[b]
            torch.testing.assert_close(rows[i, :, :n], expected[b][layer][0, :, q], rtol=0, atol=1e-5)
            assert not rows[i, :, n:].any()


def test_columns_of_a_packed_language_model_are_those_of_its_rows(any_encoder: Encoder, layout: str) -> None:
    read = prompts(any_encoder)
    with captured(any_encoder.language, [-1]) as maps:
        any_encoder.read(read)
    (record,) = maps.values()
    columns = record.columns(torch.tensor([0, 2]), torch.tensor([3, 4]))
    for i, (b, k) in enumerate([(0, 3), (2, 4)]):
        n = read.lengths[b]
        rows = record.rows(torch.full((n,), b), torch.arange(n))  # [n, heads, m]
        torch.testing.assert_close(columns[i, :, :n], rows[:, :, k].T)


def test_gradients_reach_the_layer_through_the_map_alone(any_encoder: Encoder, layout: str) -> None:
    with captured(any_encoder.language, ["*.1.*"]) as maps:
        any_encoder.read(prompts(any_encoder))
    maps["layers.1.self_attn"].rows(torch.tensor([0]), torch.tensor([8]))[..., 2].sum().backward()
    trained = {name for name, p in any_encoder.language.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert {f"layers.1.self_attn.{x}_proj.weight" for x in "qk"} < trained
    assert not {f"layers.1.self_attn.{x}_proj.weight" for x in "vo"} & trained


@pytest.mark.parametrize("packed", [False, True])
def test_a_sliding_window_hides_what_lies_before_it(packed: bool) -> None:
    text = {k: v for k, v in TEXT.items() if k not in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model = MistralModel(MistralConfig(**text, sliding_window=3)).eval()
    x, lengths = torch.randn(2, 7, 24), [7, 4]
    model.set_attn_implementation("eager")
    expected = [model(inputs_embeds=x[b : b + 1, :n], output_attentions=True).attentions[1][0] for b, n in enumerate(lengths)]
    model.set_attn_implementation("sdpa")
    use_by_sample(model)
    with captured(model, ["layers.1.*"]) as maps:
        if packed:
            row = torch.cat([x[0, :7], x[1, :4]])[None]
            model(inputs_embeds=row, position_ids=torch.tensor([[*range(7), *range(4)]]), lengths=lengths)
        else:
            model(inputs_embeds=x)
    rows = maps["layers.1.self_attn"].rows(torch.tensor([0, 1]), torch.tensor([6, 3]))
    torch.testing.assert_close(rows[0], expected[0][:, 6], rtol=0, atol=1e-5)
    torch.testing.assert_close(rows[1, :, :4], expected[1][:, 3], rtol=0, atol=1e-5)
    assert not rows[0, :, :4].any()


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
def test_rows_of_mllamas_cross_attention_are_shares_of_its_vision_tokens(kind: str) -> None:
    text = {**TEXT, "num_hidden_layers": 3, "cross_attention_layers": [1]}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 10_000.0}
    model = MllamaTextModel(MllamaTextConfig(**text)).eval()
    with torch.no_grad():
        model.layers[1].cross_attn_attn_gate.fill_(1)
    seen = torch.ones(2, 1, 6, 10, dtype=torch.bool)
    seen[0, :, 3:, :4] = False
    given: dict[str, Any] = {
        "input_ids": torch.randint(10, 500, (2, 6)),
        "cross_attention_states": torch.randn(2, 10, 24),
        "cross_attention_mask": torch.where(seen, 0.0, torch.finfo(torch.float32).min),
        "full_text_row_masked_out_mask": torch.ones(2, 1, 6, 1),
        "use_cache": False,
    }
    eager: list[Tensor] = []
    model.set_attn_implementation("eager")
    hook = model.layers[1].cross_attn.register_forward_hook(lambda _m, _i, out: eager.append(out[1]))
    model(**given)
    hook.remove()
    model.set_attn_implementation(kind)
    with captured(model, ["*.cross_attn"]) as maps:
        model(**given)
    rows = maps["layers.1.cross_attn"].rows(torch.tensor([0, 1, 0]), torch.tensor([5, 5, 2]))
    torch.testing.assert_close(rows, eager[0][[0, 1, 0], :, [5, 5, 2]], rtol=0, atol=1e-5)
    assert not rows[0, :, :4].any() and rows[1].all()


@pytest.fixture(params=["sd15_unet", "unet"])
def any_unet(request: pytest.FixtureRequest) -> UNet2DConditionModel:
    """SD1.5-shaped and SDXL-shaped; keys far enough apart for maps that are not flat."""
    unet: UNet2DConditionModel = request.getfixturevalue(request.param)
    for module in layers_of(unet).values():
        nn.init.normal_(module.to_k.weight)  # type: ignore[arg-type, union-attr]
    return unet


def condition(unet: UNet2DConditionModel) -> Condition:
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    pooled = torch.randn(2, 12) if unet.config["addition_embed_type"] else None
    return Condition(torch.randn(2, 5, 16), mask, [[], []], pooled)


def slow_maps(unet: UNet2DConditionModel, run: Any) -> dict[str, Tensor]:
    """By the library's own scores, of every cross-attention layer [b, heads, pixels, tokens]."""
    out = {}

    def hook(name: str) -> Any:
        def look(attn: Any, args: Any, given: dict[str, Any]) -> None:
            hidden, words = (x if x is not None else args[0] for x in (given.get("hidden_states"), given["encoder_hidden_states"]))
            mask = attn.prepare_attention_mask(given["attention_mask"], words.shape[1], len(words))
            q, k = attn.head_to_batch_dim(attn.to_q(hidden)), attn.head_to_batch_dim(attn.to_k(words))
            out[name] = attn.get_attention_scores(q, k, mask).unflatten(0, (-1, attn.heads))

        return look

    hooks = [m.register_forward_pre_hook(hook(n), with_kwargs=True) for n, m in layers_of(unet).items()]
    run()
    for h in hooks:
        h.remove()
    return out


def test_columns_of_a_unet_are_the_maps_of_its_words(any_unet: UNet2DConditionModel, monkeypatch: pytest.MonkeyPatch) -> None:
    told, z = condition(any_unet), torch.randn(2, 4, 8, 12)

    def run() -> Tensor:
        return denoise(any_unet, z, torch.tensor([7, 500]), told, (16, 24))

    expected, plain = slow_maps(any_unet, run), run()
    sample, key = torch.tensor([1, 0, 1]), torch.tensor([2, 4, 0])
    for kind in (None, AttnProcessor()):
        if kind is not None:
            any_unet.set_attn_processor(kind)
        with captured(any_unet) as maps:
            torch.testing.assert_close(run(), plain)
        assert maps.keys() == expected.keys() and len(maps) == 4 and all(name.endswith("attn2") for name in maps)
        for name, record in maps.items():
            torch.testing.assert_close(record.columns(sample, key), expected[name][sample, :, :, key], rtol=0, atol=1e-5)
            assert not record.rows(torch.tensor([1]), torch.tensor([3]))[..., 3:].any()
    record = maps[next(iter(maps))]
    whole = record.columns(sample, key)
    weight = any_unet.get_submodule(next(iter(maps))).to_k.weight  # type: ignore[union-attr]
    (gradient,) = torch.autograd.grad(whole[..., 0].sum(), weight, retain_graph=True)
    monkeypatch.setattr(attention, "BUDGET", 7 * 2 * record.queries.shape[1] * 5)  # seven pixels at a time
    parts = record.columns(sample, key)
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(torch.autograd.grad(parts[..., 0].sum(), weight)[0], gradient)


def test_a_level_of_a_unet_has_the_latents_proportions() -> None:
    assert [grid_of(n, (9, 12)) for n in (108, 30, 9)] == [(9, 12), (5, 6), (3, 3)]
    with pytest.raises(ValueError, match="no level of latents of 8 x 8 has 12 pixels"):
        grid_of(12, (8, 8))


def test_layers_are_chosen_by_name_by_pattern_or_by_place() -> None:
    names = [f"layers.{i}.self_attn" for i in range(12)]
    assert choose(names, None) == names
    assert choose(names, [-1, "layers.1.*", 0, "layers.0.self_attn"]) == [names[0], names[1], names[11]]
    for wrong in (12, -13, "layers.12.*"):
        with pytest.raises(ValueError, match=r"no attention layer .*12.* there are 12, layers.0.self_attn to layers.11.self_attn|-13"):
            choose(names, [wrong])


def test_captures_lie_within_one_another_and_leave_nothing_behind(encoder: Encoder) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    with captured(encoder.language, [0]) as outer:
        with captured(encoder.language, [1]) as inner:
            encoder.read(prompts(encoder))
        assert list(outer) == ["layers.0.self_attn"] and list(inner) == ["layers.1.self_attn"]
        outer.clear()
        encoder.read(prompts(encoder))
        assert list(outer) == ["layers.0.self_attn"]
    assert ALL_ATTENTION_FUNCTIONS[packing.BY_SAMPLE] is packing.language_attention
    with pytest.raises(RuntimeError, match="stop"), captured(encoder.language):
        raise RuntimeError("stop")
    assert ALL_ATTENTION_FUNCTIONS[packing.BY_SAMPLE] is packing.language_attention and not ALL_ATTENTION_FUNCTIONS._local_mapping


def test_what_cannot_be_captured_is_an_error_that_names_the_model(encoder: Encoder, unet: UNet2DConditionModel) -> None:
    with pytest.raises(ValueError, match="CLIPVisionModel has no attention layer"):
        layers_of(CLIPVisionModel(CLIPVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)))
    encoder.language.config._attn_implementation = "flex_attention"  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="MistralModel: maps of attention 'flex_attention'"), captured(encoder.language):
        pass
    encoder.language.config._attn_implementation = "sdpa"  # type: ignore[union-attr]
    read = prompts(encoder)
    with pytest.raises(ValueError, match="MistralModel: maps of MistralAttention with softcap"), captured(encoder.language):
        encoder.language(inputs_embeds=read.inputs, softcap=30.0)
    name, layer = next(iter(layers_of(unet).items()))
    assert isinstance(layer, UNetAttention)
    layer.processor = AttnAddedKVProcessor()
    with pytest.raises(ValueError, match=f"UNet2DConditionModel: maps of {name} with the processor AttnAddedKVProcessor"), captured(unet):
        pass
