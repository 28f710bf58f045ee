from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from lightning_mmgen.batch import Batch, pack
from lightning_mmgen.diffusion import ConditionDropout, Diffusion, drop_condition
from lightning_mmgen.module import SampleNoise

SCHEDULES = ["scaled_linear", "linear", "squaredcos_cap_v2"]
V: dict[str, Any] = {"prediction_type": "v_prediction"}
BOTH_TYPES = pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])


def plain_abar(schedule: str, start: float = 0.00085, end: float = 0.012, steps: int = 1000, zero_snr: bool = False) -> list[float]:
    """abar_t by one multiplication after another."""
    betas = []
    for i in range(steps):
        share = i / (steps - 1)
        if schedule == "linear":
            betas.append(start + share * (end - start))
        elif schedule == "scaled_linear":
            betas.append((start**0.5 + share * (end**0.5 - start**0.5)) ** 2)
        else:
            now, then = (math.cos((k / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for k in (i, i + 1))
            betas.append(min(1 - then / now, 0.999))
    abar, product = [], 1.0
    for beta in betas:
        product *= 1 - beta
        abar.append(product)
    if zero_snr:  # Lin et al. 2023, algorithm 1
        first, last = abar[0] ** 0.5, abar[-1] ** 0.5
        abar = [((a**0.5 - last) * first / (first - last)) ** 2 for a in abar]
    return abar


def latents(b: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """z0, noise, and timesteps that hold the first and the last."""
    return torch.randn(b, 3, 4, 4), torch.randn(b, 3, 4, 4), torch.tensor([0, 999, 250, 700][:b])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_abar_equals_a_plain_product_over_betas(schedule: Any) -> None:
    abar = Diffusion(beta_schedule=schedule).alphas_cumprod
    assert abar.dtype == torch.float32
    torch.testing.assert_close(abar, torch.tensor(plain_abar(schedule)), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_zero_terminal_snr_follows_the_algorithm_and_ends_at_exactly_zero(schedule: Any) -> None:
    abar = Diffusion("v_prediction", schedule, zero_terminal_snr=True).alphas_cumprod
    torch.testing.assert_close(abar, torch.tensor(plain_abar(schedule, zero_snr=True)), rtol=1e-3, atol=1e-6)
    assert abar[-1] == 0
    assert (abar[:-1] > 0).all()


def test_schedule_settings_have_an_effect() -> None:
    abar = Diffusion(beta_start=0.0001, beta_end=0.02, beta_schedule="linear", train_timesteps=100).alphas_cumprod
    torch.testing.assert_close(abar, torch.tensor(plain_abar("linear", 0.0001, 0.02, 100)), rtol=1e-4, atol=1e-7)


def test_wrong_settings_raise() -> None:
    with pytest.raises(ValueError, match="zero_terminal_snr"):
        Diffusion("epsilon", zero_terminal_snr=True)
    for gamma in (0.0, -1.0):
        with pytest.raises(ValueError, match="snr_gamma"):
            Diffusion(snr_gamma=gamma)


@pytest.mark.parametrize("kind", [{}, V, {**V, "zero_terminal_snr": True}, {"beta_schedule": "linear"}])
def test_noise_target_and_estimate_invert_one_another(kind: dict[str, Any]) -> None:
    diffusion = Diffusion(**kind)
    z0, noise, t = latents()
    z_t = diffusion.add_noise(z0, noise, t)
    torch.testing.assert_close(diffusion.estimate_z0(diffusion.target(z0, noise, t), z_t, t), z0, rtol=1e-4, atol=1e-4)


@BOTH_TYPES
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_noise_and_velocity_equal_those_of_diffusers(prediction_type: Any, schedule: Any) -> None:
    diffusion = Diffusion(prediction_type, schedule)
    scheduler = DDPMScheduler(beta_schedule=schedule, beta_start=0.00085, beta_end=0.012, prediction_type=prediction_type)
    z0, noise, t = latents()
    torch.testing.assert_close(diffusion.add_noise(z0, noise, t), scheduler.add_noise(z0, noise, t))
    target = noise if prediction_type == "epsilon" else scheduler.get_velocity(z0, noise, t)
    torch.testing.assert_close(diffusion.target(z0, noise, t), target)


def test_scheduler_config_gives_diffusers_the_same_process() -> None:
    diffusion = Diffusion("v_prediction", "linear", 0.001, 0.01, 500, zero_terminal_snr=True)
    scheduler = DDPMScheduler(**diffusion.scheduler_config())
    torch.testing.assert_close(scheduler.alphas_cumprod, diffusion.alphas_cumprod, rtol=1e-6, atol=1e-7)
    scheduler.set_timesteps(10)
    assert scheduler.timesteps[0] == 499  # trailing: sampling starts at the last step
    assert scheduler.config.prediction_type == "v_prediction" and not scheduler.config.clip_sample


@BOTH_TYPES
def test_min_snr_weights_follow_equation_9(prediction_type: Any) -> None:
    weights = Diffusion(prediction_type, snr_gamma=5.0).weight(torch.arange(1000))
    for t, abar in enumerate(plain_abar("scaled_linear")):
        snr = abar / (1 - abar)
        expected = min(snr, 5.0) / (snr if prediction_type == "epsilon" else snr + 1)
        assert math.isclose(weights[t].item(), expected, rel_tol=1e-3), t


@BOTH_TYPES
def test_min_snr_weighs_the_error_in_z0_by_the_clamped_snr(prediction_type: Any) -> None:
    diffusion = Diffusion(prediction_type, snr_gamma=5.0)
    z0, noise, _ = latents()
    t, prediction = torch.tensor([10, 999, 250, 700]), torch.randn(4, 3, 4, 4)
    in_prediction = (prediction - diffusion.target(z0, noise, t)).square().mean((1, 2, 3))
    in_z0 = (diffusion.estimate_z0(prediction, diffusion.add_noise(z0, noise, t), t) - z0).square().mean((1, 2, 3))
    torch.testing.assert_close(diffusion.weight(t) * in_prediction, diffusion.snr(t).clamp(max=5.0) * in_z0, rtol=1e-3, atol=1e-4)


def test_min_snr_weight_is_zero_at_the_last_step_of_zero_terminal_snr() -> None:
    weights = Diffusion("v_prediction", zero_terminal_snr=True, snr_gamma=5.0).weight(torch.arange(1000))
    assert weights[-1] == 0 and (weights[:-1] > 0).all() and weights.isfinite().all()


def test_without_gamma_all_weights_are_one() -> None:
    assert torch.equal(Diffusion().weight(torch.tensor([0, 999])), torch.ones(2))


def test_offset_noise_shifts_whole_channels_and_nothing_else() -> None:
    seeds, shape = torch.arange(200), (4, 2, 3)
    plain, offset = SampleNoise(seeds, shape, Diffusion()), SampleNoise(seeds, shape, Diffusion(offset_noise=0.5))
    shift = offset.noise - plain.noise  # [200, 4, 2, 3]
    torch.testing.assert_close(shift, shift[:, :, :1, :1].expand_as(shift), rtol=0, atol=1e-5)
    assert math.isclose(shift[:, :, 0, 0].std().item(), 0.5, rel_tol=0.1)
    assert torch.equal(offset.timesteps, plain.timesteps)


# -- condition dropout ---------------------------------------------------------------------------------------------------------


def batch(b: int = 3) -> Batch:
    """Sample 0 with two references of two sizes, sample 1 with one, sample 2 with none; then the same again."""
    texts, marks = ["a [ref#2] dog  and [ref#5] a cat", "[ref#1] in the rain", "a plain text"], [[2, 5], [1], []]
    pictures = [[torch.full((3, 4, 4), 0.0), torch.full((3, 8, 4), 1.0)], [torch.full((3, 4, 4), 2.0)], []]
    return Batch(
        [texts[i % 3] for i in range(b)],
        [list(marks[i % 3]) for i in range(b)],
        pack([pictures[i % 3] for i in range(b)]),
        torch.zeros(b, 3, 8, 8),
        ["" for _ in range(b)],
        [str(i) for i in range(b)],
        torch.arange(b),
    )


def pictures_of(batch: Batch) -> dict[tuple[int, int], float]:
    """(sample, slot) -> the picture's grey."""
    rows = [(g.sample[i].item(), g.slot[i].item(), g.pixels[i, 0, 0, 0].item()) for g in batch.references for i in range(len(g.pixels))]
    return {(int(s), int(k)): grey for s, k, grey in rows}


@pytest.mark.parametrize("shares", [{"both": -0.1}, {"text": 1.1}, {"both": 0.5, "text": 0.3, "references": 0.3}])
def test_condition_dropout_rejects_shares_that_are_no_probabilities(shares: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="condition_dropout"):
        ConditionDropout(**shares)


def test_condition_dropout_accepts_shares_that_sum_to_one() -> None:
    shares = ConditionDropout(both=0.25, text=0.25, references=0.5)
    assert shares.both + shares.text + shares.references == 1


def test_no_dropout_keeps_the_batch() -> None:
    left = drop_condition(batch(), ConditionDropout(both=0.0), torch.zeros(3))
    assert left.instructions == batch().instructions and left.markers == batch().markers
    assert pictures_of(left) == pictures_of(batch())


def test_dropping_both_leaves_an_empty_prompt() -> None:
    left = drop_condition(batch(), ConditionDropout(both=1.0), torch.rand(3))
    assert left.instructions == ["", "", ""] and left.markers == [[], [], []] and left.references == []


def test_dropping_text_keeps_markers_and_pictures() -> None:
    left = drop_condition(batch(), ConditionDropout(both=0.0, text=1.0), torch.rand(3))
    assert left.instructions == ["[ref#2][ref#5]", "[ref#1]", ""] and left.markers == [[2, 5], [1], []]
    assert pictures_of(left) == pictures_of(batch())


def test_dropping_references_keeps_the_words() -> None:
    left = drop_condition(batch(), ConditionDropout(both=0.0, references=1.0), torch.rand(3))
    assert left.instructions == ["a dog and a cat", "in the rain", "a plain text"] and left.markers == [[], [], []]
    assert left.references == []


def test_each_draw_falls_into_its_own_share() -> None:
    shares = ConditionDropout(both=0.2, text=0.3, references=0.4)
    none, pictures, words, all_ = "", "[ref#2][ref#5]", "a dog and a cat", batch(1).instructions[0]
    for draw, left in ((0.0, none), (0.19, none), (0.21, pictures), (0.49, pictures), (0.51, words), (0.89, words), (0.91, all_)):
        assert drop_condition(batch(1), shares, torch.tensor([draw])).instructions == [left], draw


def test_only_the_pictures_of_dropped_samples_leave_the_packed_groups() -> None:
    left = drop_condition(batch(6), ConditionDropout(both=0.5), torch.tensor([0.1, 0.9, 0.9, 0.9, 0.1, 0.1]))
    assert pictures_of(left) == {(1, 0): 2.0, (3, 0): 0.0, (3, 1): 1.0}
    assert [len(g.pixels) for g in left.references] == [2, 1]
    only = drop_condition(batch(2), ConditionDropout(both=0.5), torch.tensor([0.1, 0.9]))
    assert [tuple(g.pixels.shape) for g in only.references] == [(1, 3, 4, 4)]  # an emptied group is gone


def test_drop_condition_is_pure() -> None:
    given, copy = batch(), batch()
    left = drop_condition(given, ConditionDropout(both=1.0), torch.zeros(3))
    assert given.instructions == copy.instructions and given.markers == copy.markers and pictures_of(given) == pictures_of(copy)
    assert torch.equal(left.target, given.target) and torch.equal(left.seed, given.seed) and left.ids == given.ids


def test_dropout_rates_over_ten_thousand_draws() -> None:
    n, shares = 10_000, ConditionDropout(both=0.1, text=0.05, references=0.2)
    pictures = pack([[torch.zeros(3, 1, 1)]] * n)
    given = Batch(["a [ref#1] dog"] * n, [[1]] * n, pictures, torch.zeros(n, 3, 1, 1), [""] * n, [""] * n, torch.arange(n))
    left = drop_condition(given, shares, torch.rand(n, generator=torch.Generator().manual_seed(1)))
    for text, share in (("", 0.1), ("[ref#1]", 0.05), ("a dog", 0.2), ("a [ref#1] dog", 0.65)):
        assert abs(left.instructions.count(text) / n - share) < 0.015, text
    assert set(left.references[0].sample.tolist()) == {i for i, m in enumerate(left.markers) if m}


def test_cubic_timesteps_follow_their_formula_and_uniform_ones_are_uniform() -> None:
    """T2I-Adapter's t = (1 - u^3) T: below T/2 lie 1 - (1/2)^(1/3) = 20.6 % of them, below T/4 9.1 %."""

    def drawn(kind: Any) -> Tensor:
        g = torch.Generator().manual_seed(0)
        diffusion = Diffusion(timestep_sampling=kind)
        return torch.stack([diffusion.sample_timestep(g) for _ in range(10_000)])

    cubic, uniform = drawn("cubic"), drawn("uniform")
    for t in (cubic, uniform):
        assert t.dtype == torch.int64 and t.min() >= 0 and t.max() == 999
    assert (cubic < 500).float().mean() == pytest.approx(1 - 0.5 ** (1 / 3), abs=0.012)
    assert (cubic < 250).float().mean() == pytest.approx(1 - 0.75 ** (1 / 3), abs=0.009)
    assert (uniform < 250).float().mean() == pytest.approx(0.25, abs=0.013)
