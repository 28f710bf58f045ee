from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor
from transformers import AutoModel, CLIPModel, Dinov2Config, ViTConfig

from lightning_mmgen.metrics import (
    DirectionalSimilarity,
    ImageSimilarity,
    MaskedMSE,
    MaskedPSNR,
    MaskedSSIM,
    StructureDistance,
)
from lightning_mmgen.metrics.drift import OutsideMean
from lightning_mmgen.models.clip import Clip
from lightning_mmgen.models.dino import Dino

MASKED: list[type[OutsideMean]] = [MaskedMSE, MaskedPSNR, MaskedSSIM]
CAPTIONS, SOURCE_CAPTIONS = ["a red cat", "a blue box on a star", "green"], ["a cat", "a blue box", "red"]


def noise(count: int = 3, h: int = 24, w: int = 32) -> Tensor:
    """Pictures [count, 3, h, w] in [-1, 1]."""
    return torch.rand(count, 3, h, w) * 2 - 1


def boxes(count: int = 3, h: int = 24, w: int = 32) -> Tensor:
    """Masks of a box at the left, of another size in each picture, [count, 1, h, w]."""
    masks = torch.zeros(count, 1, h, w)
    for i in range(count):
        masks[i, :, 2 : h - 2, 1 : 5 + 3 * i] = 1
    return masks


def scored(metric: Any, *given: Any) -> float:
    metric.update(*given)
    return float(metric.compute())


