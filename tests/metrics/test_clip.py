from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as PILImage
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPModel

from lightning_mmgen.metrics import CLIPSimilarity, PickScore
from lightning_mmgen.pipeline import to_pil

from ..conftest import CLIP_WORDS

CAPTIONS = ["a red cat", "a blue box on a star", "green"]


@pytest.fixture
def pictures() -> Tensor:
    return torch.rand(3, 3, 16, 16) * 2 - 1


@torch.no_grad()
def plain(clip: Path, pictures: Tensor, captions: list[str]) -> list[float]:
    """Pair by pair: CLIP's own picture processor, its two towers, the cosine. Texts are spelt by hand."""
    model = CLIPModel.from_pretrained(clip)
    processor = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    out = []
    for picture, caption in zip(to_pil(pictures), captions, strict=True):
        values = processor(picture, return_tensors="pt").pixel_values
        ids = torch.tensor([[2, *(CLIP_WORDS.index(w) for w in caption.split()), 3]])
        image, text = model.get_image_features(pixel_values=values), model.get_text_features(input_ids=ids)
        a, b = (getattr(f, "pooler_output", f).flatten() for f in (image, text))
        out.append(float(a @ b / (a.norm() * b.norm())))
    return out


def test_it_equals_a_plain_recomputation(clip: Path, pictures: Tensor) -> None:
    metric = CLIPSimilarity(str(clip))
    expected = plain(clip, pictures, CAPTIONS)
    assert np.ptp(expected) > 0.05
    torch.testing.assert_close(metric.score(pictures, CAPTIONS), torch.tensor(expected), rtol=0, atol=0.01)  # 8 bits a pixel there
    metric.update(pictures, CAPTIONS)
    assert float(metric.compute()) == pytest.approx(np.mean(expected), abs=0.01)


def test_larger_pictures_are_resized_as_pillow_does(clip: Path) -> None:
    metric, noise = CLIPSimilarity(str(clip)), torch.rand(3, 40, 40)
    channels = [PILImage.fromarray(c.numpy()).resize((16, 16), PILImage.Resampling.BICUBIC) for c in noise]
    small = torch.from_numpy(np.stack([np.asarray(c).clip(0, 1) for c in channels]))
    torch.testing.assert_close(metric.score(noise[None] * 2 - 1, ["a cat"]), metric.score(small[None] * 2 - 1, ["a cat"]))


def test_streaming_equals_one_batch(clip: Path, pictures: Tensor) -> None:
    whole, stream, other = (CLIPSimilarity(str(clip)) for _ in range(3))
    whole.update(pictures, CAPTIONS)
    stream.update(pictures[:1], CAPTIONS[:1])
    other.update(pictures[1:], CAPTIONS[1:])
    stream.merge_state(other)
    torch.testing.assert_close(stream.compute(), whole.compute(), rtol=0, atol=1e-6)
    stream.reset()
    stream.update(pictures[:1], CAPTIONS[:1])
    torch.testing.assert_close(stream.compute(), whole.score(pictures, CAPTIONS)[0])


def test_a_caption_longer_than_clip_reads_is_cut(clip: Path, pictures: Tensor) -> None:
    metric = CLIPSimilarity(str(clip))
    assert torch.isfinite(metric.score(pictures[:1], ["a red cat on " * 20])).all()


def test_pickscore_is_the_formula_of_its_model_card(clip: Path, tmp_path: Path, pictures: Tensor) -> None:
    model = CLIPModel.from_pretrained(clip)
    model.logit_scale.data.fill_(3.0)
    model.save_pretrained(tmp_path)
    oblong = torch.cat([torch.ones(3, 3, 16, 4), pictures, torch.ones(3, 3, 16, 5)], -1)  # CLIP's processor cuts out the middle
    for given in (pictures, oblong):
        expected = np.exp(3.0) * np.array(plain(tmp_path, given, CAPTIONS))
        metric = PickScore(str(tmp_path), tokenizer=str(clip))
        torch.testing.assert_close(metric.score(given, CAPTIONS).double(), torch.tensor(expected), rtol=0, atol=0.2)
        metric.update(given, CAPTIONS)
        assert float(metric.compute()) == pytest.approx(expected.mean(), abs=0.2) and np.ptp(expected) > 1
