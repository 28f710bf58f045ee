from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_mmgen.diffusion import Diffusion
from lightning_mmgen.losses import (
    composite,
    counted_mean,
    identity,
    latent_mask,
    outside,
    snr_weight,
    spatial,
    temporal,
    touched,
    turns,
)

B, C, H, W = 3, 2, 4, 5
WEIGHT = torch.tensor([0.5, 2.0, 5.0])
MASKS = {
    "none of it": torch.zeros(B, 1, H, W),
    "half": (torch.arange(W) < 3).float().expand(B, 1, H, W),
    "all but a corner": torch.ones(B, 1, H, W).index_put((torch.arange(B), *(torch.zeros(B, dtype=torch.long),) * 3), torch.tensor(0.0)),
    "soft": torch.linspace(0.1, 0.95, B * H * W).view(B, 1, H, W),
}


def latents(count: int = 2) -> list[Tensor]:
    return [torch.randn(B, C, H, W) for _ in range(count)]


def slow(error: Tensor, mask: Tensor, weight: Tensor) -> list[float]:
    """Each sample's term by its definition, number by number."""
    out = []
    for b in range(len(error)):
        above = below = 0.0
        for y in range(error.shape[2]):
            for x in range(error.shape[3]):
                keep = 1 - mask[b, 0, y, x].item()
                below += keep * error.shape[1]
                above += sum(keep * error[b, c, y, x].item() ** 2 for c in range(error.shape[1]))
        out.append(weight[b].item() * above / below)
    return out


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_spatial_and_temporal_equal_a_plain_loop_over_pixels(mask: Tensor) -> None:
    estimate, other = latents()
    expected = sum(slow(estimate - other, mask, WEIGHT)) / B
    for term in (spatial, temporal):
        assert term(estimate, other, mask, WEIGHT).item() == pytest.approx(expected, rel=1e-5)


def test_turns_equals_a_plain_loop_over_the_later_turns() -> None:
    estimate, previous = latents()
    each = slow(estimate - previous, MASKS["soft"], WEIGHT)
    for turn, counted in (([0, 1, 2], each[1:]), ([4, -1, 0], each[:1]), ([1, 1, 1], each)):
        term = turns(estimate, previous, MASKS["soft"], WEIGHT, torch.tensor(turn))
        assert term.item() == pytest.approx(sum(counted) / len(counted), rel=1e-5)


def test_turns_without_a_later_turn_is_a_zero_of_the_graph() -> None:
    estimate, previous = latents()
    term = turns(estimate.requires_grad_(), previous, MASKS["half"], WEIGHT, torch.tensor([0, -1, 0]))
    term.backward()
    assert term.item() == 0 and estimate.grad is not None and not estimate.grad.any()


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_the_same_error_everywhere_costs_the_same_whatever_the_masks_area(mask: Tensor) -> None:
    source = torch.randn(B, C, H, W)
    torch.testing.assert_close(outside((source + 0.3) - source, mask, WEIGHT), WEIGHT * 0.09, rtol=1e-4, atol=0)


def test_nothing_is_asked_of_an_edit_of_all_of_the_picture() -> None:
    estimate, source = latents()
    term = spatial(estimate.requires_grad_(), source, torch.ones(B, 1, H, W), WEIGHT)
    term.backward()
    assert term.item() == 0 and estimate.grad is not None and not estimate.grad.any()


@pytest.mark.parametrize("term", [spatial, temporal])
def test_a_term_is_zero_where_the_estimate_is_the_source_outside_the_mask(term: Callable[..., Tensor]) -> None:
    source, edited = latents()
    mask = MASKS["half"]
    assert term(mask * edited + (1 - mask) * source, source, mask, WEIGHT).item() == 0
    assert term(mask * source + (1 - mask) * edited, source, mask, WEIGHT).item() > 0.1


@pytest.mark.parametrize("term", [spatial, temporal])
def test_the_gradient_is_exactly_zero_within_the_mask_and_nowhere_else(term: Callable[..., Tensor]) -> None:
    estimate, other = (z.requires_grad_() for z in latents())
    term(estimate, other, MASKS["half"], WEIGHT).backward()
    assert estimate.grad is not None
    assert torch.equal(estimate.grad == 0, (MASKS["half"] == 1).expand_as(estimate))
    assert (other.grad is None) == (term is temporal)  # the teacher is a constant


