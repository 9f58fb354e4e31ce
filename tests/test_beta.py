"""What beta means: the loss's fixed point samples from the prior tilted by exp(beta r), and a small network gets there.

On one-dimensional priors whose score is known in closed form, the prediction at which the residual (E6) is zero on
average is written down and pushed through the sampler. A tilt by beta moves the mean of a linear reward r(x) = x by
beta times the variance; the variance is that of the untuned chain, which a sampler of few steps makes smaller than
the prior's. `share` is what the chain moves, divided by that.
"""
from collections.abc import Callable

import pytest
import torch
from torch import Tensor


import common
import r2d3  # noqa: E402

STEPS = 20
GAUSSIAN = [(1.0, 0.0, 1.0)]                                        # (share, mean, variance) of its parts
NARROW = [(1.0, 0.0, 0.1)]
MIXTURE = [(0.3, -1.0, 0.15), (0.7, 0.7, 0.3)]


def vp(steps: int = STEPS) -> r2d3.NoiseSchedule:
    return r2d3.NoiseSchedule.from_diffusers("dpm", steps)


def flow(steps: int = STEPS) -> r2d3.NoiseSchedule:
    """The straight path alpha = 1 - sigma on a grid of even steps; it ends where the last step still has a width."""
    sigma = torch.linspace(0.995, 0.01, steps + 1, dtype=torch.float64)
    return r2d3.NoiseSchedule(1000 * sigma[:-1], 1 - sigma, sigma)


def exact(schedule: r2d3.NoiseSchedule, prior: list) -> Callable[[Tensor, Tensor | int], Tensor]:
    """eps(x, s): the noise that a perfect network finds in x (M, 1) at grid points s."""
    share, mean, variance = torch.tensor(prior, dtype=torch.float64).unbind(1)

    def eps(x: Tensor, s: Tensor | int) -> Tensor:
        alpha, sigma = schedule.alpha[s].reshape(-1, 1), schedule.sigma[s].reshape(-1, 1)
        total = alpha ** 2 * variance + sigma ** 2                  # (M or 1, parts): of x, for every part
        away = x - alpha * mean
        weight = (share.log() - total.log() / 2 - away ** 2 / (2 * total)).softmax(1)
        x0 = (weight * (mean + alpha * variance / total * away)).sum(1, keepdim=True)
        return (x - alpha * x0) / sigma

    return eps


def moments(schedule: r2d3.NoiseSchedule, eps: Callable) -> tuple[float, float]:
    """Mean and variance of what the sampler ends with: its density, carried over a fine grid from step to step."""
    x = torch.linspace(-5, 5, 401 if len(schedule) <= STEPS else 801, dtype=torch.float64)[:, None]
    density = (-x[:, 0] ** 2 / 2).softmax(0)
    for i in range(len(schedule)):
        mean, std = schedule.transition(x, eps(x, i), i)
        if i == len(schedule) - 1:                                  # narrower than the grid, but only moments count
            centre = (density * mean[:, 0]).sum()
            return centre.item(), ((density * (mean[:, 0] - centre) ** 2).sum() + std ** 2).item()
        density = (-((x - mean.T) / std) ** 2 / 2).softmax(0) @ density


def gradient(schedule: r2d3.NoiseSchedule, eps: Callable, x_s: Tensor, s: int, estimator: str) -> Tensor:
    """g of r(x) = x at grid point s; u, its gradient at the trajectory's end, is 1 everywhere."""
    if estimator == "identity":
        return torch.ones_like(x_s)
    rows = torch.full((len(x_s),), s)
    u = torch.ones_like(x_s)
    value = {"step": lambda x0: x0[:, 0], "sample": lambda x0: (x0 * u).sum(1)}[estimator]
    return r2d3.reward_gradient(lambda x, t: (None, eps(x, s)), value, schedule, x_s, rows)


