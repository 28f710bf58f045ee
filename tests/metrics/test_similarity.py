"""Scores of pictures against the references of their records, and as distributions; each against a plain recomputation."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing
from PIL import Image as PILImage
from PIL.Image import Image
from scipy.linalg import sqrtm
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPModel, ResNetConfig, ResNetModel, ViTImageProcessorPil

from lightning_mmgen.build.detector import Detector
from lightning_mmgen.metrics import (
    FID,
    KID,
    Detected,
    FaceSimilarity,
    MultimodalPromptScore,
    PictureMean,
    RecordBoxes,
    ReferenceSimilarity,
    SubjectSimilarity,
)
from lightning_mmgen.metrics.regions import cut, region_masks
from lightning_mmgen.models.features import Features
from lightning_mmgen.pipeline import to_pil
from lightning_mmgen.prompt import Box, Record, Reference

from ..build.conftest import grounding_dino
from .test_drift import _score_a_part, scored

__all__ = ["grounding_dino"]


def image(seed: int, width: int = 16, height: int = 16) -> Image:
    """Noise on a ground of its own, so that the cosines differ."""
    rng = np.random.default_rng(seed)
    ground = rng.integers(0, 255, 3)
    return PILImage.fromarray((0.5 * ground + 0.5 * rng.integers(0, 255, (height, width, 3))).astype(np.uint8))


def pictures(count: int, side: int = 32) -> Tensor:
    arrays = np.stack([np.asarray(image(100 + i, side, side)) for i in range(count)])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 127.5 - 1


BOXES = (Box("a man", 10, 2, 20, 18), Box("a man", 10, 2, 14, 6, "head"), Box("a dog", 21, 4, 29, 16))
"""In a target of 40 x 20 pixels, whose middle square begins at x = 10."""


def records() -> list[Record]:
    target = image(50, 40, 20)
    man, dog = Reference(1, image(1, 20, 10), "a man", "crop"), Reference(2, image(2), "a dog", "crop")
    styled = Reference(2, image(3), "style", "style")
    return [
        Record("[ref#1] a man, [ref#2] a dog", (man, dog), target, "a red cat", boxes=BOXES, extra={"real": [image(7), image(8)]}),
        Record("[ref#1] a man in [ref#2] style", (man, styled), target, extra={"real": [image(9)]}),
        Record("words alone", (), target, boxes=BOXES),
    ]


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny ResNet that takes pictures with a mean and a deviation of 0.5."""
    folder = tmp_path_factory.mktemp("resnet")
    torch.manual_seed(0)
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    ResNetModel(ResNetConfig(num_channels=3, **sizes)).save_pretrained(folder)
    ViTImageProcessorPil(image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(folder)
    return folder


@torch.no_grad()
def plain(clip: Path, one: Image) -> Tensor:
    """The embedding of a picture by CLIP's own processor, after Pillow has squeezed it into a square."""
    values = CLIPImageProcessor(do_resize=False, do_center_crop=False)(
        one.resize((16, 16), PILImage.Resampling.BICUBIC), return_tensors="pt"
    )
    vector = CLIPModel.from_pretrained(clip).get_image_features(pixel_values=values.pixel_values).pooler_output[0]
    return vector / vector.norm()


def test_a_reference_is_compared_with_its_region_or_else_with_all_of_the_picture(clip: Path) -> None:
    drawn, metric = pictures(3), ReferenceSimilarity(str(clip))
    whole = to_pil(drawn)
    man = whole[0].crop((0, 3, 16, 29))  # 10 to 20 of 20 pixels from x = 10, 2 to 18 of 20, drawn at 32
    dog = whole[0].crop((18, 6, 30, 26))
    pairs = [(man, image(1, 20, 10)), (dog, image(2)), (whole[1], image(1, 20, 10))]
    expected = [float(plain(clip, a) @ plain(clip, b)) for a, b in pairs]
    found = metric.each(drawn, records())
    assert [len(f) for f in found] == [2, 2, 0] and bool(found[1][1].isnan())  # a style is no likeness
    assert torch.cat(found)[:3].tolist() == pytest.approx(expected, abs=0.03) and np.ptp(expected) > 0.09
    metric.update(drawn, records())
    assert float(metric.compute()) == pytest.approx((np.mean(expected[:2]) + expected[2]) / 2, abs=0.03)


def test_the_multimodal_prompt_score_counts_what_is_found_alone(clip: Path) -> None:
    drawn, metric, every = pictures(3), MultimodalPromptScore(str(clip)), ReferenceSimilarity(str(clip))
    metric.update(drawn, records())
    first = every.each(drawn, records())[0]
    out = metric.compute()
    assert float(out["similarity"]) == pytest.approx(float(first.mean()), abs=1e-6)
    assert float(out["detected"]) == pytest.approx(2 / 3)  # the second man has no box


def test_a_detector_gives_the_best_box_of_each_phrase_within_the_picture(grounding_dino: Path) -> None:
    drawn, detector = pictures(2), Detector(str(grounding_dino), box_threshold=0.0, text_threshold=0.0)
    asked = [Record("[ref#1] [ref#2]", (Reference(1, image(1), "man"), Reference(2, image(2), "dog")), image(3))] * 2
    raw = detector.detect(to_pil(drawn), [["man", "dog"]] * 2)
    found = Detected(detector)(drawn, asked)
    for row, detections in zip(found, raw, strict=True):
        for k, edges in enumerate(row):
            inside = [
                (max(d.left, 0), max(d.top, 0), min(d.right, 32), min(d.bottom, 32), d.score)
                for d in detections
                if d.phrase == k and min(d.right, 32) - max(d.left, 0) >= 1 and min(d.bottom, 32) - max(d.top, 0) >= 1
            ]
            assert edges == (max(inside, key=lambda d: d[4])[:4] if inside else None)
    assert any(edges for row in found for edges in row)


def test_boxes_pair_with_references_by_phrase_and_else_by_order() -> None:
    drawn = pictures(1)
    by_order = Record(
        "[ref#1] [ref#2]", (Reference(1, image(1), "toy"), Reference(2, image(2), "toy")), image(50, 40, 20), boxes=BOXES[::2]
    )
    (row,) = RecordBoxes()(drawn, [by_order])
    assert row == RecordBoxes()(drawn, records()[:1])[0] and row[0] is not None and row[0] != row[1]
    (head, _), *_ = RecordBoxes("head")(drawn, records()[:1])
    assert head == pytest.approx((0, 3.2, 6.4, 9.6))
    mask = region_masks([head, None], 32, 32)
    assert int(mask[0].sum()) == cut(drawn[0], head).shape[1] * cut(drawn[0], head).shape[2] and not mask[1].any()


def test_subject_similarity_is_the_mean_over_all_real_pictures(clip: Path) -> None:
    drawn = pictures(3, 16)
    expected = []
    for picture, record in zip(to_pil(drawn), records(), strict=True):
        own = plain(clip, picture)
        expected.append(np.mean([float(own @ plain(clip, real)) for real in record.extra.get("real", ())] or [np.nan]))
    found = SubjectSimilarity(str(clip)).score(drawn, records())
    assert found[:2].tolist() == pytest.approx(expected[:2], abs=0.02) and bool(found[2].isnan())


@torch.no_grad()
def test_faces_are_compared_by_a_model_of_ones_own_with_its_own_mean(resnet: Path) -> None:
    drawn, net = pictures(1), ResNetModel.from_pretrained(resnet).eval()
    head = cut(drawn[0], RecordBoxes("head")(drawn, records()[:1])[0][0])[None]
    shown = torch.from_numpy(np.asarray(image(1, 20, 10)).copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    vectors = []
    for picture in (head, shown):
        large = torch.nn.functional.interpolate(picture, (224, 224), mode="bicubic", antialias=True).clamp(-1, 1)
        vectors.append(net(pixel_values=large).last_hidden_state.mean((2, 3))[0])  # a mean and a deviation of 0.5: as it is
    a, b = vectors
    assert float(FaceSimilarity(str(resnet)).each(drawn, records()[:1])[0][0]) == pytest.approx(
        float(a @ b / (a.norm() * b.norm())), abs=1e-5
    )


def test_fid_and_kid_equal_plain_ones_of_the_same_features(clip: Path) -> None:
    drawn, real = pictures(12, 16), -pictures(10, 16)
    fake_x, real_x = (Features(str(clip))(group).double().numpy() for group in (drawn, real))
    means, covs = zip(*((x.mean(0), np.cov(x, rowvar=False)) for x in (fake_x, real_x)), strict=True)
    expected = ((means[0] - means[1]) ** 2).sum() + np.trace(covs[0] + covs[1] - 2 * sqrtm(covs[0] @ covs[1]).real)
    fid = FID(str(clip))
    fid.update(drawn[:5], real)
    fid.update(drawn[5:], real[:0])
    assert float(fid.compute()) == pytest.approx(expected, rel=1e-3)

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def off(k: np.ndarray) -> float:
        return (k.sum() - np.trace(k)) / (len(k) * (len(k) - 1))

    kid = KID(str(clip), subsets=2, subset_size=10)
    kid.update(drawn[:10], real)
    few = fake_x[:10]
    assert float(kid.compute()) == pytest.approx(
        off(kernel(few, few)) + off(kernel(real_x, real_x)) - 2 * kernel(few, real_x).mean(), rel=1e-3
    )


def test_two_processes_score_the_whole(clip: Path, tmp_path: Path) -> None:
    given = pictures(3), records()
    made = [(partial(kind, str(clip)), given) for kind in (ReferenceSimilarity, SubjectSimilarity)]
    made.append((partial(FID, str(clip)), (pictures(12, 16), -pictures(12, 16))))  # type: ignore[arg-type]
    torch.multiprocessing.start_processes(_score_a_part, (made, tmp_path), nprocs=2, start_method="fork")  # type: ignore[no-untyped-call]
    whole = [scored(make(), *of) for make, of in made]
    for rank in range(2):
        assert torch.load(tmp_path / f"{rank}.pt") == pytest.approx(whole, rel=1e-3)


def test_a_picture_that_is_not_finite_shows_in_the_mean_and_one_without_a_score_does_not(clip: Path) -> None:
    drawn, metric = pictures(3), ReferenceSimilarity(str(clip))
    metric.update(drawn, records())
    assert int(metric.count) == 2 and bool(metric.compute().isfinite())
    drawn[1, 0, 0, 0] = torch.nan
    metric.update(drawn, records())
    assert bool(metric.compute().isnan())


@pytest.mark.parametrize("kind", [ReferenceSimilarity, SubjectSimilarity, FaceSimilarity, FID])
def test_a_model_that_is_not_there_is_named(kind: type[PictureMean], tmp_path: Path, clip: Path) -> None:
    with pytest.raises(OSError, match=r"^\./nowhere: no such folder$"):
        kind("./nowhere")  # type: ignore[call-arg]