@pytest.fixture(scope="module", params=[ViTConfig, Dinov2Config], ids=["dino", "dinov2"])
def dino(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny one: 16 patches."""
    folder = tmp_path_factory.mktemp("dino")
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.5}
    torch.manual_seed(0)
    AutoModel.from_config(request.param(**size, image_size=16, patch_size=4)).save_pretrained(folder)
    return folder


def test_the_squared_error_is_weighted_once_by_what_a_soft_mask_leaves_outside() -> None:
    pictures, sources, masks = noise(2, 4, 5), noise(2, 4, 5), torch.rand(2, 1, 4, 5)
    each = []
    for p, s, m in zip((pictures + 1) / 2, (sources + 1) / 2, masks, strict=True):
        cells = [(1 - float(m[0, y, x]), float(p[c, y, x] - s[c, y, x]) ** 2) for c in range(3) for y in range(4) for x in range(5)]
        each.append(sum(w * e for w, e in cells) / sum(w for w, _ in cells))
    assert scored(MaskedMSE(), pictures, sources, masks) == pytest.approx(np.mean(each), rel=1e-5)
    assert scored(MaskedPSNR(), pictures, sources, masks) == pytest.approx(np.mean(-10 * np.log10(each)), rel=1e-5)


def test_without_a_mask_psnr_and_ssim_are_those_of_scikit_image() -> None:
    sources = noise()
    pictures = (sources + torch.tensor([0.1, 0.3, 0.9]).view(3, 1, 1, 1) * noise()).clamp(-1, 1)
    pairs = [(a.numpy(), b.numpy()) for a, b in zip((pictures + 1) / 2, (sources + 1) / 2, strict=True)]
    psnr = [peak_signal_noise_ratio(s, p, data_range=1.0) for p, s in pairs]
    ssim = [_ssim(s, p)[0] for p, s in pairs]
    assert np.ptp(psnr) > 5 and np.ptp(ssim) > 0.1
    assert scored(MaskedPSNR(), pictures, sources, torch.zeros(3, 1, 24, 32)) == pytest.approx(np.mean(psnr), rel=1e-5)
    assert scored(MaskedSSIM(), pictures, sources, torch.zeros(3, 1, 24, 32)) == pytest.approx(np.mean(ssim), abs=1e-5)


def _ssim(first: np.ndarray[Any, Any], second: np.ndarray[Any, Any]) -> Any:
    """The mean over whole windows, and the local values [3, h, w]; of pictures in [0, 1]."""
    return structural_similarity(
        first, second, data_range=1.0, channel_axis=0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, full=True
    )


def test_ssim_is_averaged_over_the_windows_without_a_masked_pixel() -> None:
    pictures, sources, masks = noise(), noise(), boxes()
    each = []
    for p, s, m in zip((pictures + 1) / 2, (sources + 1) / 2, masks, strict=True):
        local = _ssim(s.numpy(), torch.where(m.bool(), s, p).numpy())[1].mean(0)
        whole = [(y, x) for y in range(5, 24 - 5) for x in range(5, 32 - 5) if not m[0, y - 5 : y + 6, x - 5 : x + 6].any()]
        each.append(np.mean([local[at] for at in whole]))
    assert scored(MaskedSSIM(), pictures, sources, masks) == pytest.approx(np.mean(each), abs=1e-5)


def test_ssim_in_a_soft_mask_counts_by_the_largest_value_in_the_window() -> None:
    pictures, sources, masks = noise(1), noise(1), torch.rand(1, 1, 24, 32) * torch.linspace(0, 1, 32)
    composite = masks * sources + (1 - masks) * pictures
    local = _ssim(((sources[0] + 1) / 2).numpy(), ((composite[0] + 1) / 2).numpy())[1].mean(0)
    cells = [(1 - masks[0, 0, y - 5 : y + 6, x - 5 : x + 6].max(), local[y, x]) for y in range(5, 24 - 5) for x in range(5, 32 - 5)]
    expected = sum(w * value for w, value in cells) / sum(w for w, _ in cells)
    assert scored(MaskedSSIM(), pictures, sources, masks) == pytest.approx(float(expected), abs=1e-5)


@pytest.mark.parametrize(("kind", "none"), [(MaskedMSE, 0), (MaskedPSNR, 100), (MaskedSSIM, 1)])
def test_a_change_inside_the_mask_is_no_drift_and_one_outside_is(kind: type[OutsideMean], none: float) -> None:
    sources, masks = noise(), boxes()
    edited = torch.where(masks.bool(), noise(), sources)
    assert (edited != sources).any() and scored(kind(), edited, sources, masks) == none
    edited[:, :, 12, 24] *= -1  # whole windows hold this pixel
    assert abs(scored(kind(), edited, sources, masks) - none) > 1e-4


def test_flat_pictures_that_are_equal_have_an_ssim_of_one() -> None:
    flat = torch.full((1, 3, 24, 32), 0.7)
    assert scored(MaskedSSIM(), flat, flat, torch.zeros(1, 1, 24, 32)) == pytest.approx(1, abs=1e-7)


@pytest.mark.parametrize("kind", MASKED)
def test_a_picture_that_may_change_everywhere_is_left_out(kind: type[OutsideMean]) -> None:
    pictures, sources, masks = noise(), noise(), boxes()
    masks[1] = 1
    rest = [0, 2]
    assert scored(kind(), pictures, sources, masks) == scored(kind(), pictures[rest], sources[rest], masks[rest])
    assert np.isnan(scored(kind(), pictures, sources, torch.ones(3, 1, 24, 32)))


def test_ssim_leaves_out_a_picture_without_a_window_beside_the_mask() -> None:
    masks = torch.ones(1, 1, 24, 32)
    masks[..., :10] = 0  # the window is 11 wide
    assert np.isnan(scored(MaskedSSIM(), noise(1), noise(1), masks))
    masks[..., 10] = 0
    assert np.isfinite(scored(MaskedSSIM(), noise(1), noise(1), masks))


@pytest.mark.parametrize("kind", MASKED)
def test_sizes_and_masks_that_do_not_fit_are_an_error_of_one_line(kind: type[OutsideMean]) -> None:
    with pytest.raises(ValueError, match=r"^pictures \(3, 3, 24, 32\), sources \(3, 3, 24, 32\) and masks \(3, 1, 8, 8\) must be .*$"):
        kind().update(noise(), noise(), boxes(h=8, w=8))
    with pytest.raises(ValueError, match=r"^pictures \(3, 3, 24, 32\), sources \(3, 3, 24, 24\) and .*$"):
        kind().update(noise(), noise(w=24), boxes())
    with pytest.raises(ValueError, match=r"^masks \(3, 3, 24, 32\).*$|^pictures.*masks \(3, 3, 24, 32\) must be .*one channel$"):
        kind().update(noise(), noise(), boxes().expand(3, 3, 24, 32))
    with pytest.raises(ValueError, match=r"^masks must be in \[0, 1\]; they are in \[0, 255\]$"):
        kind().update(noise(), noise(), boxes() * 255)


def test_pictures_smaller_than_ssims_window_are_an_error_of_one_line() -> None:
    with pytest.raises(ValueError, match=r"^pictures of \(10, 32\) pixels are smaller than the window of 11$"):
        MaskedSSIM().update(noise(h=10), noise(h=10), torch.zeros(3, 1, 10, 32))


@torch.no_grad()
def test_structure_distance_compares_the_cosines_of_all_pairs_of_keys(dino: Path) -> None:
    pictures, sources, model = noise(2, 16, 16), noise(2, 16, 16), Dino.from_pretrained(str(dino))
    errors = []
    for first, second in zip(model.keys(pictures), model.keys(sources), strict=True):
        assert len(first) == 1 + 16
        for i in range(17):
            for j in range(17):
                a, b = (float(k[i] @ k[j] / (k[i].norm() * k[j].norm())) for k in (first, second))
                errors.append((a - b) ** 2)
    assert np.mean(errors) > 1e-3
    assert scored(StructureDistance(str(dino)), pictures, sources) == pytest.approx(np.mean(errors), rel=1e-4)
    assert scored(StructureDistance(str(dino)), sources, sources) == 0


@torch.no_grad()
def test_the_direction_of_an_edit_equals_a_plain_recomputation(clip: Path) -> None:
    pictures, sources, model = noise(3, 16, 16), noise(3, 16, 16), Clip(str(clip))
    each = []
    for i in range(3):
        images = [model.embed(p[i : i + 1])[0].numpy() for p in (pictures, sources)]
        texts = [model.embed_texts([t[i]])[0].numpy() for t in (CAPTIONS, SOURCE_CAPTIONS)]
        moved, told = images[0] - images[1], texts[0] - texts[1]
        each.append(moved @ told / np.sqrt((moved @ moved) * (told @ told)))
    assert np.ptp(each) > 0.1
    assert scored(DirectionalSimilarity(str(clip)), pictures, sources, CAPTIONS, SOURCE_CAPTIONS) == pytest.approx(np.mean(each), abs=1e-5)
    assert scored(DirectionalSimilarity(str(clip)), sources, sources, CAPTIONS, SOURCE_CAPTIONS) == 0
    back = scored(DirectionalSimilarity(str(clip)), sources, pictures, CAPTIONS, SOURCE_CAPTIONS)
    assert back == pytest.approx(-np.mean(each), abs=1e-5)


@torch.no_grad()
def test_image_similarity_is_the_cosine_of_clips_embeddings_or_of_dinos_class_tokens(clip: Path, dino: Path) -> None:
    pictures, sources = noise(3, 16, 16), noise(3, 16, 16)
    model, vit = CLIPModel.from_pretrained(clip), Dino.from_pretrained(str(dino))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]))
    embeds: dict[Path, Callable[[Tensor], Tensor]] = {
        clip: lambda p: model.get_image_features(pixel_values=((p + 1) / 2 - mean) / std).pooler_output,
        dino: vit.cls,
    }
    for folder, embed in embeds.items():
        cosines = [float(a @ b / (a.norm() * b.norm())) for a, b in zip(embed(pictures), embed(sources), strict=True)]
        assert (
            scored(ImageSimilarity(str(folder)), pictures, sources) == pytest.approx(np.mean(cosines), abs=1e-4) and np.ptp(cosines) > 0.01
        )
        assert scored(ImageSimilarity(str(folder)), pictures, pictures) == pytest.approx(1, abs=1e-6)


def metrics(clip: Path, dino: Path) -> list[tuple[Callable[[], Any], tuple[Any, ...]]]:
    """Each of this file, and what it is updated with: always of three pictures, the first of which may change everywhere."""
    pictures, sources, masks = noise(), noise(), boxes()
    masks[0] = 1
    pair = pictures, sources
    return [
        *((kind, (*pair, masks)) for kind in MASKED),
        (partial(StructureDistance, str(dino)), pair),
        (partial(DirectionalSimilarity, str(clip)), (*pair, CAPTIONS, SOURCE_CAPTIONS)),
        (partial(ImageSimilarity, str(clip)), pair),
        (partial(ImageSimilarity, str(dino)), pair),
    ]


def test_the_scores_do_not_depend_on_how_the_pictures_are_cut_into_batches(clip: Path, dino: Path) -> None:
    for make, given in metrics(clip, dino):
        whole, stream, other = make(), make(), make()
        for i in (2, 0):
            stream.update(*(g[i : i + 1] for g in given))
        other.update(*(g[1:2] for g in given))
        stream.merge_state(other)
        assert float(stream.compute()) == pytest.approx(scored(whole, *given), rel=1e-5), type(whole).__name__


def _score_a_part(rank: int, made: list[tuple[Callable[[], Any], tuple[Any, ...]]], folder: Path) -> None:
    torch.set_num_threads(1)  # a pool of OpenMP does not survive a fork
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    part = slice(0, 1) if rank == 0 else slice(1, None)
    torch.save([scored(make(), *(g[part] for g in given)) for make, given in made], folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_with_parts_of_unequal_size_score_the_whole(clip: Path, dino: Path, tmp_path: Path) -> None:
    made = metrics(clip, dino)
    torch.multiprocessing.start_processes(_score_a_part, (made, tmp_path), nprocs=2, start_method="fork")  # type: ignore[no-untyped-call]
    whole = [scored(make(), *given) for make, given in made]
    assert np.isfinite(whole).all()
    for rank in range(2):
        assert torch.load(tmp_path / f"{rank}.pt") == pytest.approx(whole, rel=1e-5)