def test_terms_of_half_precision_latents_are_float32() -> None:
    estimate, source = (z.bfloat16() for z in latents())
    term = spatial(estimate, source, MASKS["soft"], WEIGHT)
    assert term.dtype == torch.float32
    assert term.item() == pytest.approx(sum(slow((estimate - source).float(), MASKS["soft"], WEIGHT)) / B, rel=1e-5)
    assert composite(estimate, source, MASKS["soft"]).dtype == torch.bfloat16


def test_the_weight_is_the_snr_between_its_floor_and_its_cap() -> None:
    diffusion = Diffusion(prediction_type="v_prediction", zero_terminal_snr=True)
    timesteps = torch.tensor([0, 300, 700, 999])
    snr = [a / (1 - a) for a in diffusion.alphas_cumprod[timesteps].tolist()]
    assert snr[0] > 5 and snr[-1] == 0
    for cap in (5.0, 0.5):
        assert snr_weight(diffusion.snr(timesteps), cap).tolist() == pytest.approx([min(s, cap) for s in snr], rel=1e-4)
        assert snr_weight(diffusion.snr(timesteps), cap, 0.2).tolist() == pytest.approx([max(min(s, cap), 0.2) for s in snr], rel=1e-4)


def test_identity_is_one_minus_the_cosine() -> None:
    a = torch.tensor([[3.0, 4.0], [1.0, 0.0], [2.0, 0.0]])
    b = torch.tensor([[6.0, 8.0], [0.0, 5.0], [-1.0, 0.0]])
    torch.testing.assert_close(identity(a, b), torch.tensor([0.0, 1.0, 2.0]))


def test_the_composite_is_the_target_within_the_mask_and_the_source_outside() -> None:
    target, source = latents()
    mixed = composite(target, source, MASKS["half"])
    assert torch.equal(mixed[..., :3], target[..., :3]) and torch.equal(mixed[..., 3:], source[..., 3:])
    assert torch.equal(composite(target, source, torch.ones(B, 1, H, W)), target)


def test_a_latent_masked_in_part_keeps_its_share_and_is_free() -> None:
    mask = torch.where(torch.rand(2, 1, 8, 12) < 0.1, torch.rand(2, 1, 8, 12), 0.0)
    share, free = latent_mask(mask, (2, 3)), touched(mask, (2, 3))
    for y in range(2):
        for x in range(3):
            patch = mask[:, 0, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4].flatten(1)
            torch.testing.assert_close(share[:, 0, y, x], patch.mean(1))
            assert torch.equal(free[:, 0, y, x], patch.amax(1))
    assert (free == 0).any() and (free > 0).any()


def test_nearly_white_is_white() -> None:
    estimate, source = latents()
    small = latent_mask(torch.full((B, 1, 8 * H, 8 * W), 253 / 255), (H, W))
    assert spatial(estimate, source, small, WEIGHT).item() == 0
    one_pixel = torch.ones(B, 1, 8 * H, 8 * W)
    one_pixel[..., 3, 3] = 0
    assert latent_mask(one_pixel, (H, W))[0, 0, 0, 0].item() == 63 / 64  # of a latent is not nothing


VALUES = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
COUNTS = torch.tensor([[True, False, True], [False, True, False]])


def one_rank(rank: int, folder: str) -> None:
    """A rank's part of the mean, its gradient, and the part of a batch in which nothing counts on either rank."""
    torch.set_num_threads(1)  # a pool of OpenMP does not survive a fork
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    values = VALUES[rank].clone().requires_grad_()
    part = counted_mean(values, COUNTS[rank])
    part.backward()
    torch.save((part.detach(), values.grad, counted_mean(VALUES[rank], COUNTS[rank] & False)), f"{folder}/{rank}")
    torch.distributed.destroy_process_group()


def test_the_average_of_the_ranks_parts_is_the_mean_over_all_that_counts(tmp_path: Path) -> None:
    torch.multiprocessing.start_processes(one_rank, (str(tmp_path),), nprocs=2, start_method="fork")  # type: ignore[no-untyped-call]
    parts, gradients, none = zip(*(torch.load(tmp_path / str(rank)) for rank in range(2)), strict=True)
    assert torch.stack(parts).mean().item() == pytest.approx((1 + 3 + 5) / 3)
    torch.testing.assert_close(torch.stack(gradients) / 2, COUNTS / 3)
    assert all(part.item() == 0 for part in none)
