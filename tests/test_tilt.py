"""The exact tilt: importance weights of the base's samples, against Gaussians whose tilt is known."""
import math

import pytest
import torch


import tilt  # noqa: E402

from support import metrics  # noqa: E402

P, S, SPREAD = 6, 20_000, 0.7


def gaussian_draw(seed: int = 0, samples: int = S) -> metrics.Measurement:
    """Per prompt p one number x ~ N(p, SPREAD^2); the reward is x. Features: an angle x - p, and x itself for FID."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(P, samples, generator=generator, dtype=torch.float64)
    x = torch.arange(P)[:, None] + SPREAD * noise
    angle = SPREAD * noise[..., None]
    return metrics.Measurement(
        reward=x, alignment=-x.square(), retrieved=(noise > 0).double(), coverage=torch.ones_like(x), dnc=2 * x,
        features=torch.stack([angle.cos(), angle.sin()], -1), fid_features=noise[..., None, None],
        latents=x[..., None])


def test_a_linear_reward_moves_a_gaussian_by_beta_times_its_variance():
    draw, beta = gaussian_draw(), 0.9
    row = tilt.tilted(draw, gaussian_draw(1), beta)
    shift = beta * SPREAD ** 2
    assert row["gain"] == pytest.approx(shift, rel=0.02)
    assert row["dnc"] == pytest.approx(2 * ((P - 1) / 2 + shift), rel=0.01)
    assert row["kl"] == pytest.approx((beta * SPREAD) ** 2 / 2, rel=0.05)
    assert row["effective"] == pytest.approx(S * math.exp(-(beta * SPREAD) ** 2), rel=0.05)
    # P(noise > 0) after a shift of beta * SPREAD standard deviations
    assert row["retrieved"] == pytest.approx(0.5 * (1 + math.erf(beta * SPREAD / 2 ** 0.5)), abs=0.01)
    # The variance stays, so the mean is all that FID sees; two angles differ by N(0, 2 SPREAD^2) as before.
    assert row["fid_to_base"] == pytest.approx((beta * SPREAD) ** 2, rel=0.06)
    assert row["diversity"] == pytest.approx(1 - math.exp(-SPREAD ** 2), rel=0.02)


def test_a_quadratic_reward_narrows_a_gaussian():
    draw, beta = gaussian_draw(), 1.5
    noise = draw.latents[..., 0] - torch.arange(P)[:, None]
    row = tilt.tilted(draw._replace(reward=-noise.square() / 2), gaussian_draw(1), beta)
    variance = 1 / (1 / SPREAD ** 2 + beta)
    assert row["reward"] == pytest.approx(-variance / 2, rel=0.03)
    assert row["diversity"] == pytest.approx(1 - math.exp(-variance), rel=0.03)
    narrowed = variance ** 0.5 / SPREAD
    assert row["fid_to_base"] == pytest.approx((1 - narrowed) ** 2, rel=0.1)


def test_without_a_tilt_the_weighted_metrics_are_the_usual_ones():
    draw, other = gaussian_draw(samples=300), gaussian_draw(2, samples=200)
    row = tilt.tilted(draw, other, 0.0)
    assert row["gain"] == pytest.approx(0, abs=1e-12) and row["kl"] == pytest.approx(0, abs=1e-12)
    assert row["effective"] == pytest.approx(300)
    assert row["diversity"] == pytest.approx(metrics.diversity(draw.features).mean().item(), rel=1e-9)
    usual = metrics.frechet_distance(draw.fid_features.flatten(0, 2), other.fid_features.flatten(0, 2))
    assert row["fid_to_base"] == pytest.approx(usual.item(), rel=1e-9)


def test_weights_belong_to_a_prompt():
    """A prompt whose rewards are higher throughout has no more weight than the others."""
    reward = torch.tensor([[0.0, 1.0], [100.0, 101.0]])
    weights = tilt.tilt_weights(reward, 2.0)
    assert torch.allclose(weights[0], weights[1]) and torch.allclose(weights.sum(1), torch.ones(2).double())
    assert weights[0, 1] / weights[0, 0] == pytest.approx(math.exp(2.0))
    assert tilt.tilt_weights(reward, 1e6).isfinite().all()


def test_the_curve_ends_where_few_samples_carry_the_weight():
    draw = gaussian_draw(samples=256)
    curve = tilt.optimum(draw, gaussian_draw(1, samples=256), points=8)
    assert len(curve) == 8 and curve[0]["beta"] == 0
    assert [row["gain"] for row in curve] == sorted(row["gain"] for row in curve)
    assert curve[-1]["effective"] == pytest.approx(tilt.FEWEST, rel=1e-3)
    same = draw._replace(reward=torch.ones(P, 256))
    assert len(tilt.optimum(same, draw)) == 1                       # a reward that is the same for all tilts nothing


def test_the_optimum_at_equal_reward():
    curve = [{"gain": 0.0, "alignment": 0.8}, {"gain": 0.1, "alignment": 0.7}, {"gain": 0.2, "alignment": 0.5}]
    assert tilt.at_gain(curve, 0.15)["alignment"] == pytest.approx(0.6)
    assert tilt.at_gain(curve, 0.05)["alignment"] == pytest.approx(0.75)
    assert tilt.at_gain(curve, 0.3) is None and tilt.at_gain(curve, -0.1) is None


def test_histograms():
    weights = torch.tensor([[0.75, 0.25], [0.5, 0.5]])
    shares = tilt.weighted_histogram([["red", "blue"], ["red", "red"]], weights, ["red", "blue", "gray"])
    assert shares == pytest.approx({"red": 0.875, "blue": 0.125, "gray": 0.0})
    assert tilt.total_variation(shares, {"red": 0.5, "blue": 0.25, "gray": 0.25}) == pytest.approx(0.375)
