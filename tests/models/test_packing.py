"""Ragged batches, padded and packed: the same as their samples one by one, and none sees padding or a neighbour."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import pytest
import torch
from torch import Tensor
from transformers import MistralConfig, MistralModel

from lightning_mmgen.batch import Batch, Condition, PackedImages, pack
from lightning_mmgen.diffusion import Diffusion
from lightning_mmgen.models import packing
from lightning_mmgen.models.adapter import AdapterConfig
from lightning_mmgen.models.codec import CodecConfig
from lightning_mmgen.models.encoder import Encoder
from lightning_mmgen.models.packing import Layout, is_ragged, use_by_sample
from lightning_mmgen.models.parameters import Row
from lightning_mmgen.models.unet import UNetConfig
from lightning_mmgen.module import MultimodalDiffusion

from .conftest import picture

TEXTS = ["", "a big red circle", "place [ref#1] a dog", "[ref#4] left of [ref#2]", "[ref#3] [ref#1] over [ref#2] and [ref#5] on top"]
MARKERS = [[], [], [1], [2, 4], [1, 2, 3, 5]]
GRIDS = [[], [], [(4, 4)], [(2, 6), (4, 4)], [(4, 4), (3, 2), (2, 6), (1, 1)]]


@pytest.fixture(params=["padded", "packed"])
def layout(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each layout, whatever the lengths."""
    monkeypatch.setattr(packing, "is_ragged", lambda _: request.param == "packed")
    return str(request.param)


def pictures(encoder: Encoder) -> list[list[Tensor]]:
    return [[picture(*grid, encoder) for grid in grids] for grids in GRIDS]


@pytest.mark.parametrize(
    ("lengths", "packed"),
    [
        ([7], False),
        ([30] * 8, False),
        ([100, 91, 92, 93], False),  # 400 for 376
        ([100, 80, 80, 80], True),  # 400 for 340
        ([1, 1, 1, 40], True),
        ([1300] + [20] * 7, True),
        ([1300] * 4 + [20] * 4, True),
    ],
)
def test_lengths_alone_choose_the_layout(lengths: list[int], packed: bool) -> None:
    assert is_ragged(lengths) == packed
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    assert Layout.of(mask, lengths) == (mask, lengths if packed else None)
    assert Layout.of(mask, None).lengths is None


def test_a_packed_row_holds_the_real_tokens_in_order_and_comes_back_with_zeros() -> None:
    mask = torch.tensor([[True] * 3 + [False], [True] + [False] * 3, [True] * 4])
    x, layout = torch.arange(1.0, 25).view(3, 4, 2), Layout(mask, [3, 1, 4])
    assert torch.equal(layout.pack(x), x[mask][None])
    assert torch.equal(layout.pack(x.movedim(2, 0), 1), layout.pack(x).movedim(2, 0))
    assert torch.equal(layout.unpack(layout.pack(x)), x * mask[..., None])
    assert Layout(mask, None).pack(x) is x and Layout(mask, None).unpack(x) is x