def fixed_point(schedule: r2d3.NoiseSchedule, eps: Callable, beta: float, estimator: str,
                time_weight: str) -> Callable[[Tensor, int], Tensor]:
    """The prediction that minimises the loss: eps_ref(x_t) - (beta w / k) E[g(x_s) given x_t]."""
    z, probability = gauss_hermite(8)

    def tuned(x: Tensor, i: int) -> Tensor:
        reference = eps(x, i)
        mean, std = schedule.transition(x, reference, i)
        k, weight = r2d3.match_weights(schedule, torch.tensor([i]), beta=beta, matching="score",
                                       time_weight=time_weight)
        x_s = (mean + std * z).flatten()[:, None]
        g = gradient(schedule, eps, x_s, i + 1, estimator).reshape(len(x), -1)
        return reference - weight / k * (g * probability).sum(1, keepdim=True)

    return tuned


def gauss_hermite(count: int) -> tuple[Tensor, Tensor]:
    """Points and probabilities that integrate polynomials against a standard normal (Golub and Welsch)."""
    values, vectors = torch.linalg.eigh(torch.diag(torch.arange(1, count, dtype=torch.float64).sqrt(), 1)
                                        + torch.diag(torch.arange(1, count, dtype=torch.float64).sqrt(), -1))
    return values, vectors[0] ** 2


def share_of_tilt(schedule: r2d3.NoiseSchedule, prior: list, estimator: str, time_weight: str) -> float:
    """How far the fixed point moves the chain's mean, over beta times the chain's own variance; beta small."""
    eps = exact(schedule, prior)
    mean, variance = moments(schedule, eps)
    beta = 0.02 / variance ** 0.5
    return (moments(schedule, fixed_point(schedule, eps, beta, estimator, time_weight))[0] - mean) / (beta * variance)


@pytest.mark.parametrize("estimator", ["step", "sample"])
@pytest.mark.parametrize("prior", [GAUSSIAN, NARROW], ids=["variance 1", "variance 0.1"])
@pytest.mark.parametrize("grid", [vp, flow])
def test_beta_is_the_tilt(grid, prior, estimator):
    """w = 1 and the gradient through the network (E7 or E8): the theory's tilt, within 2%."""
    assert share_of_tilt(grid(), prior, estimator, "none") == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("grid", [vp, flow])
def test_beta_is_the_tilt_of_a_mixture_with_enough_steps(grid):
    """Where the prior is no Gaussian, a sampler of 20 steps does not end quite where its network expects it to."""
    few, many = (share_of_tilt(grid(steps), MIXTURE, "step", "none") for steps in (20, 90))
    assert few == pytest.approx(1, abs=0.05) and many == pytest.approx(1, abs=0.02)
    assert abs(many - 1) < abs(few - 1)
    assert share_of_tilt(grid(), MIXTURE, "sample", "none") == pytest.approx(few)       # E8 equals E7 where r is linear


@pytest.mark.parametrize("grid, prior, squared, identity", [
    (vp, GAUSSIAN, 0.46, 2.05), (vp, NARROW, 0.77, 4.9), (flow, GAUSSIAN, 0.28, 1.5)])
def test_the_other_choices_tilt_by_another_amount(grid, prior, squared, identity):
    """The paper's w = alpha_s^2 tilts less than beta says; u used as it is, without the network's Jacobian, more."""
    assert share_of_tilt(grid(), prior, "step", "squared") == pytest.approx(squared, rel=0.03)
    assert share_of_tilt(grid(), prior, "identity", "none") == pytest.approx(identity, rel=0.03)


@pytest.mark.parametrize("grid, estimator, matching", [
    (vp, "step", "eps"), (vp, "sample", "eps"), (vp, "sample", "kl"), (flow, "sample", "v")])
