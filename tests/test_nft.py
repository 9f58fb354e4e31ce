"""DiffusionNFT: the loss against closed forms, the weights, the old policy."""
import math

import pytest
import torch

import r2d3
from support import nft

EPS = r2d3.NoiseSchedule(torch.tensor([999, 500]), torch.tensor([0.01, 0.6, 0.99]),
                         torch.tensor([0.9999 ** 0.5, 0.8, 0.02 ** 0.5]))
FLOW = r2d3.NoiseSchedule(torch.tensor([999.0, 400.0]), torch.tensor([0.001, 0.6, 0.99]),
                          torch.tensor([0.999, 0.4, 0.01]), prediction="v")


def prediction_of(schedule, x_t, x_0, i):
    """The prediction whose one-step estimate is x_0."""
    alpha, sigma = schedule.alpha[i], schedule.sigma[i]
    return (x_t - (x_0 if schedule.prediction == "v" else alpha * x_0)) / sigma


@pytest.mark.parametrize("beta", [1.0, 0.25])
@pytest.mark.parametrize("schedule", [EPS, FLOW], ids=["eps", "flow"])
@pytest.mark.parametrize("level", [0, 1])
def test_the_optimum_for_a_gaussian_prior_and_a_reward_of_two_values(schedule, level, beta):
    """x_0 ~ N(0, 1), r = 1 where x_0 > 0. N(m, s^2) is x_0 given x_t.

    The best estimate is m + (2/beta) s phi(m/s). At the highest noise that is sqrt(2/pi) / beta, for
    beta 1 the mean of the good samples.
    """
    random = torch.Generator().manual_seed(0)
    x_0 = torch.randn(400_000, 1, generator=random, dtype=torch.float64)
    alpha, sigma = schedule.alpha[level], schedule.sigma[level]
    x_t = alpha * x_0 + sigma * torch.randn(x_0.shape, generator=random, dtype=torch.float64)
    total = alpha ** 2 + sigma ** 2
    m, s = alpha * x_t / total, sigma / total.sqrt()
    density = (-(m / s).square() / 2).exp() / math.sqrt(2 * math.pi)
    best = m + 2 / beta * s * density
    i = torch.full((len(x_0),), level)
    bins = torch.bucketize(x_t[:, 0], torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64))
    shift = torch.zeros(4, dtype=torch.float64, requires_grad=True)     # of the estimate, in each part of x_t
    answer = prediction_of(schedule, x_t, best + shift[bins][:, None], i[:1])
    policy, _, _ = nft.nft_loss(lambda x, t: answer, lambda x, t: answer, schedule, x_t, i, x_0,
                                prediction_of(schedule, x_t, m, i[:1]), (x_0[:, 0] > 0).double(), beta=beta,
                                adaptive=False)
    # The loss is nft.CLIP beta shift^2 per sample and a linear term, which is 0 at the optimum.
    slope, = torch.autograd.grad(policy.sum(), shift)
    off = slope / (2 * nft.CLIP * beta * bins.bincount(minlength=4))
    assert (off.abs() < 0.02 / beta).all()
    if level == 0:
        assert abs(best.mean().item() - math.sqrt(2 / math.pi) / beta) < 0.01 / beta


def test_at_the_old_policy_a_sample_pulls_as_its_weight_says():
    """There the gradient is (2r - 1) times that of a regression to x_0, over a."""
    random = torch.Generator().manual_seed(1)
    x_t, x_0, old = torch.randn(3, 3, 8, generator=random, dtype=torch.float64)
    i, r = torch.tensor([1, 1, 0]), torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)
    eps = old.clone().requires_grad_()
    policy, kl, gap = nft.nft_loss(lambda x, t: eps, lambda x, t: old + 2, EPS, x_t, i, x_0, old, r, beta=0.3)
    found, = torch.autograd.grad(policy.sum(), eps)
    away = EPS.x0(x_t, old, i) - x_0
    ratio = (EPS.sigma[i] / EPS.alpha[i])[:, None]
    want = -nft.CLIP * (2 * r - 1)[:, None] * 2 * away * ratio / 8 / away.abs().mean(1, keepdim=True)
    assert torch.allclose(found, want)
    assert found[0].norm() > 0 and found[1].norm() == 0
    assert torch.allclose(kl, torch.full((3,), 4.0, dtype=torch.float64)) and (gap == 0).all()


def test_only_kl_gives_gradients_to_the_reference_and_the_gap_gives_none():
    old, change = torch.zeros(2, 4), torch.ones(2, 4, requires_grad=True)
    _, kl, gap = nft.nft_loss(lambda x, t: old + change, lambda x, t: old, FLOW, torch.ones(2, 4),
                              torch.tensor([1, 1]), torch.zeros(2, 4), old, torch.ones(2))
    assert kl.requires_grad and not gap.requires_grad and gap.tolist() == [1.0, 1.0]


def test_weights_compare_within_a_prompt():
    """A prompt whose objects all score high is not preferred, and only the spread within prompts counts."""
    r = nft.weights_of([10.0, 12.0, 0.0, 2.0], ["a", "a", "b", "b"])
    assert torch.allclose(r, torch.tensor([0.4, 0.6, 0.4, 0.6]))
    assert nft.weights_of([1.0, 1.0, 5.0], ["a", "a", "b"]).tolist() == [0.5, 0.5, 0.5]
    one_outlier = nft.weights_of([100.0] + [0.0] * 99, ["a"] * 100)
    assert one_outlier[0] == 1 and one_outlier.min() > 0.48


def test_the_old_policy_follows_as_a_moving_average():
    weight = torch.nn.Parameter(torch.zeros(2))
    history = {}
    with nft.old_policy([weight], history, 0):
        assert weight.tolist() == [0, 0]
    nft.put([weight], [torch.ones(2)])
    with nft.old_policy([weight], history, 1):
        assert torch.allclose(weight, torch.tensor([0.998, 0.998]))
    assert weight.tolist() == [1, 1]
    with pytest.raises(KeyError), nft.old_policy([weight], history, 10_000):
        assert torch.allclose(weight, torch.tensor([0.999, 0.999]))
        raise KeyError
    assert weight.tolist() == [1, 1]