def test_both_layouts_attend_as_the_formula_says() -> None:
    lengths, (q, k, v) = [4, 1, 6], torch.randn(3, 3, 2, 6, 5)
    mask = torch.arange(6) < torch.tensor(lengths)[:, None]
    padded = Layout(mask, None).attend(q, k, v).transpose(1, 2)
    packed = Layout(mask, lengths)
    row = packed.attend(*(packed.pack(x.transpose(1, 2)).transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    for b, (n, own) in enumerate(zip(lengths, row[0].split(lengths), strict=True)):
        expected = torch.softmax(q[b, :, :n] @ k[b, :, :n].mT / 5**0.5, -1) @ v[b, :, :n]
        torch.testing.assert_close(own.transpose(0, 1), expected)
        torch.testing.assert_close(padded[b, :n].transpose(0, 1), expected)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("lengths", [None, [5, 1, 2, 8]])
def test_a_language_model_reads_packed_samples_as_transformers_masks_them(window: int | None, lengths: list[int] | None) -> None:
    """The library's own mask, block-diagonal where positions start again, over all pairs of tokens."""
    size = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = MistralModel(MistralConfig(**size, vocab_size=10, sliding_window=window, attn_implementation="sdpa", initializer_range=0.2))
    positions = torch.cat([torch.arange(n) for n in lengths or [16]])[None]
    given = {"inputs_embeds": torch.randn(1, 16, 24), "position_ids": positions, "use_cache": False}
    padding = {"attention_mask": torch.tensor([[0] * 3 + [1] * 13])}  # on the left, as other users of the model may have it
    expected, padded = (model(**given, **more).last_hidden_state for more in ({}, padding))
    use_by_sample(model)
    assert model.config._attn_implementation == packing.BY_SAMPLE
    torch.testing.assert_close(model(**given, lengths=lengths).last_hidden_state, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(model(**given, **padding).last_hidden_state, padded)


def test_other_attention_of_transformers_tells_samples_apart_by_their_positions(any_encoder: Encoder, layout: str) -> None:
    given = pack(pictures(any_encoder))
    expected = any_encoder(TEXTS, MARKERS, given)
    any_encoder.language.set_attn_implementation("eager")  # type: ignore[operator]
    found = any_encoder(TEXTS, MARKERS, given)
    torch.testing.assert_close(found.tokens[found.mask], expected.tokens[expected.mask], rtol=0, atol=2e-5)


def module_of(encoder: Encoder, parts: Path) -> MultimodalDiffusion:
    """The tiny parts around this encoder, all but the codec trained."""
    rows = [Row(name, "full", lr=1e-3) for name in ("encoder", "adapter", "unet")]
    unet, codec = UNetConfig(str(parts / "unet"), None), CodecConfig(str(parts / "vae"), None)
    module = MultimodalDiffusion(encoder, AdapterConfig(2, 2, 8), unet, codec, (*rows, Row("codec", "frozen")), Diffusion("v_prediction"))
    module.configure_model()
    module.trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    return module


def losses_and_gradients(module: MultimodalDiffusion, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    module.zero_grad()
    loss = module.loss(module.denoising_step(batch))["diffusion"]
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


def test_a_ragged_batch_has_the_loss_and_the_gradients_of_its_samples(any_encoder: Encoder, layout: str, parts: Path) -> None:
    """Samples of 0, 0, 1, 2 and 4 references in four sizes; each sample's noise comes from its own seed."""
    module = module_of(any_encoder, parts)
    shown, target, seeds = pictures(module.encoder), torch.rand(5, 3, 16, 16) * 2 - 1, torch.arange(5)

    def batch(*samples: int) -> Batch:
        texts, markers, own = ([x[b] for b in samples] for x in (TEXTS, MARKERS, shown))
        return Batch(texts, markers, pack(own), target[list(samples)], [""] * len(samples), [""] * len(samples), seeds[list(samples)])

    together, gradients = losses_and_gradients(module, batch(*range(5)))
    alone = [losses_and_gradients(module, batch(b)) for b in range(5)]
    torch.testing.assert_close(together, torch.stack([loss for loss, _ in alone]).mean(), rtol=1e-5, atol=1e-5)
    assert torch.stack([loss for loss, _ in alone]).std() > 0.01
    for name, gradient in gradients.items():
        expected = sum(g.get(name, torch.zeros_like(gradient)) for _, g in alone) / 5
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5, msg=name)
    assert {"encoder.language.embed_tokens.weight", "adapter.project_in.weight", "unet.conv_in.weight"} < set(gradients)


def test_what_changes_in_one_sample_moves_no_other(any_encoder: Encoder, layout: str, parts: Path) -> None:
    """Bit for bit, in the encoder and in the adapter; nor does what stands in the place of padding."""
    adapter = AdapterConfig(2, 2, 8).build(24, 16, 12)
    shown = pictures(any_encoder)
    other = [*shown[:3], [picture(*grid, any_encoder) for grid in GRIDS[3]], shown[4]]
    with torch.no_grad():
        one, two = (any_encoder(TEXTS, MARKERS, pack(p)) for p in (shown, other))
        filled = any_encoder.embed(TEXTS, MARKERS, pack(shown))
        filled = filled._replace(inputs=torch.where(filled.mask[..., None], filled.inputs, 1e3))
        assert torch.equal(any_encoder.read(filled)[one.mask], one.tokens[one.mask])
        after = adapter(one), adapter(two), adapter(one._replace(tokens=torch.where(one.mask[..., None], one.tokens, 1e3)))
    for b in range(5):
        for first, second in ((one, two), after[:2]):
            assert torch.equal(first.tokens[b, one.mask[b]], second.tokens[b, one.mask[b]]) == (b != 3)
            assert first.pooled is None or second.pooled is None or torch.equal(first.pooled[b], second.pooled[b]) == (b != 3)
    torch.testing.assert_close(after[2].tokens[one.mask], after[0].tokens[one.mask], rtol=0, atol=1e-6)


def test_the_language_model_is_run_once_on_as_many_tokens_as_there_are(any_encoder: Encoder, layout: str) -> None:
    """Once in either layout: under FSDP, ranks that chose differently would wait for each other."""
    seen: list[tuple[int, ...]] = []
    any_encoder.language.register_forward_pre_hook(lambda _, args, given: seen.append(given["inputs_embeds"].shape), with_kwargs=True)
    mask = any_encoder(TEXTS, MARKERS, pack(pictures(any_encoder))).mask
    assert seen == [((1, int(mask.sum())) if layout == "packed" else tuple(mask.shape)) + (24,)]


def test_the_vision_tower_is_given_the_pictures_own_pixels_and_no_others(any_encoder: Encoder) -> None:
    seen: list[Tensor] = []

    def note(_: object, args: tuple[Tensor, ...], given: dict[str, Tensor]) -> None:
        seen.append(given["pixel_values"] if "pixel_values" in given else args[0])

    any_encoder.vision.register_forward_pre_hook(note, with_kwargs=True)
    shown = pictures(any_encoder)
    any_encoder(TEXTS, MARKERS, pack(shown))
    own = [image for row in shown for image in row]
    frames = 2 if "Qwen" in any_encoder.architecture else 1  # a still picture is a film of two frames
    assert sum(x.numel() for x in seen) == frames * sum(image.numel() for image in own)
    assert len(seen) == len({image.shape for image in own}) == 4  # one group a size
    if frames == 1:
        assert sorted(tuple(x.shape[1:]) for x in seen) == sorted({tuple(image.shape) for image in own})


def test_no_references_at_all_work_in_both_layouts(any_encoder: Encoder, layout: str) -> None:
    none: list[PackedImages] = []
    both: Condition = any_encoder(TEXTS[:2], MARKERS[:2], none)
    alone: Condition = any_encoder(TEXTS[1:2], MARKERS[1:2], none)
    torch.testing.assert_close(both.tokens[1:], alone.tokens, rtol=0, atol=1e-5)
    assert both.mask.sum(1).tolist() == [1, alone.mask.shape[1]]