def test_a_small_network_gets_there(grid, estimator, matching):
    """The whole method in thirty lines: roll out, ask for the gradient, match; then the mean has moved as beta says."""
    schedule, B = grid(), 256
    eps_ref, levels, generator = exact(schedule, GAUSSIAN), schedule.t(torch.arange(STEPS + 1)), r2d3.seeded(0)
    mean, variance = moments(schedule, eps_ref)
    beta = 0.5 / variance ** 0.5
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(2, 48), torch.nn.SiLU(), torch.nn.Linear(48, 48), torch.nn.SiLU(),
                                  torch.nn.Linear(48, 1)).double()
    torch.nn.init.zeros_(net[-1].weight)                            # it begins as the base, as a LoRA does
    torch.nn.init.zeros_(net[-1].bias)

    def eps(x: Tensor, s: Tensor | int) -> Tensor:
        # What is learnt is added to v: added to eps, at high noise it would be magnified by 1 / alpha in x0, and so
        # in g, and with w = 1 the network would chase its own Jacobian.
        level = schedule.alpha[s].reshape(-1, 1).expand_as(x)
        return eps_ref(x, s) + level * net(torch.cat([x, level], 1))

    def at(t: Tensor) -> Tensor:                                    # grid points of what the network is told
        return (t[:, None] == levels).double().argmax(1)

    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    updates = 240
    for update in range(updates):
        if update % 8 == 0:
            with torch.no_grad():
                xs = [torch.randn(B, 1, generator=generator, dtype=torch.float64)]
                for i in range(STEPS):
                    centre, std = schedule.transition(xs[-1], eps(xs[-1], i), i)
                    xs.append(centre + std * torch.randn(B, 1, generator=generator, dtype=torch.float64))
                x = torch.stack(xs, 1)
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, 2 - 2 * update / updates)
        i = torch.randint(STEPS, (B,), generator=generator)
        u = torch.ones(B, 1, dtype=torch.float64)
        value = {"step": lambda x0: x0[:, 0], "sample": lambda x0: (x0 * u).sum(1)}[estimator]
        x_t, x_s = x[torch.arange(B), i], x[torch.arange(B), i + 1]
        g = r2d3.reward_gradient(lambda x, t: (None, eps(x, at(t))), value, schedule, x_s, i + 1)
        match, _ = r2d3.nabla_loss(lambda x, t: (None, eps(x, at(t))), lambda x, t: (None, eps_ref(x, at(t))), schedule,
                                   x_t, i, torch.zeros_like(g), g, beta=beta, matching=matching, time_weight="none")
        optimizer.zero_grad()
        match.mean().backward()
        optimizer.step()
    with torch.no_grad():
        moved, after = moments(schedule, eps)
    assert (moved - mean) / (beta * variance) == pytest.approx(1, abs=0.05)
    assert after == pytest.approx(variance, rel=0.05)               # a linear reward leaves the spread as it was


def test_beta_in_standard_deviations_of_the_reward(tmp_path, capsys):
    """--beta 2sd is 2 over the spread of the base's reward within a prompt; printed, stored, the same on resume."""
    config = r2d3.Config(prompts="a red cube", test_prompts="a big blue sphere", epochs=1, batch_size=2, steps=4,
                         updates_per_epoch=1, view_size=16, samples_per_prompt=1, beta="2sd", fraction=1.0,
                         out=str(tmp_path / "run"))
    summary = r2d3.train(config)
    base, full = r2d3.load_base(config, "cpu"), r2d3.resolve(config)
    reward = r2d3.load_reward("aesthetic", base, "cpu")
    features, schedule = r2d3.metrics.load_features(base.tower, "cpu"), base.schedule("dpm", 4)
    settings = r2d3.dataclasses.replace(full, samples_per_prompt=8, guidance=base.guidance)
    measured = common.measure(base, reward, features, schedule, ["a red cube"], settings, 0, "")
    assert summary["beta"] == pytest.approx(2 / measured.reward.std().item(), rel=1e-4)
    assert f"beta is {summary['beta']:.4g}" in capsys.readouterr().out
    again = r2d3.train(r2d3.dataclasses.replace(config, epochs=2, resume=True))
    assert again["beta"] == summary["beta"] and again["updates"] == 2


@pytest.mark.parametrize("beta", ["0sd", "2", "-1sd", "sd", "2 sd", "many"])
def test_beta_is_a_number_or_one_with_sd(beta):
    with pytest.raises(r2d3.UserError, match="--beta"):
        r2d3.resolve(r2d3.Config(beta=beta))
    assert r2d3.resolve(r2d3.Config(beta="0.5sd")).beta == "0.5sd"


def test_beta_on_the_command_line():
    assert r2d3.parse(["--beta", "2sd"])[1].beta == "2sd"
    assert r2d3.parse(["--beta", "1e3"])[1].beta == 1000.0
